"""CUDA backend: the kernels of csrc/cuda, where they were built (`ATMAN_KERNELS_BUILD=cpu,cuda`).

``backend="cuda"`` takes, of the kernels that can do a call, the one that was measured to be faster. A variant after a
colon insists on one: ``"cuda:plain"`` does everything and is no fast kernel, ``"cuda:hopper"`` is written for compute
capability 9.0. No call gets here unless it asks for it by name.
"""

import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from atman_kernels.backends import native
from atman_kernels.backends.call import Backend, DenseCall, PackedCall, Result, pinned
from atman_kernels.errors import BackendUnavailableError
from atman_kernels.formula import ScoreOptions

KERNELS = ("hopper", "plain")
# Where which kernel was measured to be the fastest: (compute capability, head dimension, "packed" | "dense") -> kernel.
# Nothing has been measured yet.
MEASURED: dict[tuple[tuple[int, int], int, str], str] = {}

_TAKEN = (torch.bfloat16, torch.float16)
_VECTORS = ("query", "key", "value", "own_key", "own_value")
_ALIGNMENT = 16  # bytes: tensor maps and 16-byte loads


@cache
def _load() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        from atman_kernels import _cuda
    except ImportError as error:
        if "cannot import name" in str(error):
            return "it was not built; ATMAN_KERNELS_BUILD=cpu,cuda before pip install builds it, with CUDA's nvcc"
        return f"it cannot be loaded: {error}"
    return _cuda


@cache
def _device_problem(device: int) -> str:
    module = _load()
    return module if isinstance(module, str) else module.device_problem(device)


def unavailable_reason(device_type: str) -> str | None:
    """Why it cannot run on a device type; None if it can."""
    module = _load()
    if isinstance(module, str):
        return module
    if device_type != "cuda":
        return "it needs a CUDA device"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _device_problem(torch.cuda.current_device()) or None


def unsupported_reason(query: Tensor, value: Tensor) -> str | None:
    """What no kernel of this backend takes."""
    if query.dtype not in _TAKEN:
        return f"it takes bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    return None


def variants() -> tuple[str, ...]:
    """What can stand after ``"cuda:"`` here."""
    if isinstance(_load(), str) or not torch.cuda.is_available() or _device_problem(torch.cuda.current_device()):
        return ()
    return KERNELS if torch.cuda.get_device_capability() == (9, 0) else KERNELS[1:]


def variant(name: str) -> Backend:
    """The two ops with one kernel pinned.

    Raises:
        BackendUnavailableError: there is no such kernel, or this GPU cannot run it.
    """
    if name not in variants():
        raise BackendUnavailableError(f"backend 'cuda:{name}' cannot run here; what can: {variants() or 'nothing'}")
    return pinned(sys.modules[__name__], name)


def suppressed_attention(call: DenseCall, *, variant: str | None = None) -> Result:
    return _attend(native.dense_tensors(call), call.options, variant)


def packed_suppressed_attention(call: PackedCall, *, variant: str | None = None) -> Result:
    tensors = native.packed_tensors(call) | {"row_variant": call.row_variant.contiguous()}
    output, lse = _attend(tensors, call.options, variant)
    return output[0], lse[0] if call.options.return_lse else lse


def _attend(tensors: native.Tensors, options: ScoreOptions, kernel: str | None) -> Result:
    module = _load()
    if isinstance(module, str):
        raise BackendUnavailableError(f"backend 'cuda' cannot run: {module}")
    query, value = tensors["query"], tensors["value"]
    reason = unsupported_reason(query, value) or _device_problem(_device_index(query))
    if reason:
        raise BackendUnavailableError(f"backend 'cuda' cannot do this call: {reason}; 'triton' and 'reference' may")
    tensors |= {name: aligned(tensor) for name in _VECTORS if (tensor := tensors.get(name)) is not None}
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1] if options.return_lse else (0,), dtype=torch.float32)
    tensors |= {"output": output, "lse": lse if options.return_lse else None}
    call = native.native_call(module, tensors, options)
    kernel = kernel or _measured_kernel(module, call, query, "suffix_starts" in tensors)
    refusal = module.refusal(call, kernel)
    if refusal:
        raise BackendUnavailableError(
            f"backend 'cuda:{kernel}' cannot do this call: it {refusal}; 'cuda:plain', 'triton' and 'reference' may"
        )
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    workspace = query.new_empty(module.workspace_bytes(call, kernel, multiprocessors), dtype=torch.uint8)
    module.attend(
        call,
        kernel=kernel,
        workspace=native.describe(module, workspace),
        device=_device_index(query),
        multiprocessors=multiprocessors,
        stream=torch.cuda.current_stream(query.device).cuda_stream,
    )
    return output, lse


def _measured_kernel(module: ModuleType, call: Any, query: Tensor, packed: bool) -> str:
    capability = torch.cuda.get_device_capability(query.device)
    measured = MEASURED.get((capability, query.shape[-1], "packed" if packed else "dense"), "plain")
    return "plain" if module.refusal(call, measured) else measured


def aligned(tensor: Tensor) -> Tensor:
    """As it is if whole rows can be read from it in steps of 16 bytes, else a copy of which that is true."""
    step = _ALIGNMENT // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    if tensor.data_ptr() % _ALIGNMENT == 0 and all(stride > 0 and stride % step == 0 for stride in strides):
        return native.whole_rows(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


def _device_index(tensor: Tensor) -> int:
    return tensor.get_device()
