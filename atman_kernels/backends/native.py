"""What the compiled modules take: torch tensors and options of an op, described as numbers.

`csrc/` knows no torch: a tensor is an address, the bytes that may be read from it, a dtype, a shape and strides.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from atman_kernels.backends.call import DenseCall, PackedCall
from atman_kernels.formula import ScoreOptions

Tensors = dict[str, Any]  # by the modules' names for them; None for one that a call does without

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int32: "int32",
    torch.bool: "bool",
    torch.uint8: "bool",  # one byte
}


def dtype_code(module: ModuleType, dtype: torch.dtype) -> Any:
    """A dtype as the module knows it."""
    return module.DTYPES[_DTYPES[dtype]]


def described(module: ModuleType, tensors: Tensors) -> dict[str, Any]:
    """Each tensor as the module's `Tensor`; nothing keeps the memory alive but the tensors themselves."""
    return {name: None if tensor is None else describe(module, tensor) for name, tensor in tensors.items()}


def describe(module: ModuleType, tensor: Tensor) -> Any:
    """A tensor as the module's `Tensor`: address, readable bytes, dtype code, shape, and strides in elements."""
    # an empty slice may begin beyond the end of its storage
    readable = max(0, tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())
    code = dtype_code(module, tensor.dtype)
    return module.Tensor(tensor.data_ptr(), readable, code, tuple(tensor.shape), tensor.stride())


def whole_rows(tensor: Tensor) -> Tensor:
    """The kernels read whole rows: the last dimension has stride 1."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def dense_tensors(call: DenseCall) -> Tensors:
    """The tensors of a call in the forms that the kernels read."""
    return {
        "query": whole_rows(call.query),
        "key": whole_rows(call.key),
        "value": whole_rows(call.value),
        "factor": _factor(call.factor),
        "key_mask": None if call.key_mask is None else call.key_mask.contiguous(),
        "sinks": _sinks(call.sinks),
        "position_bias": None if call.position_bias is None else whole_rows(call.position_bias.float()),
    }


def packed_tensors(call: PackedCall) -> Tensors:
    """The tensors of a call in the forms that the kernels read: a batch of one, whose keys are the base's."""
    return {
        "query": whole_rows(call.query[None]),
        "key": whole_rows(call.base_key[None]),
        "value": whole_rows(call.base_value[None]),
        "own_key": whole_rows(call.key),
        "own_value": whole_rows(call.value),
        "suffix_starts": call.suffix_starts.contiguous(),
        "prefix_lengths": call.prefix_lengths.contiguous(),
        "base_starts": call.base_starts.contiguous(),
        "factor": _factor(call.factor),
        "sinks": _sinks(call.sinks),
        "position_bias": None if call.position_bias is None else whole_rows(call.position_bias[None].float()),
    }


def native_call(module: ModuleType, tensors: Tensors, options: ScoreOptions) -> Any:
    """The module's `Call`, for which there is no window or softcap where they are 0; it keeps no tensor alive."""
    return module.Call(
        **described(module, tensors),
        mode=options.mode,
        is_causal=options.is_causal,
        scale=options.scale,
        sliding_window=options.sliding_window or 0,
        softcap=options.softcap or 0.0,
    )


def _factor(factor: Tensor | None) -> Tensor | None:
    """(V, 1|Hq, K) float32."""
    if factor is None:
        return None
    return whole_rows((factor if factor.ndim == 3 else factor[:, None]).float())


def _sinks(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else sinks.float().contiguous()
