"""Which variants go into one pack, and how many tokens a pack may have."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels.errors import InputError
from atman_kernels.pack import VariantPack


@dataclass(frozen=True)
class Variant:
    """One perturbation of one objective's base run.

    Attributes:
        objective: index of the objective.
        row: index of its row of factors; None for an unsuppressed variant.
        prefix: positions whose K/V it takes from the base run.
        length: number of positions of the objective; the suffix is [prefix, length).
        base: which base it takes them from; None: its objective's own.
        removed: positions of the suffix whose rows nobody reads, so that they are not run.
    """

    objective: int
    row: int | None
    prefix: int
    length: int
    base: int | None = None
    removed: int = 0

    @property
    def base_number(self) -> int:
        """Which base its prefix is part of: that of its objective, or of a shared stretch."""
        return self.objective if self.base is None else self.base

    @property
    def suffix(self) -> int:
        """Tokens that the variant recomputes itself."""
        return self.length - self.prefix - self.removed


class VariantQueue:
    """Variants waiting for a pack, with a token budget that can shrink.

    A pack takes the longest variant that waits, then whatever fits best into what is left of the budget, whichever
    objective it belongs to: packs of nearly one size, so that memory freed by one fits the next. A variant longer
    than the budget gets a pack of its own.

    Example:
        >>> queue = VariantQueue([Variant(0, u, prefix=u, length=8) for u in range(8)], token_budget=12)
        >>> [[v.suffix for v in pack] for pack in queue]
        [[8, 4], [7, 5], [6, 3, 2, 1]]
    """

    def __init__(self, variants: Iterable[Variant], token_budget: int) -> None:
        self._waiting = sorted(variants, key=_suffix)
        self.token_budget = token_budget

    def __iter__(self) -> Iterator[list[Variant]]:
        while self._waiting:
            taken = [self._waiting.pop()]
            left = self.token_budget - taken[0].suffix
            while (fitting := bisect_right(self._waiting, left, key=_suffix)) > 0:
                taken.append(self._waiting.pop(fitting - 1))
                left -= taken[-1].suffix
            yield taken

    def put_back(self, variants: list[Variant]) -> bool:
        """Variants that ran out of memory come back and the budget is halved.

        Returns:
            False if there is nothing left to halve: the pack was a single variant.
        """
        self._waiting = sorted([*self._waiting, *variants], key=_suffix)
        self.token_budget = max(1, sum(v.suffix for v in variants) // 2)
        return len(variants) > 1


def _suffix(variant: Variant) -> int:
    return variant.suffix


def padding(tokens: int) -> int:
    """How many tokens to add to a pack so that packs come in few sizes: at most 6 %, none to small ones.

    Allocators and kernel caches keep what they made for a size they have seen; a new size for every pack would
    let memory grow with the number of packs.

    Example:
        >>> padding(1000), padding(1024), padding(30)
        (24, 0, 0)
    """
    step = min(256, max(1, (1 << (tokens - 1).bit_length()) // 32))
    return -tokens % step


def lay_out(
    variants: list[Variant], base_starts: tuple[int, ...], device: torch.device, padding: int = 0
) -> VariantPack:
    """The pack of some variants; `base_starts` says where each base begins.

    With padding there is one more variant at the end, of so many rows that see nothing but each other.

    Example:
        >>> pack = lay_out([Variant(1, 0, prefix=2, length=5)], base_starts=(0, 9), device=torch.device("cpu"))
        >>> pack.row_position.tolist(), pack.base_starts.tolist()
        ([2, 3, 4], [9])
    """
    tail = [0] if padding else []
    return VariantPack.build(
        [v.suffix for v in variants] + [padding for _ in tail],
        [v.prefix for v in variants] + tail,
        [base_starts[v.base_number] for v in variants] + tail,
        device=device,
    )


def pack_factors(
    variants: list[Variant], positions: list[Tensor], factors: list[Tensor], rows: int, width: int
) -> Tensor:
    """Factors of a pack's variants, (rows, width): over the base's positions, then over the rows that are run.

    Args:
        variants: the rows' variants.
        positions: per variant, where its suffix's rows stand in its sequence.
        factors: per objective, (n_rows, length).
        rows: rows of the result, at least len(variants).
        width: columns of the result, at least the longest variant's length; 1 where nothing is said.
    """
    result = torch.ones(rows, width, dtype=torch.float32, device="cpu")
    for row, variant, own in zip(result, variants, positions, strict=False):
        if variant.row is not None:
            values = factors[variant.objective][variant.row]
            row[: variant.prefix] = values[: variant.prefix]
            row[variant.prefix : variant.prefix + len(own)] = values[own]
    return result


def full_row_factors(variants: list[Variant], factors: list[Tensor], width: int) -> Tensor:
    """Factors of variants that are run as full rows, (len(variants), width); 1 where nothing is said."""
    result = torch.ones(len(variants), width, dtype=torch.float32, device="cpu")
    for row, variant in zip(result, variants, strict=True):
        if variant.row is not None:
            own = factors[variant.objective][variant.row]
            row[: own.shape[0]] = own
    return result


# Past these many tokens a pack's matrix products are as fast as they get: on two cores, SmolLM2-135M runs at the same
# rate with 512, 1024 and 2048. A GPU wants enough rows to fill all of its SMs; its number is an estimate.
MOST_TOKENS = {"cpu": 2048, "cuda": 16384}


def token_budget(free_bytes: int, bytes_per_token: int, device_type: str) -> int:
    """How many tokens a pack may have: what half of the free memory holds, within what is useful.

    Args:
        free_bytes: memory that is free once the model and the base runs are in.
        bytes_per_token: activations of one token at their peak.
        device_type: "cpu", "cuda", …

    Raises:
        InputError: not even one token fits.
    """
    most = MOST_TOKENS.get(device_type, MOST_TOKENS["cpu"])
    budget = min(most, free_bytes // 2 // max(1, bytes_per_token))
    if budget < 1:
        raise InputError(f"token_budget: {free_bytes} free bytes do not hold one token of {bytes_per_token} bytes")
    return budget
