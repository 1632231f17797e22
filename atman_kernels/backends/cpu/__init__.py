"""CPU backend: the compiled kernels of csrc/ where they were built, else blocked attention made of torch's products.

``backend="cpu"`` takes the fastest for the dtype. A variant after a colon insists on one: ``"cpu:torch"`` for the
latter, ``"cpu:avx2"`` and so on for an instruction set of the former.
"""

from types import SimpleNamespace
from typing import cast

import torch

from atman_kernels.backends.call import (
    Backend,
    DenseCall,
    Differentiable,
    Gradients,
    PackedCall,
    Result,
    Wanted,
    pinned,
)
from atman_kernels.backends.cpu import blocked, blocked_gradients, compiled
from atman_kernels.errors import BackendUnavailableError
from atman_kernels.formula import Saved


def unavailable_reason(device_type: str) -> str | None:
    """Why it cannot run on a device type; None if it can."""
    return None if device_type == "cpu" else "it computes on the CPU only"


def variants() -> tuple[str, ...]:
    """What can stand after ``"cpu:"`` here, the fastest first."""
    return (*compiled.instruction_sets(torch.bfloat16), "torch")


_TORCH = cast(
    Differentiable,
    SimpleNamespace(
        suppressed_attention=blocked.suppressed_attention,
        packed_suppressed_attention=blocked.packed_suppressed_attention,
        suppressed_attention_backward=blocked_gradients.suppressed_attention_backward,
        packed_suppressed_attention_backward=blocked_gradients.packed_suppressed_attention_backward,
    ),
)


def variant(name: str) -> Backend:
    """The two ops and their backward with one implementation pinned.

    Raises:
        BackendUnavailableError: it was not built, or this processor cannot run it.
    """
    if name == "torch":
        return _TORCH
    if name not in variants():
        reason = compiled.unavailable_reason() or f"can run {', '.join(variants()[:-1])}"
        raise BackendUnavailableError(f"backend 'cpu:{name}' cannot run here; the compiled module: {reason}")
    return pinned(compiled, name)


def _implementation(call: DenseCall | PackedCall) -> Differentiable:
    return compiled if compiled.instruction_sets(call.query.dtype) else _TORCH


def suppressed_attention(call: DenseCall) -> Result:
    return _implementation(call).suppressed_attention(call)


def packed_suppressed_attention(call: PackedCall) -> Result:
    return _implementation(call).packed_suppressed_attention(call)


def suppressed_attention_backward(call: DenseCall, saved: Saved, wanted: Wanted) -> Gradients:
    return _implementation(call).suppressed_attention_backward(call, saved, wanted)


def packed_suppressed_attention_backward(call: PackedCall, saved: Saved, wanted: Wanted) -> Gradients:
    return _implementation(call).packed_suppressed_attention_backward(call, saved, wanted)
