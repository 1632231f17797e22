"""Who is measured: ours with every backend, what PyTorch offers for the same job, and what it does without factors.

A contender is given a problem and prepares a call. What only depends on the shapes and factors (bias, block mask,
repeated or joined keys) is made then, before the clock starts; the call computes (B, Hq, rows, D).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import atman_kernels as ak
from atman_kernels import backends
from atman_kernels.formula import MODES
from benchmarks.gpu import flex
from benchmarks.gpu.cases import GROUPS, Covers, DenseShape, Shape
from benchmarks.gpu.masks import dense_visible, joined, pack_visible, row_blocks
from benchmarks.gpu.problems import DenseProblem, PackProblem, Problem

Call = Callable[[], Tensor]
OUR_BACKENDS = ("triton", "cuda:hopper", "cpu")  # "cuda:plain" is there to be compared with, not to be fast
DEFAULT_MODE = MODES[0]


class Unsupported(Exception):
    """A contender cannot do what is asked; the text says why."""


@dataclass(frozen=True)
class Setting:
    """What a contender is asked for: factors none | sparse | dense, and a mode."""

    factor: str
    mode: str = DEFAULT_MODE


@dataclass(frozen=True)
class Contender:
    """One way to compute a problem.

    Attributes:
        settings: what it is measured with.
        covers: which keys its result covers; a ceiling may leave the few keys of the suffixes out.
        groups: where it takes part.
        bytes_needed: beyond the inputs, for shapes where that decides whether it can run.
        prepare: raises `Unsupported` with the reason where it cannot.
    """

    name: str
    prepare: Callable[[Problem, Setting], Call]
    settings: Callable[[Shape], Sequence[Setting]]
    covers: Covers = "everything"
    groups: tuple[str, ...] = GROUPS
    bytes_needed: Callable[[Shape, int], int] = lambda shape, element: 0
    is_ours: bool = False


# Ours -----------------------------------------------------------------------------------------------------------


def _ours(backend: str) -> Contender:
    def prepare(problem: Problem, setting: Setting) -> Call:
        reason = backends.unavailable_reason(backend, problem.query.device.type)
        if reason is not None:
            raise Unsupported(reason)
        factor = problem.factors[setting.factor]
        options: dict[str, Any] = {"mode": setting.mode, "backend": backend}
        p = problem
        if isinstance(p, DenseProblem):
            causal = p.shape.is_causal
            return lambda: ak.suppressed_attention(  # type: ignore[return-value]
                p.query, p.key, p.value, factor, is_causal=causal, **options
            )
        assert isinstance(p, PackProblem)
        inputs = (p.query, p.key, p.value, p.base_key, p.base_value, p.pack, factor)
        return lambda: ak.packed_suppressed_attention(*inputs, **options)[None]  # type: ignore[call-overload]

    return Contender(backend, prepare, _our_settings, is_ours=True)


def _our_settings(shape: Shape) -> list[Setting]:
    settings = [Setting("none"), Setting("sparse"), Setting("dense")]
    return settings + [Setting("sparse", mode) for mode in MODES[1:] if shape.all_modes]


def _suppressed(shape: Shape) -> list[Setting]:
    return [Setting("sparse")]


def _plain(shape: Shape) -> list[Setting]:
    return [Setting("none")]


# PyTorch with suppression ---------------------------------------------------------------------------------------


def _bias(problem: Problem, setting: Setting) -> Tensor:
    """(B, 1, rows, keys) ln c where a row sees a key, -inf elsewhere, in the query's dtype."""
    factor, dtype = problem.factors[setting.factor], problem.query.dtype
    assert factor is not None
    log_factor = factor.log().to(dtype)
    if isinstance(problem, DenseProblem):
        bias = log_factor[:, None, None].repeat(1, 1, problem.shape.queries, 1)
        for rows, visible in row_blocks(problem.shape.queries, dense_visible(problem), problem.shape.keys):
            bias[:, :, rows].masked_fill_(~visible, -torch.inf)
        return bias
    pack, base = problem.pack, problem.shape.base
    keys = base + problem.shape.rows
    bias = torch.empty(1, 1, problem.shape.rows, keys, dtype=dtype, device=log_factor.device)
    for rows, visible in row_blocks(problem.shape.rows, pack_visible(problem), keys):
        own = log_factor[pack.row_variant[rows].long()]  # [block, K]
        bias[0, 0, rows, :base] = own[:, :base]
        bias[0, 0, rows, base:] = own[:, pack.row_position]
        bias[0, 0, rows].masked_fill_(~visible, -torch.inf)
    return bias


def _tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as (B, H, ·, D); of a pack base and own keys side by side."""
    if isinstance(problem, DenseProblem):
        return problem.query, problem.key, problem.value
    key, value = joined(problem)
    return problem.query[None], key[None], value[None]


def _sdpa_bias(problem: Problem, setting: Setting) -> Call:
    """One call over all rows and all keys, with a float bias; whichever fused kernel takes it."""
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return _sdpa(fused, *_tensors(problem), attn_mask=_bias(problem, setting))


def _eager(problem: Problem, setting: Setting) -> Call:
    """Every score in memory."""
    query, key, value = _tensors(problem)
    group, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    bias = _bias(problem, setting)

    def attend() -> Tensor:
        scores = (query @ key.mT).mul_(scale).add_(bias)
        return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value

    return attend


def _bias_bytes(shape: Shape, element: int) -> int:
    """The bias, and what it takes to make it."""
    return shape.rows * _columns(shape) * 2 * element + _repeated_bytes(shape, element)


def _score_bytes(shape: Shape, element: int) -> int:
    """Scores in the dtype, weights in float32 and in the dtype."""
    return _bias_bytes(shape, element) + shape.heads.query * shape.rows * _columns(shape) * (4 + 2 * element)


def _repeated_bytes(shape: Shape, element: int) -> int:
    heads = shape.heads
    keys = shape.batch * shape.keys if isinstance(shape, DenseShape) else shape.base + shape.rows
    return 2 * keys * (heads.kv + heads.query) * heads.dim * element


def _columns(shape: Shape) -> int:
    return shape.keys if isinstance(shape, DenseShape) else shape.base + shape.rows


def _flex(problem: Problem, setting: Setting) -> Call:
    factor = problem.factors[setting.factor]
    assert factor is not None
    if isinstance(problem, DenseProblem):
        return flex.dense(problem, factor)
    if problem.shape.group == "shared":
        if flex.compiles and factor.device.type == "cpu":
            raise Unsupported("compiled for the CPU, FlexAttention gives no log-sum-exp")
        return flex.shared_prefix(problem, factor)
    return flex.pack(problem, factor)


# PyTorch without suppression: ceilings --------------------------------------------------------------------------


def _without_factors(backend: SDPBackend) -> Callable[[Problem, Setting], Call]:
    """Plain attention by one of PyTorch's kernels; over a shared prefix all rows of all variants at once."""

    def prepare(problem: Problem, setting: Setting) -> Call:
        if isinstance(problem, DenseProblem):
            causal = problem.shape.is_causal and problem.shape.queries > 1
            return _sdpa([backend], problem.query, problem.key, problem.value, is_causal=causal)
        return _sdpa([backend], problem.query[None], problem.base_key[None], problem.base_value[None])

    return prepare


def _flash_varlen(problem: Problem, setting: Setting) -> Call:
    """FlashAttention over sequences of different lengths, each variant with a copy of its prefix."""
    assert isinstance(problem, PackProblem)
    shape, device = problem.shape, problem.query.device
    if device.type != "cuda":
        raise Unsupported("PyTorch has FlashAttention for sequences of different lengths on CUDA devices only")
    starts = problem.pack.suffix_starts.tolist()
    columns = torch.cat(
        [
            torch.cat([torch.arange(prefix), torch.arange(shape.base + start, shape.base + start + suffix)])
            for start, suffix, prefix in zip(starts, shape.suffixes, shape.prefixes, strict=False)
        ]
    ).to(device)
    key, value = (tensor.transpose(0, 1)[columns] for tensor in joined(problem))  # [sum of lengths, Hkv, D]
    query = problem.query.transpose(0, 1)
    lengths = problem.pack.prefix_lengths + problem.pack.suffix_starts.diff()
    key_starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    arguments = (key, value, problem.pack.suffix_starts, key_starts, max(shape.suffixes), shape.longest)

    def attend() -> Tensor:
        output = torch.ops.aten._flash_attention_forward(query, *arguments, 0.0, True, False)[0]
        return output.transpose(0, 1)[None]

    return attend


def _varlen_bytes(shape: Shape, element: int) -> int:
    assert not isinstance(shape, DenseShape)
    lengths = sum(shape.suffixes) + sum(shape.prefixes)
    return 3 * lengths * shape.heads.kv * shape.heads.dim * element


@dataclass(frozen=True, eq=False)
class SdpaCall:
    """SDPA with one of some kernels."""

    kernels: list[SDPBackend]
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    repeated: bool  # whether KV heads were repeated for it, which makes keys and values larger

    def __call__(self) -> Tensor:
        with sdpa_kernel(self.kernels):
            return scaled_dot_product_attention(self.query, self.key, self.value, **self.options)


def _sdpa(kernels: list[SDPBackend], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Call:
    """A call of SDPA with one of some kernels; KV heads are repeated beforehand where the kernel cannot share them."""
    reasons: list[str] = []
    group = query.shape[1] // key.shape[1]
    for shares in (True, False):
        if not shares:
            key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
        attend = SdpaCall(
            kernels, query, key, value, options | {"enable_gqa": shares}, repeated=not shares and group > 1
        )
        with warnings.catch_warnings(record=True) as said:  # why each kernel was not used
            warnings.simplefilter("always")
            try:
                attend()
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reasons = [str(error).splitlines()[0], *(str(w.message).split(" (Triggered")[0] for w in said)]
                continue
        return attend
    raise Unsupported("; ".join(dict.fromkeys(reasons)))


_CEILINGS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        *(_ours(backend) for backend in OUR_BACKENDS),
        Contender("flex", _flex, _suppressed),
        Contender("sdpa_bias", _sdpa_bias, _suppressed, bytes_needed=_bias_bytes),
        *(
            Contender(name, _without_factors(kernel), _plain, groups=("prefill", "decode"))
            for name, kernel in _CEILINGS.items()
        ),
        *(
            Contender(f"{name}_prefix", _without_factors(kernel), _plain, covers="prefix", groups=("shared",))
            for name, kernel in _CEILINGS.items()
        ),
        Contender("flash_varlen", _flash_varlen, _plain, groups=("packs",), bytes_needed=_varlen_bytes),
        Contender("eager", _eager, _suppressed, bytes_needed=_score_bytes),
    )
}
