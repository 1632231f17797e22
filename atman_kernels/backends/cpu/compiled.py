"""The compiled CPU kernels: torch tensors described as numbers for `atman_kernels._C`.

One tile of query rows at a time meets one block of keys at a time: scores in float32, suppression, online softmax and
the weighted values, without a score leaving the core's cache. `csrc/README.md` says how.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from atman_kernels.backends.cpu import blocked_gradients
from atman_kernels.errors import BackendUnavailableError
from atman_kernels.formula import Saved, ScoreOptions
from atman_kernels.native import dense_extras, described, dtype_code, packed_extras, score_arguments, whole_rows

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _load() -> ModuleType | str:
    """The compiled module, or why there is none. torch is imported above: its OpenMP runtime serves the module."""
    try:
        from atman_kernels import _C
    except ImportError as error:
        if error.name == "atman_kernels" or "cannot import name" in str(error):
            return (
                "it was not built, since no C++17 compiler (g++ or clang++) worked when the package was installed; "
                "ATMAN_KERNELS_BUILD=cpu before pip install shows what stands in the way"
            )
        return f"it cannot be loaded: {error}"
    return _C


def unavailable_reason() -> str | None:
    module = _load()
    return module if isinstance(module, str) else None


@cache
def instruction_sets(dtype: torch.dtype) -> tuple[str, ...]:
    """Those that can be used for a dtype here, the fastest first; empty without a compiled module."""
    module = _load()
    if isinstance(module, str) or dtype not in _FLOATS:
        return ()
    names = module.cpu_instruction_sets(dtype_code(module, dtype))
    return tuple(name for name in names if _computes_right(name, dtype))


def _computes_right(name: str, dtype: torch.dtype) -> bool:
    """One small call against torch's attention: this may be a kind of processor that nobody has tried it on."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    query, key, value = normal(1, 4, 37, 72), normal(1, 2, 150, 72), normal(1, 2, 150, 72)
    factor = normal(1, 150).float().abs()
    options = ScoreOptions("log_additive", False, 72**-0.5, None, None, False)
    found, _ = _attend(query, key, value, {"factor": factor[:, None]}, options, name)
    wide_key, wide_value = (x.float().repeat_interleave(2, dim=1) for x in (key, value))
    mask = factor.log()[:, None, None]
    expected = scaled_dot_product_attention(query.float(), wide_key, wide_value, attn_mask=mask)
    error = (found.float() - expected).abs().max().item()
    if error < (1e-4 if dtype == torch.float32 else 2e-2):  # NaN is not
        return True
    warnings.warn(
        f"the compiled CPU kernel for {name} is off by {error:.2g} in {dtype} on this processor and is not used; "
        "please report it with the output of `atman doctor`",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _chosen(dtype: torch.dtype, instruction_set: str | None) -> str:
    """The instruction set to use: the one asked for, or the fastest.

    Raises:
        BackendUnavailableError: there is no module, or it cannot do that.
    """
    usable = instruction_sets(dtype)
    if isinstance(module := _load(), str):
        raise BackendUnavailableError(f"the compiled CPU module cannot run: {module}")
    if not usable or instruction_set not in (None, *usable):
        takers = ", ".join((*usable, "torch"))
        raise BackendUnavailableError(f"backend 'cpu:{instruction_set}' does not take {dtype}; those that do: {takers}")
    return instruction_set or usable[0]


@dataclass(frozen=True)
class Pinned:
    """The two ops on one instruction set."""

    instruction_set: str

    def suppressed_attention(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return suppressed_attention(*arguments, instruction_set=self.instruction_set)

    def packed_suppressed_attention(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return packed_suppressed_attention(*arguments, instruction_set=self.instruction_set)

    def suppressed_attention_backward(self, *arguments: Any, **saved: Any) -> list[Tensor | None]:
        return suppressed_attention_backward(*arguments, **saved, instruction_set=self.instruction_set)

    def packed_suppressed_attention_backward(self, *arguments: Any, **saved: Any) -> list[Tensor | None]:
        return packed_suppressed_attention_backward(*arguments, **saved, instruction_set=self.instruction_set)


def suppressed_attention(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (1|B, Hkv, Lk, D)
    value: Tensor,  # (1|B, Hkv, Lk, Dv)
    factor: Tensor | None,  # (B, Lk) or (B, Hq, Lk)
    key_mask: Tensor | None,  # (B, Lk) bool
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|B, 1|Hq, 1|Lq, 1|Lk)
    options: ScoreOptions,
    *,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    extras = dense_extras(factor, key_mask, sinks, position_bias)
    return _attend(query, key, value, extras, options, _chosen(query.dtype, instruction_set))


def packed_suppressed_attention(
    query: Tensor,  # (Hq, T, D)
    key: Tensor,  # (Hkv, T, D)
    value: Tensor,  # (Hkv, T, Dv)
    base_key: Tensor,  # (Hkv, S, D)
    base_value: Tensor,  # (Hkv, S, Dv)
    suffix_starts: Tensor,  # (V + 1,)
    prefix_lengths: Tensor,  # (V,)
    base_starts: Tensor,  # (V,)
    row_variant: Tensor,  # (T,)
    row_position: Tensor,  # (T,)
    factor: Tensor | None,  # (V, K) or (V, Hq, K)
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|Hq, 1|P, 1|P)
    options: ScoreOptions,
    *,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    extras = packed_extras(suffix_starts, prefix_lengths, base_starts, factor, sinks, position_bias)
    extras |= {"own_key": whole_rows(key), "own_value": whole_rows(value)}
    chosen = _chosen(query.dtype, instruction_set)
    output, lse = _attend(query[None], base_key[None], base_value[None], extras, options, chosen)
    return output[0], lse[0] if options.return_lse else lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: dict[str, Tensor | None],
    options: ScoreOptions,
    instruction_set: str,
) -> tuple[Tensor, Tensor]:
    module = _load()
    assert not isinstance(module, str), module
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1] if options.return_lse else (0,), dtype=torch.float32)
    tensors = {
        "query": whole_rows(query),
        "key": whole_rows(key),
        "value": whole_rows(value),
        "output": output,
        **extras,
    }
    tensors["lse"] = lse if options.return_lse else None
    module.attend_cpu(
        **described(module, tensors),
        **score_arguments(options),
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
    )
    return output, lse


def suppressed_attention_backward(
    query: Tensor,  # (B, Hq, Lq, D)
    key: Tensor,  # (1|B, Hkv, Lk, D)
    value: Tensor,  # (1|B, Hkv, Lk, Dv)
    factor: Tensor | None,  # (B, Lk) or (B, Hq, Lk)
    key_mask: Tensor | None,  # (B, Lk) bool
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|B, 1|Hq, 1|Lq, 1|Lk)
    *,
    options: ScoreOptions,
    saved: Saved,
    wanted: tuple[bool, ...],
    instruction_set: str | None = None,
) -> list[Tensor | None]:
    tensors = (query, key, value, factor, key_mask, sinks, position_bias)
    if wanted[-1]:  # a gradient as large as the scores, or sums of those across tiles: torch's products do it
        return blocked_gradients.suppressed_attention_backward(*tensors, options=options, saved=saved, wanted=wanted)
    extras = dense_extras(factor, key_mask, sinks, position_bias)
    places = _places({"grad_query": query, "grad_key": key, "grad_value": value}, wanted)
    d_factor, d_sinks = _differentiate(
        query, key, value, extras, places, factor if wanted[3] else None, sinks if wanted[5] else None, options, saved,
        _chosen(query.dtype, instruction_set),
    )  # fmt: skip
    return [*places.values(), d_factor, None, d_sinks, None]


def packed_suppressed_attention_backward(
    query: Tensor,  # (Hq, T, D)
    key: Tensor,  # (Hkv, T, D)
    value: Tensor,  # (Hkv, T, Dv)
    base_key: Tensor,  # (Hkv, S, D)
    base_value: Tensor,  # (Hkv, S, Dv)
    suffix_starts: Tensor,  # (V + 1,)
    prefix_lengths: Tensor,  # (V,)
    base_starts: Tensor,  # (V,)
    row_variant: Tensor,  # (T,)
    row_position: Tensor,  # (T,)
    factor: Tensor | None,  # (V, K) or (V, Hq, K)
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|Hq, 1|P, 1|P)
    *,
    options: ScoreOptions,
    saved: Saved,
    wanted: tuple[bool, ...],
    instruction_set: str | None = None,
) -> list[Tensor | None]:
    layout = (suffix_starts, prefix_lengths, base_starts)
    if wanted[-1]:
        tensors = (
            query,
            key,
            value,
            base_key,
            base_value,
            *layout,
            row_variant,
            row_position,
            factor,
            sinks,
            position_bias,
        )
        return blocked_gradients.packed_suppressed_attention_backward(
            *tensors, options=options, saved=saved, wanted=wanted
        )
    extras = packed_extras(*layout, factor, sinks, position_bias)
    extras |= {"own_key": whole_rows(key), "own_value": whole_rows(value)}
    batched = (query[None], base_key[None], base_value[None])
    names = {"grad_query": batched[0], "grad_own_key": key, "grad_own_value": value,
             "grad_key": batched[1], "grad_value": batched[2]}  # fmt: skip
    places = _places(names, wanted)
    as_batch = Saved(saved.output[None], saved.lse[None], saved.grad_output[None],
                     None if saved.grad_lse is None else saved.grad_lse[None])  # fmt: skip
    d_factor, d_sinks = _differentiate(
        *batched, extras, places, factor if wanted[10] else None, sinks if wanted[11] else None, options, as_batch,
        _chosen(query.dtype, instruction_set),
    )  # fmt: skip
    d_query, d_key, d_value, d_base_key, d_base_value = places.values()
    own = [None if x is None else x[0] for x in (d_query, d_base_key, d_base_value)]
    return [own[0], d_key, d_value, own[1], own[2], *(None,) * 5, d_factor, d_sinks, None]


def _places(tensors: dict[str, Tensor], wanted: tuple[bool, ...]) -> dict[str, Tensor | None]:
    """Room for what is wanted of the first gradients."""
    needs = zip(tensors.items(), wanted, strict=False)
    return {name: x.new_empty(x.shape) if need else None for (name, x), need in needs}


def _differentiate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: dict[str, Tensor | None],
    places: dict[str, Tensor | None],  # written
    factor: Tensor | None,
    sinks: Tensor | None,
    options: ScoreOptions,
    saved: Saved,
    instruction_set: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills the places; returns the gradients by the factors and the sinks that are passed."""
    module = _load()
    assert not isinstance(module, str), module
    delta = saved.delta()
    d_sinks = None if sinks is None else saved.sink_gradient(sinks, delta)
    d_factor = None
    if factor is not None and extras["factor"] is not None:
        d_factor = query.new_empty(extras["factor"].shape, dtype=torch.float32)
    if query.numel() == 0:  # nothing is written then
        for place in (*places.values(), d_factor):
            if place is not None:
                place.zero_()
    elif d_factor is not None or any(x is not None for x in places.values()):
        tensors = {
            "query": whole_rows(query),
            "key": whole_rows(key),
            "value": whole_rows(value),
            "grad_output": saved.grad_output.contiguous(),
            "lse": saved.lse.contiguous(),
            "delta": delta.contiguous(),
            "grad_factor": d_factor,
            **places,
            **extras,
        }
        module.differentiate_cpu(
            **described(module, tensors),
            **score_arguments(options),
            instruction_set=instruction_set,
            threads=torch.get_num_threads(),
        )
    return None if d_factor is None or factor is None else d_factor.reshape(factor.shape).to(factor.dtype), d_sinks
