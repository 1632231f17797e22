"""Inputs for the attention ops, the plain formula they are held against, and which backends can be tried.

`plain_attention` is written from the formula and shares no code with the package. In float64 it is the truth, in
the dtype of the inputs it says how much rounding a straightforward implementation would show.
"""

import ctypes
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from atman_kernels import backends
from atman_kernels.backends import cpu

MODES = ("log_additive", "multiplicative", "shifted")
ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKEND_DTYPES = {  # the most precise one first
    "reference": ALL_DTYPES,
    "cpu": ALL_DTYPES,
    "cpu:torch": ALL_DTYPES,
    "cpu:amx": (torch.bfloat16,),
    "cpu:avx512_bf16": (torch.bfloat16,),
    "cpu:avx512": (torch.float32, torch.bfloat16, torch.float16),
    "cpu:avx2": (torch.float32, torch.bfloat16, torch.float16),
    "cpu:plain": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
    "cuda:hopper": (torch.bfloat16, torch.float16),
    "cuda:plain": (torch.bfloat16, torch.float16),
}
HARDWARE_BACKENDS = ("triton", "cuda")
# Those that can run here. `test_every_backend_is_tested` skips the others, each once, with its reason.
FAMILIES = tuple(name for name, reason in backends.availability().items() if reason is None)
# What computes: "cpu" only chooses one of its variants, which `test_cpu_is_the_fastest_of_its_variants` holds it to.
BACKENDS = (
    *(name for name in FAMILIES if name != "cpu"),
    *(name for name in (f"cpu:{variant}" for variant in cpu.variants()) if name in BACKEND_DTYPES),
)
EMPTY = torch.zeros(0)


def backend_dtypes(dtypes: tuple[torch.dtype, ...] = ALL_DTYPES) -> list[Any]:
    """Parameters (backend, dtype) of a test: every backend that runs here, with those dtypes that it takes."""
    return [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for dtype in dtypes
        for backend in BACKENDS
        if dtype in BACKEND_DTYPES[backend]
    ]


def every_mode_for(names: Iterable[str], *in_all: str) -> list[tuple[str, str]]:
    """(name, mode) for what runs slowly: one mode per case, in turns, and all of them for the cases in `in_all`."""
    turns = {name: MODES[index % len(MODES)] for index, name in enumerate(names)}
    assert set(in_all) <= set(turns)
    return [(name, mode) for name in turns for mode in MODES if name in in_all or mode == turns[name]]


def device_for(backend: str, dtype: torch.dtype) -> str:
    """The device to test a backend on; `backend_dtypes` has what a backend takes."""
    assert dtype in BACKEND_DTYPES[backend], f"{backend} does not take {dtype}"
    return "cuda" if backend.partition(":")[0] in HARDWARE_BACKENDS and torch.cuda.is_available() else "cpu"


def first_dtype(backend: str) -> torch.dtype:
    """The dtype in which a backend's results are compared."""
    return BACKEND_DTYPES[backend][0]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN (floats) or the largest value (integers), so that what nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Memory that C++ allocates begins as large numbers, where the C library can do that."""
    perturb, mallopt = -6, getattr(ctypes.CDLL(None), "mallopt", None)  # M_PERTURB of glibc's malloc.h
    if mallopt is None:
        yield
        return
    mallopt(perturb, 0x5A ^ 0xFF)  # memory is filled with the complement: 0x5a5a5a5a is a float of 1.5e16
    try:
        yield
    finally:
        mallopt(perturb, 0)


@contextmanager
def one_thread() -> Iterator[None]:
    """The tensors of these tests are so small that sharing the work takes longer than doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generator_for(*labels: Any) -> torch.Generator:
    """A generator whose stream depends on what is tested, and not on which test ran before."""
    return torch.Generator().manual_seed(zlib.crc32(repr(labels).encode()))


def random_factor(shape: tuple[int, ...], generator: torch.Generator, values: str = "mixed") -> Tensor:
    """Factors: "mixed" (removed, damped, untouched, amplified), "sparse" (mostly 1), "lone" (one per row is not 1), or
    one number everywhere."""
    if values == "lone":
        places = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
        return torch.ones(shape, dtype=torch.float64).scatter_(-1, places, 0.1)
    if values not in ("mixed", "sparse"):
        return torch.full(shape, float(values), dtype=torch.float64)
    menu = torch.tensor([0.0, 0.1, 0.5, 1.0, 1.0, 2.5] if values == "mixed" else [0.0, 0.1] + [1.0] * 14)
    return menu[torch.randint(len(menu), shape, generator=generator)].double()


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; `tensor` has heads, rows and features last."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "rows_first":  # (..., rows, heads, features) in memory, as the models' projections leave it
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "every_second":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "slice":
        return torch.nn.functional.pad(tensor, (1, 2, 3, 0), value=float("nan"))[..., 3:, 1:-2]
    if layout == "expanded":
        return tensor[..., :1, :, :].contiguous().expand(tensor.shape)
    raise ValueError(layout)


@dataclass(frozen=True)
class DenseCase:
    """Shapes and options of one dense call; `build` makes the tensors."""

    batch: int = 2
    key_batch: int = 2
    query_heads: int = 4
    kv_heads: int = 2
    query_length: int = 7
    key_length: int = 11
    head_dim: int = 16
    value_dim: int = 16
    is_causal: bool = False
    key_mask: str = "none"  # none | ragged | left | dead: the last batch entry sees nothing
    sliding_window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    position_bias: str = "none"  # none | full | heads | keys | queries | hidden: with -inf | dead: whole rows of -inf
    layout: str = "contiguous"
    factor_values: str = "mixed"

    def build(self, dtype: torch.dtype, factor: str = "keys", device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of `suppressed_attention`, all but mode and backend; factor is none, keys or heads."""
        generator = generator_for(self, factor)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        query = 2 * normal(self.batch, self.query_heads, self.query_length, self.head_dim)
        key = normal(self.key_batch, self.kv_heads, self.key_length, self.head_dim)
        value = normal(self.key_batch, self.kv_heads, self.key_length, self.value_dim)
        call: dict[str, Any] = {
            "query": lay_out(query.to(device, dtype), self.layout),
            "key": lay_out(key.to(device, dtype), self.layout),
            "value": lay_out(value.to(device, dtype), self.layout),
            "is_causal": self.is_causal,
        }
        if factor != "none":
            heads = (self.query_heads,) if factor == "heads" else ()
            values = random_factor((self.batch, *heads, self.key_length), generator, self.factor_values)
            call["factor"] = values.to(device, factor_dtype(dtype))
        if self.key_mask != "none":
            call["key_mask"] = self._key_mask(generator).to(device)
        if self.position_bias != "none":
            call["position_bias"] = self._position_bias(normal).to(device, dtype)
        if self.sinks:
            call["sinks"] = (2 * normal(self.query_heads)).to(device, dtype)
        options = {"sliding_window": self.sliding_window, "softcap": self.softcap, "scale": self.scale}
        return call | {name: option for name, option in options.items() if option is not None}

    def _key_mask(self, generator: torch.Generator) -> Tensor:
        mask = torch.rand(self.batch, self.key_length, generator=generator) < 0.7
        mask[:, 0] = True
        if self.key_mask == "left":  # padding on the left: entry b starts at key b + 1
            mask = torch.arange(self.key_length) > torch.arange(self.batch)[:, None]
        if self.key_mask == "dead":
            mask[-1] = False
        return mask

    def _position_bias(self, normal: Any) -> Tensor:
        batch, heads, queries, keys = self.batch, self.query_heads, self.query_length, self.key_length
        shapes = {"heads": (1, heads, queries, keys), "keys": (batch, 1, 1, keys), "queries": (queries, keys)}
        bias = normal(*shapes.get(self.position_bias, (batch, heads, queries, keys)))
        if self.position_bias in ("hidden", "dead"):
            bias = bias.masked_fill(normal(*bias.shape) > 0.5, -torch.inf)
        if self.position_bias == "dead":
            bias[:, :, ::2] = -torch.inf
        return bias


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


DENSE_CASES = {
    "multi_head": DenseCase(kv_heads=4),
    "grouped": DenseCase(),
    "multi_query": DenseCase(kv_heads=1),
    "grouped_by_three": DenseCase(query_heads=9, kv_heads=3, head_dim=8, value_dim=8),
    "wide_value": DenseCase(head_dim=12, value_dim=24),
    "narrow_value": DenseCase(head_dim=24, value_dim=5),
    "causal": DenseCase(is_causal=True, query_length=13, key_length=13),
    "causal_fewer_queries": DenseCase(is_causal=True, query_length=5, key_length=17),
    "causal_more_queries": DenseCase(is_causal=True, query_length=17, key_length=5),
    "decoding": DenseCase(is_causal=True, query_length=1, key_length=23),
    "key_mask": DenseCase(key_mask="ragged"),
    "key_mask_dead_rows": DenseCase(key_mask="dead"),
    "left_padding": DenseCase(key_mask="left", is_causal=True, query_length=11),
    "window_causal": DenseCase(is_causal=True, sliding_window=4, query_length=11),
    "window_causal_cached": DenseCase(is_causal=True, sliding_window=3),
    "window_both_ways": DenseCase(sliding_window=3, query_length=11),
    "window_both_ways_more_queries": DenseCase(sliding_window=3, query_length=15),
    "window_of_one": DenseCase(is_causal=True, sliding_window=1),
    "window_beyond_length": DenseCase(is_causal=True, sliding_window=1000),
    "softcap": DenseCase(softcap=1.5),
    "scale": DenseCase(scale=0.8),
    "sinks": DenseCase(sinks=True),
    "sinks_dead_rows": DenseCase(sinks=True, key_mask="dead", is_causal=True, query_length=17),
    "bias": DenseCase(position_bias="full"),
    "bias_per_head": DenseCase(position_bias="heads"),
    "bias_per_key": DenseCase(position_bias="keys"),
    "bias_two_axes": DenseCase(position_bias="queries"),
    "bias_hides_keys": DenseCase(position_bias="hidden"),
    "bias_hides_rows": DenseCase(position_bias="dead", is_causal=True, query_length=11),
    "shared_keys": DenseCase(batch=5, key_batch=1, is_causal=True),
    "shared_keys_masked": DenseCase(batch=3, key_batch=1, key_mask="dead", position_bias="keys", sinks=True),
    "one_by_one": DenseCase(batch=1, key_batch=1, query_heads=1, kv_heads=1, query_length=1, key_length=1, head_dim=1),
    "odd_113_203": DenseCase(query_length=113, key_length=203, is_causal=True, factor_values="sparse"),
    "odd_799_3": DenseCase(batch=1, key_batch=1, query_length=799, key_length=3),
    "odd_3_799": DenseCase(batch=3, key_batch=1, query_length=3, key_length=799, factor_values="sparse"),
    "rows_first": DenseCase(layout="rows_first", is_causal=True),
    "every_second": DenseCase(layout="every_second", is_causal=True),
    "slice": DenseCase(layout="slice", is_causal=True),
    "expanded": DenseCase(layout="expanded", is_causal=True),
    "everything": DenseCase(
        batch=3, key_batch=1, query_heads=6, kv_heads=2, query_length=19, key_length=37, head_dim=20, value_dim=12,
        is_causal=True, key_mask="dead", sliding_window=9, softcap=3.0, scale=0.4, sinks=True, position_bias="hidden",
        layout="rows_first",
    ),
}  # fmt: skip


def to_float64(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with every floating-point tensor in float64, on the CPU."""
    return {
        name: (value.double() if value.is_floating_point() else value).cpu() if isinstance(value, Tensor) else value
        for name, value in call.items()
    }


def largest_score(call: dict[str, Any]) -> float:
    """Bound on the scores of a dense or packed call, before and after multiplication with the factors."""
    factor, names = call.get("factor"), ("key", "base_key")
    query, *keys = [call[n].double().norm(dim=-1).flatten() for n in ("query", *names) if n in call]
    numbers = [x for x in (query, torch.cat(keys), EMPTY if factor is None else factor.double().flatten()) if x.numel()]
    scale = call.get("scale", call["query"].shape[-1] ** -0.5)
    return abs(scale) * math.prod(max(1.0, x.max().item()) for x in numbers)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor | None = None,
    *,
    mode: str = "log_additive",
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, lse) with every step in the dtype of the query and every score in memory."""
    group, dtype = query.shape[1] // key.shape[1], query.dtype
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_by_position(query.shape[2], key.shape[2], is_causal, sliding_window).to(query.device)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    if position_bias is not None:
        visible = visible & (position_bias > -torch.inf)
        scores = scores + position_bias
    visible = visible.expand(scores.shape)
    if factor is not None:
        per_key = (factor[:, None, None, :] if factor.ndim == 2 else factor[:, :, None, :]).to(dtype)
        scores = suppress_plainly(scores.masked_fill(~visible, 0.0), per_key, mode, visible)
    logits = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    live = (logits > -torch.inf).any(dim=-1, keepdim=True)
    safe = logits.masked_fill(~live, 0.0)  # a row of -inf would have NaN gradients, even when nobody uses it
    weights = safe.softmax(dim=-1).masked_fill(~live, 0.0)
    lse = safe.logsumexp(dim=-1).masked_fill(~live.squeeze(-1), -torch.inf)
    return weights[..., : key.shape[2]] @ value, lse


def visible_by_position(queries: int, keys: int, is_causal: bool, window: int | None) -> Tensor:
    """(queries, keys): the last query stands at the position of the last key."""
    ahead = torch.arange(keys)[None, :] - (torch.arange(queries)[:, None] + keys - queries)
    visible = ahead <= 0 if is_causal else torch.full_like(ahead, True, dtype=torch.bool)
    return visible if window is None else visible & (ahead > -window) & (ahead < window)


def suppress_plainly(scores: Tensor, factor: Tensor, mode: str, visible: Tensor) -> Tensor:
    if mode == "log_additive":
        return scores + factor.log()
    if mode == "multiplicative":
        return factor * scores
    if scores.shape[-1] == 0:
        return scores
    lowest = scores.masked_fill(~visible, torch.inf).amin(dim=-1, keepdim=True)
    lowest = lowest.masked_fill(lowest == torch.inf, 0.0)
    return lowest + factor * (scores - lowest)


class Truth(NamedTuple):
    """A call, and what it must give: in float64, and by the plain formula in the call's dtype."""

    call: dict[str, Any]
    exact: tuple[Tensor, Tensor]  # output and lse
    plain: tuple[Tensor, Tensor]
    largest_score: float


@lru_cache(maxsize=128)  # backends take turns; a property's examples are the same for each of them
def truth_of(case: "DenseCase | PackCase", mode: str, factor: str, dtype: torch.dtype, device: str) -> Truth:
    """Computed once for all backends; nobody may write to it."""
    call = case.build(dtype, factor, device)
    if isinstance(case, PackCase):
        exact, plain = (variant_by_variant(case, inputs, mode) for inputs in (to_float64(call), call))
    else:
        exact, plain = (plain_attention(**inputs, mode=mode) for inputs in (to_float64(call), call))
    return Truth(call, exact, plain, largest_score(call))


@dataclass(frozen=True)
class PackCase:
    """Shapes and options of one packed call; `build` makes the tensors."""

    suffix_lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    base_starts: tuple[int, ...] | None = None
    spare_base: int = 3  # base keys that no variant reuses
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    is_causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    position_bias: str = "none"  # none | full | heads | keys (as ALiBi) | queries | hidden: with -inf
    layout: str = "contiguous"
    factor_values: str = "mixed"

    def build(self, dtype: torch.dtype, factor: str = "keys", device: str = "cpu") -> dict[str, Any]:
        """Keyword arguments of `packed_suppressed_attention`, all but mode and backend."""
        from atman_kernels.pack import VariantPack

        generator = generator_for(self, factor)
        starts = self.base_starts or (0,) * len(self.prefix_lengths)
        rows = sum(self.suffix_lengths)
        base = max(start + prefix for start, prefix in zip(starts, self.prefix_lengths, strict=True)) + self.spare_base
        reach = max(p + s for p, s in zip(self.prefix_lengths, self.suffix_lengths, strict=True))

        def normal(heads: int, length: int, features: int) -> Tensor:
            values = torch.randn(heads, length, features, generator=generator, dtype=torch.float64)
            return lay_out(values.to(device, dtype), self.layout)

        call: dict[str, Any] = {
            "query": 2 * normal(self.query_heads, rows, self.head_dim),
            "key": normal(self.kv_heads, rows, self.head_dim),
            "value": normal(self.kv_heads, rows, self.value_dim),
            "base_key": normal(self.kv_heads, base, self.head_dim),
            "base_value": normal(self.kv_heads, base, self.value_dim),
            "pack": VariantPack.build(self.suffix_lengths, self.prefix_lengths, self.base_starts, device=device),
            "is_causal": self.is_causal,
        }
        if factor != "none":
            heads = (self.query_heads,) if factor == "heads" else ()
            values = random_factor((len(self.suffix_lengths), *heads, reach), generator, self.factor_values)
            call["factor"] = values.to(device, factor_dtype(dtype))
        if self.sinks:
            sinks = 2 * torch.randn(self.query_heads, generator=generator, dtype=torch.float64)
            call["sinks"] = sinks.to(device, dtype)
        if self.position_bias != "none":
            call["position_bias"] = self._position_bias(reach, generator).to(device, dtype)
        options = {"sliding_window": self.sliding_window, "softcap": self.softcap, "scale": self.scale}
        return call | {name: option for name, option in options.items() if option is not None}

    def _position_bias(self, reach: int, generator: torch.Generator) -> Tensor:
        """Over absolute positions, some more than the pack reaches."""
        positions = reach + 2
        shapes = {"heads": (self.query_heads, positions, positions), "keys": (self.query_heads, 1, positions),
                  "queries": (positions, 1)}  # fmt: skip
        shape = shapes.get(self.position_bias, (positions, positions))
        bias = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.position_bias == "hidden":
            bias = bias.masked_fill(torch.randn(shape, generator=generator) > 0.5, -torch.inf)
        return bias


def variant_by_variant(case: PackCase, call: dict[str, Any], mode: str) -> tuple[Tensor, Tensor]:
    """(output, lse) of a packed call, each variant alone: dense attention over its prefix and its own rows.

    The row bookkeeping is done again here, from the lengths.
    """
    starts = case.base_starts or (0,) * len(case.prefix_lengths)
    options = {k: call[k] for k in ("is_causal", "sliding_window", "softcap", "scale", "sinks") if k in call}
    outputs, lses, first = [], [], 0
    for variant, (length, prefix) in enumerate(zip(case.suffix_lengths, case.prefix_lengths, strict=True)):
        rows, base = slice(first, first + length), slice(starts[variant], starts[variant] + prefix)
        first += length
        factor, bias = call.get("factor"), call.get("position_bias")
        if bias is not None:  # at the variant's own positions
            reach = bias.shape[-2] if bias.shape[-2] > 1 else bias.shape[-1]
            bias = bias.expand(case.query_heads, reach, reach)[None, :, prefix : prefix + length, : prefix + length]
        output, lse = plain_attention(
            call["query"][None, :, rows],
            torch.cat([call["base_key"][:, base], call["key"][:, rows]], dim=1)[None],
            torch.cat([call["base_value"][:, base], call["value"][:, rows]], dim=1)[None],
            None if factor is None else factor[variant : variant + 1, ..., : prefix + length],
            mode=mode,
            position_bias=bias,
            **options,
        )
        outputs.append(output[0])
        lses.append(lse[0])
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


PACK_CASES = {
    "few_tokens_each": PackCase((3, 2, 4, 3), (5, 6, 4, 5)),
    "one_variant": PackCase((6,), (9,)),
    "one_token_each": PackCase((1,) * 40, tuple(range(40))),
    "every_prefix_length": PackCase(tuple(24 - p for p in range(25)), tuple(range(25)), spare_base=0),
    "empty_suffixes": PackCase((0, 3, 0, 0, 2, 0), (5, 6, 0, 9, 1, 2)),
    "empty_prefixes": PackCase((3, 5, 1), (0, 0, 0)),
    "no_base": PackCase((3, 5, 1), (0, 0, 0), spare_base=0),
    "long_suffixes": PackCase((130, 3, 201, 1), (17, 300, 0, 90), factor_values="sparse"),
    "long_prefix": PackCase((2,) * 30, (700,) * 30, factor_values="sparse"),
    "several_bases": PackCase((3, 4, 2, 5, 1), (6, 6, 9, 3, 0), (0, 7, 13, 13, 25)),
    "several_bases_long_suffixes": PackCase((70, 65, 80), (20, 31, 12), (0, 21, 60)),
    "multi_head": PackCase((3, 2, 4), (5, 6, 4), kv_heads=4),
    "multi_query": PackCase((3, 2, 4), (5, 6, 4), kv_heads=1),
    "grouped_by_three": PackCase((3, 2, 4), (5, 6, 4), query_heads=9, kv_heads=3),
    "wide_value": PackCase((3, 2, 4), (5, 6, 4), head_dim=6, value_dim=20),
    "narrow_value": PackCase((3, 2, 40), (5, 6, 4), head_dim=20, value_dim=6),
    "window": PackCase((3, 2, 9, 30), (5, 16, 4, 20), sliding_window=6),
    "window_inside_suffix": PackCase((20, 33, 1), (5, 16, 14), sliding_window=3),
    "window_several_bases": PackCase((3, 2, 9, 1), (15, 16, 4, 8), (0, 3, 20, 20), sliding_window=6),
    "window_of_one": PackCase((3, 2, 9), (5, 6, 4), sliding_window=1),
    "window_both_ways": PackCase((3, 2, 9, 30), (5, 16, 4, 20), sliding_window=6, is_causal=False),
    "softcap": PackCase((3, 2, 4), (5, 6, 4), softcap=1.5),
    "scale": PackCase((3, 2, 4), (5, 6, 4), scale=0.9),
    "bias": PackCase((3, 2, 4), (5, 6, 4), position_bias="full"),
    "bias_per_head": PackCase((3, 2, 40), (5, 6, 4), position_bias="heads"),
    "bias_per_key": PackCase((3, 0, 40), (5, 6, 4), (0, 3, 2), position_bias="keys"),
    "bias_per_query": PackCase((3, 2, 4), (5, 6, 4), position_bias="queries", is_causal=False),
    "bias_hides_keys": PackCase((3, 2, 40), (5, 6, 0), position_bias="hidden"),
    "sinks": PackCase((3, 2, 0, 40), (5, 6, 4, 0), sinks=True),
    "both_ways": PackCase((3, 2, 40, 1, 0), (5, 6, 4, 0, 2), is_causal=False),
    "encoder": PackCase((6,) * 9, (0,) * 9, spare_base=0, is_causal=False),
    "rows_first": PackCase((3, 2, 40), (5, 6, 4), layout="rows_first"),
    "every_second": PackCase((3, 2, 40), (5, 6, 4), layout="every_second"),
    "expanded": PackCase((3, 2, 4), (5, 6, 4), layout="expanded"),
    "untouched": PackCase((3, 2, 40), (5, 6, 4), factor_values="1"),
    "all_removed": PackCase((3, 2, 40), (5, 6, 4), factor_values="0"),
    "all_removed_sinks": PackCase((3, 2, 40), (5, 6, 4), factor_values="0", sinks=True),
    "everything": PackCase(
        (3, 0, 1, 45, 2), (15, 16, 4, 20, 0), (0, 9, 20, 24, 30), query_heads=6, kv_heads=2, head_dim=12, value_dim=20,
        sliding_window=11, softcap=3.0, scale=0.5, sinks=True, position_bias="heads", layout="rows_first",
    ),
}  # fmt: skip
