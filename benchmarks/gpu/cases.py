"""What is measured: shapes, how much each has to compute and move at least, and which of them a preset names."""

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

Covers = Literal["everything", "prefix"]  # all keys that a row sees, or those of the base alone
PACK_ROWS = 16384  # token budget of one pack
FACTOR_BYTES = 4


@dataclass(frozen=True)
class Heads:
    """A model's attention heads."""

    query: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}x{self.kv}x{self.dim}"


@dataclass(frozen=True)
class Work:
    """What any implementation must do for a result, if it reads every input once and computes visible keys only."""

    flops: int
    bytes: int

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline: no implementation takes less on a machine with these rates."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def bound(self, flops_per_second: float, bytes_per_second: float) -> str:
        """What decides the roofline: "products" or "memory"."""
        return "products" if self.flops / flops_per_second >= self.bytes / bytes_per_second else "memory"


@dataclass(frozen=True)
class DenseShape:
    """One call of `suppressed_attention`; causal is aligned at the end, and there are at least as many keys as queries.

    With `all_modes` the modes other than log-additive are measured too.
    """

    name: str
    group: str
    heads: Heads
    batch: int
    queries: int
    keys: int
    is_causal: bool
    all_modes: bool = False

    @property
    def variants(self) -> int:
        return self.batch

    @property
    def rows(self) -> int:
        return self.batch * self.queries

    def visible(self, covers: Covers = "everything") -> int:
        """How many keys all rows of one query head see together."""
        before = self.keys - self.queries if self.is_causal else self.keys
        own = self.queries * (self.queries + 1) // 2 if self.is_causal else 0
        return self.batch * (self.queries * before + own)

    def work(self, element: int, factor: str, covers: Covers = "everything") -> Work:
        """Of sparse factors one number per variant matters, which is nothing; dense ones have to be read."""
        heads = self.heads
        rows = 2 * heads.query * self.rows  # query and output
        keys = 2 * heads.kv * self.batch * self.keys
        factors = self.batch * self.keys * FACTOR_BYTES if factor == "dense" else 0
        return Work(4 * heads.query * heads.dim * self.visible(covers), (rows + keys) * heads.dim * element + factors)


@dataclass(frozen=True)
class PackShape:
    """One call of `packed_suppressed_attention`: suffix and prefix lengths of its variants, one base for all.

    A variant's factor is below 1 at the first key of its suffix, or, where all share one prefix, at a key of that.
    """

    name: str
    group: str
    heads: Heads
    suffixes: tuple[int, ...]
    prefixes: tuple[int, ...]
    all_modes: bool = False

    @property
    def variants(self) -> int:
        return len(self.suffixes)

    @property
    def rows(self) -> int:
        return sum(self.suffixes)

    @property
    def base(self) -> int:
        return max(self.prefixes)

    @property
    def longest(self) -> int:
        return max(s + p for s, p in zip(self.suffixes, self.prefixes, strict=True))

    @property
    def suppressed(self) -> tuple[int, ...]:
        """The position that each variant suppresses."""
        if self.group == "shared":
            return tuple(v * self.base // self.variants for v in range(self.variants))
        return self.prefixes

    def visible(self, covers: Covers = "everything") -> int:
        """How many keys all rows of one query head see together."""
        prefix = sum(s * p for s, p in zip(self.suffixes, self.prefixes, strict=True))
        own = sum(s * (s + 1) // 2 for s in self.suffixes)
        return prefix + own if covers == "everything" else prefix

    def work(self, element: int, factor: str, covers: Covers = "everything") -> Work:
        heads = self.heads
        rows = 2 * heads.query * self.rows
        keys = 2 * heads.kv * (self.base + (self.rows if covers == "everything" else 0))
        reach = sum(s + p for s, p in zip(self.suffixes, self.prefixes, strict=True))
        factors = reach * FACTOR_BYTES if factor == "dense" else 0
        return Work(4 * heads.query * heads.dim * self.visible(covers), (rows + keys) * heads.dim * element + factors)


Shape = DenseShape | PackShape

LLAMA = Heads(32, 8, 128)
LAYOUTS = (LLAMA, Heads(64, 8, 128), Heads(32, 8, 64), Heads(32, 8, 256))


def prefill(length: int, is_causal: bool, heads: Heads = LLAMA, all_modes: bool = False) -> DenseShape:
    pattern = "causal" if is_causal else "full"
    name = f"prefill-{_short(length)}-{pattern}-{heads}"
    return DenseShape(name, "prefill", heads, 1, length, length, is_causal, all_modes)


def decode(keys: int, batch: int, heads: Heads = LLAMA) -> DenseShape:
    """One new token of each of `batch` sequences, every one with a cache of its own."""
    return DenseShape(f"decode-{_short(keys)}-batch{batch}-{heads}", "decode", heads, batch, 1, keys, True)


def exact(length: int, heads: Heads = LLAMA, rows: int = PACK_ROWS, all_modes: bool = False) -> PackShape:
    """A pack of an exact explanation of `length` tokens: suppressed positions at regular distances.

    With V of them in the middle of V equal parts the suffixes have V * length / 2 rows together.
    """
    variants = max(1, 2 * rows // length)
    prefixes = tuple((2 * v + 1) * length // (2 * variants) for v in range(variants))
    suffixes = tuple(length - prefix for prefix in prefixes)
    return PackShape(f"exact-{_short(length)}-{heads}", "packs", heads, suffixes, prefixes, all_modes)


def shared(prefix: int, variants: int, rows: int, heads: Heads = LLAMA, all_modes: bool = False) -> PackShape:
    """Variants of `rows` rows each that share one prefix."""
    name = f"shared-{_short(prefix)}-{variants}x{rows}-{heads}"
    return PackShape(name, "shared", heads, (rows,) * variants, (prefix,) * variants, all_modes)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _quick() -> list[Shape]:
    k, by_layout = 1024, LAYOUTS[1:]
    return [
        prefill(16 * k, True, all_modes=True),
        *(prefill(n * k, True) for n in (1, 4, 32)),
        prefill(16 * k, False),
        *(prefill(16 * k, True, heads) for heads in by_layout),
        exact(1 * k, all_modes=True),
        exact(4 * k),
        exact(16 * k),
        *(exact(1 * k, heads) for heads in by_layout),
        shared(8 * k, 256, 8, all_modes=True),
        *(shared(prefix * k, v, r) for prefix, v, r in ((1, 64, 1), (8, 16, 1), (32, 256, 1), (32, 64, 64))),
        *(shared(128 * k, v, r) for v, r in ((16, 8), (1024, 1))),
        *(decode(keys * k, batch) for keys, batch in ((8, 32), (32, 8), (128, 1))),
    ]


def _headline() -> list[Shape]:
    """What the first minutes on a GPU are for, at head dimensions 128 and 64."""
    k = 1024
    made: list[Shape] = []
    for heads in (LLAMA, replace(LLAMA, dim=64)):
        made += [prefill(16 * k, True, heads), exact(1 * k, heads), shared(8 * k, 256, 8, heads),
                 decode(32 * k, 8, heads), exact(4 * k, heads)]  # fmt: skip
    return made


def _full() -> list[Shape]:
    k = 1024
    lengths, prefixes = (1, 2, 4, 8, 16, 32), (1, 8, 32, 128)
    more: list[Shape] = [prefill(n * k, c, h) for h, n, c in product(LAYOUTS, lengths, (True, False))]
    more += [exact(n * k, h) for h, n in product(LAYOUTS, (1, 4, 16))]
    more += [shared(p * k, v, r) for p, v, r in product(prefixes, (16, 64, 256, 1024, 4096), (1, 8, 64))]
    more += [decode(n * k, b, h) for h, n, b in product(LAYOUTS[:2], (1, 8, 32, 128), (1, 8, 32))]
    first = {shape.name: shape for shape in _quick()}  # these carry the modes
    return [*first.values(), *(shape for shape in more if shape.name not in first)]


def _tiny() -> list[Shape]:
    """For a CPU, in seconds: to see that everything runs."""
    heads = Heads(4, 2, 16)
    return [
        prefill(64, True, heads, all_modes=True),
        prefill(48, False, heads),
        exact(40, heads, rows=100, all_modes=True),
        shared(64, 6, 1, heads),
        shared(40, 3, 5, heads, all_modes=True),
        decode(64, 2, heads),
    ]


PRESETS = {"headline": _headline, "quick": _quick, "full": _full, "tiny": _tiny}
GROUPS = ("prefill", "packs", "shared", "decode")


def planted_score(keys: int) -> float:
    """What the suppressed key's score is raised by, so that it weighs about as much as `keys` others together."""
    return math.log(keys + 1)
