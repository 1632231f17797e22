"""What the compiled modules take: torch tensors and options of an op, described as numbers.

`csrc/` knows no torch: a tensor is an address, the bytes that may be read from it, a dtype, a shape and strides.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from atman_kernels.formula import ScoreOptions

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


def described(module: ModuleType, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """Each tensor as the module's `Tensor`; nothing keeps the memory alive but the tensors themselves."""
    return {name: None if tensor is None else describe(module, tensor) for name, tensor in tensors.items()}


def describe(module: ModuleType, tensor: Tensor) -> Any:
    # an empty slice may begin beyond the end of its storage
    readable = max(0, tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())
    code = dtype_code(module, tensor.dtype)
    return module.Tensor(tensor.data_ptr(), readable, code, tuple(tensor.shape), tensor.stride())


def whole_rows(tensor: Tensor) -> Tensor:
    """The kernels read whole rows: the last dimension has stride 1."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def dense_extras(
    factor: Tensor | None,  # (B, Lk) or (B, Hq, Lk)
    key_mask: Tensor | None,  # (B, Lk) bool
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|B, 1|Hq, 1|Lq, 1|Lk)
) -> dict[str, Tensor | None]:
    """The optional arguments of the dense op in the forms that the kernels read."""
    return {
        "factor": _factor(factor),
        "key_mask": None if key_mask is None else key_mask.contiguous(),
        "sinks": None if sinks is None else sinks.float().contiguous(),
        "position_bias": None if position_bias is None else whole_rows(position_bias.float()),
    }


def packed_extras(
    suffix_starts: Tensor,  # (V + 1,)
    prefix_lengths: Tensor,  # (V,)
    base_starts: Tensor,  # (V,)
    factor: Tensor | None,  # (V, K) or (V, Hq, K)
    sinks: Tensor | None,  # (Hq,)
    position_bias: Tensor | None,  # (1|Hq, 1|P, 1|P)
) -> dict[str, Tensor | None]:
    """The layout and the optional arguments of the packed op in the forms that the kernels read."""
    bias = None if position_bias is None else position_bias[None]
    extras = dense_extras(factor, None, sinks, bias)
    del extras["key_mask"]  # a pack has none
    return {
        "suffix_starts": suffix_starts.contiguous(),
        "prefix_lengths": prefix_lengths.contiguous(),
        "base_starts": base_starts.contiguous(),
        **extras,
    }


def score_arguments(options: ScoreOptions) -> dict[str, Any]:
    """What turns products into scores, in the modules' terms: 0 where there is no window or softcap."""
    return {
        "mode": options.mode,
        "is_causal": options.is_causal,
        "scale": options.scale,
        "sliding_window": options.sliding_window or 0,
        "softcap": options.softcap or 0.0,
    }


def _factor(factor: Tensor | None) -> Tensor | None:
    """(V, 1|Hq, K) float32."""
    if factor is None:
        return None
    return whole_rows((factor if factor.ndim == 3 else factor[:, None]).float())
