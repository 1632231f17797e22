"""Which tile sizes a call gets: one table per architecture, read by pure functions.

Nothing is timed while a user waits. `atman bench tune` measures on the machine it runs on and rewrites the table.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configs"
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = ("16-bit", "32-bit")
# decode: all rows of a key head fit into one tile. Else a dense batch, or a pack, whose tiles may span many variants.
REGIMES = ("dense", "packed", "decode")
# Of the backward's tables, `*_backward.json`: its kernels, and whether the call is a pack.
BACKWARD_REGIMES = ("dense_query", "packed_query", "dense_key", "packed_key", "broadcast")
# Compute capability → table. 8.6 to 8.9 and 12.x have less shared memory per block than their data-centre siblings.
ARCHITECTURES = {"sm_80": (80, 87), "sm_86": (86, 88, 89, 120, 121), "sm_90": (90,), "sm_100": (100, 101, 103, 110)}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # bytes per block
DECODE_ROWS = 64  # the tallest tile of the decode regime
LEAST_SHARE = 256  # keys that are worth a split of their own
MOST_SPLITS = 64
LEAST_SCALE = 1e-6  # from here on scaling is left to the exponent


@dataclass(frozen=True)
class KernelConfig:
    """Rows and keys of a tile, and how the compiler spreads it over threads and time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Key:
    """What a table is asked for; head_dim is the power of two that holds both head dimensions."""

    dtype: str
    regime: str
    head_dim: int


Table = dict[Key, KernelConfig]


def architecture(capability: tuple[int, int]) -> str:
    """The table for a compute capability; unknown ones get the one that asks least of a device.

    Example:
        >>> architecture((9, 0)), architecture((8, 9)), architecture((13, 0))
        ('sm_90', 'sm_86', 'sm_86')
    """
    number = 10 * capability[0] + capability[1]
    for name, numbers in ARCHITECTURES.items():
        if number in numbers:
            return name
    return "sm_86"


def padded(dim: int) -> int:
    """The power of two, at least 16, that a tile gives to a head dimension."""
    return max(16, 1 << (dim - 1).bit_length())


def regime(rows: int, is_packed: bool) -> str:
    """The kind of work. `rows` are those of one key head, group folded in, of a batch entry or of a whole pack.

    Example:
        >>> regime(4, False), regime(4096, False), regime(4096, True)
        ('decode', 'dense', 'packed')
    """
    if rows <= DECODE_ROWS:
        return "decode"
    return "packed" if is_packed else "dense"


def choose(
    table: Table,
    element_size: int,
    regime: str,
    head_dim: int,
    value_dim: int,
    rows: int,
    has_bias: bool = False,
    holds_terms: bool = False,
) -> KernelConfig:
    """A table's entry, with a tile no taller than the power of two that holds the call's rows (group folded in)."""
    dtype = "16-bit" if element_size == 2 else "32-bit"
    dim = max(padded(head_dim), padded(value_dim))
    found = fitted(table[Key(dtype, regime, dim)], head_dim, value_dim, has_bias, holds_terms)
    return replace(found, block_m=min(found.block_m, padded(rows)))


def fitted(
    config: KernelConfig, head_dim: int, value_dim: int, has_bias: bool, holds_terms: bool = False
) -> KernelConfig:
    """What is left of an entry beside what else a thread's registers hold.

    A bias is one more number, and one more address, per row and key; terms of single rows, see `holds_terms`, are one
    more number. Loads of a head dimension that is padded are masked, and the fewer of them are under way at once, the
    better.
    """
    if padded(head_dim) != head_dim or padded(value_dim) != value_dim:
        config = replace(config, num_stages=min(config.num_stages, 2))
    if holds_terms and max(head_dim, value_dim) > 64:
        config = replace(config, block_n=min(config.block_n, 32))
    if has_bias:
        most_rows = 64 if max(head_dim, value_dim) <= 64 else 32
        config = replace(config, block_m=min(config.block_m, most_rows), block_n=min(config.block_n, 32))
    return config


def fitted_backward(
    config: KernelConfig, regime: str, head_dim: int, value_dim: int, has_bias: bool, mode: str, has_softcap: bool
) -> KernelConfig:
    """What is left of an entry of the backward's tables beside what else a thread's registers hold.

    Where factors multiply scores, these are kept for it, and so are the slopes of a softcap; the loads of a head
    dimension that is padded are masked; the gradient of a bias walks over the bias. Each takes half a step of the walk,
    and kept scores half a tile of queries.

    Example:
        >>> fitted_backward(KernelConfig(64, 128, 8, 2), "dense_key", 80, 80, False, "log_additive", False)
        KernelConfig(block_m=32, block_n=128, num_warps=8, num_stages=2)
    """
    config = fitted(config, head_dim, value_dim, has_bias)
    keeps_scores = mode != "log_additive"
    is_padded = (padded(head_dim), padded(value_dim)) != (head_dim, value_dim)
    if keeps_scores and regime.endswith("_query"):
        config = replace(config, block_m=max(config.block_m // 2, 16))
    of_bias = has_bias and regime == "broadcast"
    for _ in range(keeps_scores + is_padded + has_softcap + of_bias):
        if regime.endswith("_key"):
            config = replace(config, block_m=max(config.block_m // 2, 16))
        else:
            config = replace(config, block_n=max(config.block_n // 2, 16))
    return config


def holds_terms(is_packed: bool, has_factors: bool, mode: str, softcap: float | None, scale: float) -> bool:
    """Whether terms of single rows are held beside the scores, as in packs where they are not simply added first."""
    return is_packed and has_factors and not (mode == "log_additive" and softcap is None and scale >= LEAST_SCALE)


def choose_splits(programs: int, keys: int, processors: int) -> int:
    """Over how many programs to spread a row's keys, so that a call with few rows fills the device.

    Example:
        >>> choose_splits(programs=8, keys=8192, processors=132), choose_splits(1000, 8192, 132)
        (32, 1)
    """
    if 2 * programs > processors:
        return 1
    return max(1, min(2 * processors // programs, keys // LEAST_SHARE, MOST_SPLITS))


@cache
def load(name: str) -> Table:
    """The table of an architecture."""
    return parse(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def parse(entries: list[dict[str, Any]]) -> Table:
    """The table from the entries of a JSON file."""
    return {
        Key(e["dtype"], e["regime"], e["head_dim"]): KernelConfig(
            e["block_m"], e["block_n"], e["num_warps"], e["num_stages"]
        )
        for e in entries
    }


def dump(table: Table) -> str:
    """A table as its file holds it: one entry per line."""
    lines = [json.dumps(asdict(key) | asdict(config)) for key, config in table.items()]
    return "[\n  " + ",\n  ".join(lines) + "\n]\n"


@dataclass(frozen=True)
class Forced:
    """What a call uses instead of what the table and the device suggest; None leaves the choice."""

    config: KernelConfig | None = None
    splits: int | None = None


_NOTHING = Forced()
_forced: ContextVar[Forced] = ContextVar("forced", default=_NOTHING)


@contextmanager
def forced(config: KernelConfig | None = None, splits: int | None = None) -> Iterator[None]:
    """Calls inside use this configuration, or this many splits: for tuning and tests."""
    token = _forced.set(Forced(config, splits))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_now() -> Forced:
    """What `forced` has set here."""
    return _forced.get()
