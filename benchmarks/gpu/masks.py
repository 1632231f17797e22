"""Which keys the rows of a problem see, a block of rows at a time: rows x keys at once would fill a GPU."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.problems import DenseProblem, PackProblem

Visible = Callable[[slice], Tensor]  # rows -> bool (rows, keys)
BLOCK = 128  # of rows and keys


def dense_visible(problem: DenseProblem) -> Visible:
    shape, device = problem.shape, problem.query.device
    keys = torch.arange(shape.keys, device=device)
    last = keys[shape.keys - shape.queries :] if shape.is_causal else torch.full_like(keys, shape.keys)
    return lambda rows: keys <= last[rows, None]


def pack_visible(problem: PackProblem) -> Visible:
    """Keys are the base's, then the rows' own."""
    pack, device = problem.pack, problem.query.device
    columns = torch.arange(problem.shape.base, device=device)
    variants, positions = pack.row_variant.long(), pack.row_position

    def visible(rows: slice) -> Tensor:
        prefix = columns < pack.prefix_lengths[variants[rows], None]
        own = (variants == variants[rows, None]) & (positions <= positions[rows, None])
        return torch.cat([prefix, own], dim=1)

    return visible


def joined(problem: PackProblem) -> tuple[Tensor, Tensor]:
    """Keys and values (Hkv, S + T, D) in the order of `pack_visible`."""
    return (
        torch.cat([problem.base_key, problem.key], dim=1),
        torch.cat([problem.base_value, problem.value], dim=1),
    )


def row_blocks(rows: int, visible: Visible, keys: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with what they see."""
    step = max(BLOCK, (1 << 26) // keys // BLOCK * BLOCK)
    for first in range(0, rows, step):
        block = slice(first, min(rows, first + step))
        yield block, visible(block)


def block_states(rows: int, visible: Visible, keys: int) -> tuple[Tensor, Tensor]:
    """(row blocks, key blocks) bool twice: where some pairs of a block see each other, and where all do.

    A block that reaches beyond the last row or key never counts as whole.
    """
    some, every = [], []
    for block, pairs in row_blocks(rows, visible, keys):
        missing = -(block.stop - block.start) % BLOCK
        padded = torch.nn.functional.pad(pairs, (0, -keys % BLOCK, 0, missing))
        tiles = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [row blocks, BLOCK, key blocks, BLOCK]
        some.append(tiles.any(dim=3).any(dim=1))
        every.append(tiles.all(dim=3).all(dim=1))
    return torch.cat(some), torch.cat(every)
