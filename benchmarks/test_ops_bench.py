"""The two ops against PyTorch's own attention, shape by shape: `pytest benchmarks --benchmark-only`.

Every contender is held against the reference backend on the very tensors it is timed on. What the others need is
prepared for them before the clock starts: the bias or block mask, base and own keys side by side, KV heads repeated.
Beside each time stands the rate of a plain matrix product of the same dtype, on the same threads, just before.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import atman_kernels as ak

LAYOUTS = {"smollm2": (9, 3, 64), "llama": (32, 8, 128)}  # query heads, KV heads, head dim
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FACTOR = 0.1


@dataclass(frozen=True)
class Shape:
    """Suffix and prefix lengths of a pack's variants; the first key of each suffix, or of the base, is suppressed."""

    suffixes: tuple[int, ...]
    prefixes: tuple[int, ...]

    @property
    def shared(self) -> bool:
        return len(set(self.prefixes)) == 1


def _exact(length: int, step: int) -> Shape:
    """Every `step`-th token of a sequence suppressed: the suffix begins there."""
    starts = tuple(range(step // 2, length, step))
    return Shape(tuple(length - start for start in starts), starts)


def _shared(prefix: int, variants: int, rows: int) -> Shape:
    return Shape((rows,) * variants, (prefix,) * variants)


PACKS = {
    "exact_512": _exact(512, 64),  # 8 variants, about 2000 rows
    "exact_2048": _exact(2048, 1024),  # 2 long suffixes, about 2000 rows
    "shared_512_256x1": _shared(512, 256, 1),
    "shared_512_64x8": _shared(512, 64, 8),
    "shared_2048_16x64": _shared(2048, 16, 64),
    "shared_2048_256x1": _shared(2048, 256, 1),
    "shared_8192_1024x1": _shared(8192, 1024, 1),
    "shared_8192_16x8": _shared(8192, 16, 8),
}
DENSE = {"dense_4x256": (4, 256), "dense_1x1024": (1, 1024)}  # batch, length
MOST_SCORES = 1 << 28  # a contender that holds more of them at once is skipped


@dataclass(frozen=True, eq=False)
class PackedCase:
    """Everything that a packed contender may use; keys and values (Hkv, S + T, ·) hold base and own side by side."""

    query: Tensor  # (Hq, T, D)
    key: Tensor
    value: Tensor
    base: int  # S
    pack: ak.VariantPack
    factor: Tensor  # (V, K)

    def ours(self, backend: str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        query, key, value = (tensor.to(dtype) for tensor in (self.query, self.key, self.value))
        own, base = slice(self.base, None), slice(0, self.base)
        return ak.packed_suppressed_attention(  # type: ignore[return-value]
            query, key[:, own], value[:, own], key[:, base], value[:, base], self.pack, self.factor, backend=backend
        )

    def bias(self) -> Tensor:
        """(T, S + T): ln c where a row sees a key, -inf elsewhere."""
        rows, positions = self.pack.row_variant.long(), self.pack.row_position
        columns = torch.arange(self.base)
        prefix = columns < self.pack.prefix_lengths[rows, None]  # (T, S)
        own = (rows[:, None] == rows) & (positions[:, None] >= positions)  # (T, T)
        log_factor = self.factor.log()[rows]  # (T, K)
        values = torch.cat([log_factor[:, : self.base], log_factor[:, positions]], dim=1)
        return values.masked_fill(~torch.cat([prefix, own], dim=1), -math.inf).to(self.query.dtype)

    @property
    def flops(self) -> int:
        visible = int((self.pack.row_position + 1).sum())
        return 4 * self.query.shape[0] * self.query.shape[2] * visible


def _packed_case(shape: Shape, layout: str, dtype: torch.dtype) -> PackedCase:
    q_heads, kv_heads, head_dim = LAYOUTS[layout]
    pack = ak.VariantPack.build(shape.suffixes, shape.prefixes)
    generator = torch.Generator().manual_seed(0)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    keys = max(shape.prefixes) + pack.num_rows
    factor = torch.ones(pack.num_variants, pack.longest)
    variants = torch.arange(pack.num_variants)
    factor[variants, variants if shape.shared else torch.tensor(shape.prefixes)] = FACTOR
    return PackedCase(
        noise(q_heads, pack.num_rows, head_dim),
        noise(kv_heads, keys, head_dim),
        noise(kv_heads, keys, head_dim),
        max(shape.prefixes),
        pack,
        factor,
    )


# Contenders: case -> a function that computes (Hq, T, D) ---------------------------------------------------------


def _ours(case: PackedCase, backend: str | None = None) -> Callable[[], Tensor]:
    own, base = slice(case.base, None), slice(0, case.base)
    key, value = case.key[:, own].contiguous(), case.value[:, own].contiguous()
    base_key, base_value = case.key[:, base].contiguous(), case.value[:, base].contiguous()
    return lambda: ak.packed_suppressed_attention(  # type: ignore[return-value]
        case.query, key, value, base_key, base_value, case.pack, case.factor, backend=backend
    )


def _repeated(case: PackedCase) -> tuple[Tensor, Tensor]:
    groups = case.query.shape[0] // case.key.shape[0]
    return case.key.repeat_interleave(groups, dim=0), case.value.repeat_interleave(groups, dim=0)


def _ours_torch(case: PackedCase) -> Callable[[], Tensor]:
    """Our implementation made of torch's products, which serves where the compiled module was not built."""
    return _ours(case, "cpu:torch")


def _sdpa_bias(case: PackedCase) -> Callable[[], Tensor]:
    """One call over all rows and all keys."""
    (key, value), bias = _repeated(case), case.bias()
    return lambda: scaled_dot_product_attention(case.query[None], key[None], value[None], attn_mask=bias)[0]


def _as_batch(case: PackedCase) -> tuple[Tensor, Tensor, Tensor]:
    """Query (V, Hq, r, D), the keys (V, S + r) that each variant has, and a bias (V, 1, r, S + r)."""
    if len(case.pack.prefix_lengths.unique()) > 1:
        pytest.skip("the suffixes differ in length")
    bias, variants = case.bias(), case.pack.num_variants
    rows = case.pack.num_rows // variants
    columns = torch.cat(
        [torch.arange(case.base).expand(variants, -1), case.base + torch.arange(case.pack.num_rows).view(variants, -1)],
        dim=1,
    )
    query = case.query.unflatten(1, (variants, rows)).transpose(0, 1).contiguous()
    return query, columns, torch.stack([bias[v * rows : (v + 1) * rows, columns[v]] for v in range(variants)])[:, None]


def _sdpa_batch(case: PackedCase) -> Callable[[], Tensor]:
    """One call for all variants of equal length, the prefix repeated for each."""
    query, columns, bias = _as_batch(case)
    keys, values = (x[:, columns].transpose(0, 1).contiguous() for x in _repeated(case))
    return lambda: scaled_dot_product_attention(query, keys, values, attn_mask=bias).transpose(0, 1).flatten(1, 2)


def _eager_batch(case: PackedCase) -> Callable[[], Tensor]:
    """transformers' own eager attention, as a model with a K/V cache per variant calls it."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    query, columns, bias = _as_batch(case)
    keys, values = (x[:, columns].transpose(0, 1).contiguous() for x in (case.key, case.value))
    module: Any = torch.nn.Module().eval()
    module.num_key_value_groups = case.query.shape[0] // case.key.shape[0]
    scale = case.query.shape[-1] ** -0.5

    def attend() -> Tensor:
        output, _ = eager_attention_forward(module, query, keys, values, bias, scale)  # (V, r, Hq, D)
        return output.permute(2, 0, 1, 3).flatten(1, 2)

    return attend


def _sdpa_each(case: PackedCase) -> Callable[[], Tensor]:
    """One call per variant, over its own prefix and suffix."""
    (key, value), bias = _repeated(case), case.bias()
    calls = []
    for variant in range(case.pack.num_variants):
        first, last = case.pack.suffix_starts[variant : variant + 2].tolist()
        prefix = int(case.pack.prefix_lengths[variant])
        columns = torch.cat([torch.arange(prefix), torch.arange(case.base + first, case.base + last)])
        query = case.query[None, :, first:last]
        calls.append((query, key[None, :, columns], value[None, :, columns], bias[first:last, columns].contiguous()))
    return lambda: torch.cat([scaled_dot_product_attention(q, k, v, attn_mask=b)[0] for q, k, v, b in calls], dim=1)


def _eager(case: PackedCase) -> Callable[[], Tensor]:
    """One product of all rows and all keys, the prefix once for all variants: eager attention at its best."""
    (key, value), bias = _repeated(case), case.bias()
    scale = case.query.shape[-1] ** -0.5

    def attend() -> Tensor:
        scores = case.query @ key.mT * scale + bias
        return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value

    return attend


def _flex(case: PackedCase) -> Callable[[], Tensor]:
    """FlexAttention with the factors captured by its score function, the pack's visibility as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, positions, base = case.pack.row_variant.long(), case.pack.row_position, case.base
    prefixes, log_factor = case.pack.prefix_lengths, case.factor.log()
    key_variant = torch.cat([torch.full((base,), -1), rows])
    key_position = torch.cat([torch.arange(base), positions])

    def sees(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (key_variant[k] == rows[q]) & (key_position[k] <= positions[q])
        return own | ((k < base) & (key_position[k] < prefixes[rows[q]]))

    def suppressed(score: Tensor, _b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + log_factor[rows[q], key_position[k]]

    mask = create_block_mask(sees, None, None, len(rows), len(key_position), device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(
        case.query[None], case.key[None], case.value[None], score_mod=suppressed, block_mask=mask, enable_gqa=True
    )[0]


PACKED = {
    "ours": _ours,
    "ours_torch": _ours_torch,
    "sdpa_bias": _sdpa_bias,
    "sdpa_batch": _sdpa_batch,
    "sdpa_each": _sdpa_each,
    "eager": _eager,
    "eager_batch": _eager_batch,
}


def _scores_held(case: PackedCase, contender: str) -> int:
    """Scores, or numbers of the same count, that a contender keeps in memory at once."""
    heads, rows, keys = case.query.shape[0], case.pack.num_rows, case.key.shape[1]
    copies = case.pack.num_variants * (case.base + rows // case.pack.num_variants) * heads * case.query.shape[2]
    held = {"eager": heads * rows * keys, "sdpa_bias": rows * keys, "sdpa_batch": 2 * copies, "sdpa_each": 2 * copies}
    return (held | {"eager_batch": 2 * copies}).get(contender, 0)


@lru_cache(maxsize=1)
def _product_rate(group: str, dtype: torch.dtype, head_dim: int, seconds: float = 0.2) -> dict[str, float]:
    """GFLOP/s of a square product, and of one of a tile's shape: 96 rows against 512 keys. Once per group."""
    rates = {}
    for name, (m, k, n) in {"product": (1024, 1024, 1024), "tile_product": (96, head_dim, 512)}.items():
        left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        best, start = math.inf, time.perf_counter()
        while time.perf_counter() - start < seconds:
            begin = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - begin)
        rates[f"{name}_gflops_per_second"] = 2 * m * k * n / best / 1e9
    return rates


# Benchmarks -----------------------------------------------------------------------------------------------------


def _run(
    benchmark: Any, group: str, contender: Callable[[], Tensor], reference: Tensor, flops: int, head_dim: int
) -> None:
    with torch.inference_mode():
        output = contender()
        benchmark.extra_info.update(_product_rate(group, output.dtype, head_dim))
        tolerance = TOLERANCE[output.dtype]
        torch.testing.assert_close(output.double(), reference, atol=tolerance, rtol=tolerance)
        benchmark.group = group
        benchmark(contender)
    benchmark.extra_info["gflops_per_second"] = flops / benchmark.stats.stats.median / 1e9 if benchmark.stats else None
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__


@lru_cache(maxsize=1)
def _prepared(shape: str, layout: str, dtype: str) -> tuple[PackedCase, Tensor]:
    """The case, and its truth."""
    case = _packed_case(PACKS[shape], layout, DTYPES[dtype])
    return case, case.ours("reference", torch.float64)


@pytest.mark.parametrize("contender", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", PACKS)
def test_packed(benchmark: Any, shape: str, layout: str, dtype: str, contender: str) -> None:
    case, reference = _prepared(shape, layout, dtype)
    if (held := _scores_held(case, contender)) > MOST_SCORES:
        pytest.skip(f"{contender} would hold {held / 1e9:.1f} billion numbers")
    attend = PACKED[contender](case)
    _run(benchmark, f"{shape} {layout} {dtype}", attend, reference, case.flops, case.query.shape[2])


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling FlexAttention for the CPU needs g++")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["shared_512_64x8", "exact_512"])
def test_packed_flex(benchmark: Any, shape: str, layout: str) -> None:
    """In float32 alone: each shape compiles for many seconds."""
    case, reference = _prepared(shape, layout, "float32")
    with torch.inference_mode():
        contender = _flex(case)
    _run(benchmark, f"{shape} {layout} float32", contender, reference, case.flops, case.query.shape[2])


@pytest.mark.parametrize("contender", ["ours", "ours_torch", "sdpa_bias", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", DENSE)
def test_dense(benchmark: Any, shape: str, layout: str, dtype: str, contender: str) -> None:
    (batch, length), (q_heads, kv_heads, head_dim) = DENSE[shape], LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, heads, length, head_dim, generator=generator).to(DTYPES[dtype])
        for heads in (q_heads, kv_heads, kv_heads)
    )
    factor = torch.ones(batch, length)
    factor[torch.arange(batch), torch.arange(batch) * length // batch] = FACTOR
    reference = ak.suppressed_attention(
        query.double(), key.double(), value.double(), factor, is_causal=True, backend="reference"
    )
    wide_key, wide_value = (tensor.repeat_interleave(q_heads // kv_heads, dim=1) for tensor in (key, value))
    causal = torch.full((length, length), -math.inf).triu(1)
    bias = (causal + factor.log()[:, None, None, :]).to(query.dtype)  # (B, 1, L, L)

    def eager() -> Tensor:
        scores = query @ wide_key.mT * head_dim**-0.5 + bias
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ wide_value

    attend: dict[str, Callable[[], Any]] = {
        "ours": lambda: ak.suppressed_attention(query, key, value, factor, is_causal=True),
        "ours_torch": lambda: ak.suppressed_attention(query, key, value, factor, is_causal=True, backend="cpu:torch"),
        "sdpa_bias": lambda: scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=bias),
        "eager": eager,
    }
    flops = 4 * batch * q_heads * head_dim * length * (length + 1) // 2
    assert isinstance(reference, Tensor)
    _run(benchmark, f"{shape} {layout} {dtype}", attend[contender], reference, flops, head_dim)
