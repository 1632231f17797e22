"""The compiled CPU kernels: torch tensors described as numbers for `atman_kernels._C`.

One tile of query rows at a time meets one block of keys at a time: scores in float32, suppression, online softmax and
the weighted values, without a score leaving the core's cache. `csrc/README.md` says how.
"""

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from atman_kernels.backends import native
from atman_kernels.backends.call import DenseCall, Gradients, PackedCall, Result, Wanted
from atman_kernels.backends.cpu import blocked_gradients
from atman_kernels.errors import BackendUnavailableError
from atman_kernels.formula import Saved, ScoreOptions

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
    """Why there is no compiled module; None if there is one."""
    module = _load()
    return module if isinstance(module, str) else None


@cache
def instruction_sets(dtype: torch.dtype) -> tuple[str, ...]:
    """Those that can be used for a dtype here, the fastest first; empty without a compiled module."""
    module = _load()
    if isinstance(module, str) or dtype not in _FLOATS:
        return ()
    names = module.cpu_instruction_sets(native.dtype_code(module, dtype))
    return tuple(name for name in names if _computes_right(name, dtype))


def _computes_right(name: str, dtype: torch.dtype) -> bool:
    """One small call against torch's attention: this may be a kind of processor that nobody has tried it on."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    query, key, value = normal(1, 4, 37, 72), normal(1, 2, 150, 72), normal(1, 2, 150, 72)
    factor = normal(1, 150).float().abs()
    options = ScoreOptions("log_additive", False, 72**-0.5, None, None, False)
    call = DenseCall(query, key, value, factor, key_mask=None, sinks=None, position_bias=None, options=options)
    found, _ = _attend(native.dense_tensors(call), options, name)
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


def suppressed_attention(call: DenseCall, *, variant: str | None = None) -> Result:
    return _attend(native.dense_tensors(call), call.options, _chosen(call.query.dtype, variant))


def packed_suppressed_attention(call: PackedCall, *, variant: str | None = None) -> Result:
    output, lse = _attend(native.packed_tensors(call), call.options, _chosen(call.query.dtype, variant))
    return output[0], lse[0] if call.options.return_lse else lse


def _attend(tensors: native.Tensors, options: ScoreOptions, instruction_set: str) -> Result:
    module = _load()
    assert not isinstance(module, str), module
    query, value = tensors["query"], tensors["value"]
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1] if options.return_lse else (0,), dtype=torch.float32)
    tensors |= {"output": output, "lse": lse if options.return_lse else None}
    call = native.native_call(module, tensors, options)
    module.attend_cpu(call, instruction_set, torch.get_num_threads())
    return output, lse


# The module's names for the tensors of which it finds gradients.
_DENSE = {name: name for name in ("query", "key", "value", "factor")}
_PACKED = {
    "query": "query",
    "key": "own_key",
    "value": "own_value",
    "base_key": "key",
    "base_value": "value",
    "factor": "factor",
}


def suppressed_attention_backward(
    call: DenseCall, saved: Saved, wanted: Wanted, *, variant: str | None = None
) -> Gradients:
    if "position_bias" in wanted:  # as large as the scores, or sums of those across tiles: torch's products do it
        return blocked_gradients.suppressed_attention_backward(call, saved, wanted)
    return _differentiate(call, native.dense_tensors(call), _DENSE, saved, wanted, variant)


def packed_suppressed_attention_backward(
    call: PackedCall, saved: Saved, wanted: Wanted, *, variant: str | None = None
) -> Gradients:
    if "position_bias" in wanted:
        return blocked_gradients.packed_suppressed_attention_backward(call, saved, wanted)
    return _differentiate(call, native.packed_tensors(call), _PACKED, saved.as_batch(), wanted, variant)


def _differentiate(
    call: DenseCall | PackedCall,
    tensors: native.Tensors,
    names: dict[str, str],
    saved: Saved,
    wanted: Wanted,
    variant: str | None,
) -> Gradients:
    """The gradients by the call's tensors, which are `tensors` by the module's names for them."""
    instruction_set = _chosen(call.query.dtype, variant)
    module = _load()
    assert not isinstance(module, str), module
    delta = saved.delta()
    found = {}
    for name, native_name in names.items():
        tensor = tensors[native_name]
        if name in wanted and tensor is not None:
            found[name] = tensor.new_empty(tensor.shape)
    if call.query.numel() == 0:  # nothing is written then
        for place in found.values():
            place.zero_()
    elif found:
        tensors |= {"output": saved.grad_output.contiguous(), "lse": saved.lse.contiguous()}
        places = {"delta": delta.contiguous(), **{f"grad_{names[name]}": place for name, place in found.items()}}
        module.differentiate_cpu(
            native.native_call(module, tensors, call.options),
            instruction_set,
            torch.get_num_threads(),
            **native.described(module, places),
        )
    like = {name: getattr(call, name) for name in found}
    gradients = {name: place.reshape(like[name].shape).to(like[name].dtype) for name, place in found.items()}
    if "sinks" in wanted and call.sinks is not None:
        gradients["sinks"] = saved.sink_gradient(call.sinks, delta)
    return gradients
