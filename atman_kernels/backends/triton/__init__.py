"""Triton backend: kernels for NVIDIA GPUs of compute capability 8.0 and newer, and for Triton's interpreter.

`forward`, `backward_queries`, `backward_keys` and `backward_broadcast` are the kernels, `primitives` and
`backward_steps` are what they are made of. `launch`, and for gradients `launch_backward` after `plan_backward`, get
tensors into them, `configs` says in which tiles.
Triton itself is imported when a call comes.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atman_kernels.backends.call import DenseCall, Gradients, PackedCall, Result, Wanted
from atman_kernels.formula import Saved

if TYPE_CHECKING:
    from atman_kernels.backends.triton.launch import Extras, Layout

LEAST_CAPABILITY = (8, 0)
LARGEST_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason(device_type: str) -> str | None:
    """Why it cannot run on a device type; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'atman-kernels[triton]'"
    if _interpreting():
        return None
    if device_type != "cuda":
        return "it needs a CUDA device; TRITON_INTERPRET=1 in the environment tries it on a CPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; TRITON_INTERPRET=1 in the environment tries it on a CPU"
    if torch.version.hip is not None:
        return "its configurations are for NVIDIA GPUs, and this is an AMD build of torch"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    return None


def unsupported_reason(query: Tensor, value: Tensor) -> str | None:
    """What of a call's dtype and head dimensions the kernels do not take; None if they do."""
    if query.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    for name, dim in (("query and key", query.shape[-1]), ("value", value.shape[-1])):
        if dim > LARGEST_HEAD_DIM:
            return f"it takes head dimensions up to {LARGEST_HEAD_DIM}, {name} have {dim}"
    return None


def suppressed_attention(call: DenseCall) -> Result:
    from atman_kernels.backends.triton import launch

    extras = launch.Extras(call.factor, call.key_mask, call.sinks, call.position_bias)
    return launch.attend(call.query, call.key, call.value, None, extras, call.options)


def packed_suppressed_attention(call: PackedCall) -> Result:
    from atman_kernels.backends.triton import launch

    tensors, layout, extras = _as_batch(call)
    output, lse = launch.attend(*tensors, layout, extras, call.options)
    return output[0], lse[0] if call.options.return_lse else lse


def suppressed_attention_backward(call: DenseCall, saved: Saved, wanted: Wanted) -> Gradients:
    from atman_kernels.backends.triton import launch, launch_backward

    extras = launch.Extras(call.factor, call.key_mask, call.sinks, call.position_bias)
    asked = {_DENSE_NAMES.get(name, name) for name in wanted}
    found = launch_backward.gradients(call.query, call.key, call.value, None, extras, call.options, saved, asked)
    return {name: found[_DENSE_NAMES.get(name, name)] for name in wanted}


def packed_suppressed_attention_backward(call: PackedCall, saved: Saved, wanted: Wanted) -> Gradients:
    from atman_kernels.backends.triton import launch_backward

    tensors, layout, extras = _as_batch(call)
    asked = {_PACKED_NAMES.get(name, name) for name in wanted}
    found = launch_backward.gradients(*tensors, layout, extras, call.options, saved.as_batch(), asked)
    return {name: found[_PACKED_NAMES.get(name, name)].reshape(getattr(call, name).shape) for name in wanted}


# The kernels' names for tensors, where they are others than a call's.
_DENSE_NAMES = {"position_bias": "bias"}
_PACKED_NAMES = _DENSE_NAMES | {"key": "own_key", "value": "own_value", "base_key": "key", "base_value": "value"}


def _as_batch(call: PackedCall) -> tuple[tuple[Tensor, Tensor, Tensor], "Layout", "Extras"]:
    """A pack as the kernels see it: a batch of one over the base, with keys and values of its own."""
    from atman_kernels.backends.triton import launch

    layout = launch.Layout(
        call.key[None],
        call.value[None],
        call.suffix_starts,
        call.prefix_lengths,
        call.base_starts,
        call.row_variant,
    )
    bias = None if call.position_bias is None else call.position_bias[None]
    extras = launch.Extras(call.factor, None, call.sinks, bias)
    return (call.query[None], call.base_key[None], call.base_value[None]), layout, extras


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
