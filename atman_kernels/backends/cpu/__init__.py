"""CPU backend: the compiled kernels of csrc/ where they were built, else blocked attention made of torch's products.

``backend="cpu"`` takes the fastest for the dtype. A variant after a colon insists on one: ``"cpu:torch"`` for the
latter, ``"cpu:avx2"`` and so on for an instruction set of the former.
"""

from types import SimpleNamespace
from typing import Any

import torch

from atman_kernels.backends.cpu import blocked, blocked_gradients, compiled
from atman_kernels.errors import BackendUnavailableError


def unavailable_reason(device_type: str) -> str | None:
    return None if device_type == "cpu" else "it computes on the CPU only"


def variants() -> tuple[str, ...]:
    """What can stand after ``"cpu:"`` here, the fastest first."""
    return (*compiled.instruction_sets(torch.bfloat16), "torch")


# the ops and their backward, made of torch's products
_TORCH = SimpleNamespace(
    suppressed_attention=blocked.suppressed_attention,
    packed_suppressed_attention=blocked.packed_suppressed_attention,
    suppressed_attention_backward=blocked_gradients.suppressed_attention_backward,
    packed_suppressed_attention_backward=blocked_gradients.packed_suppressed_attention_backward,
)


def variant(name: str) -> Any:
    """The two ops and their backward with one implementation pinned.

    Raises:
        BackendUnavailableError: it was not built, or this processor cannot run it.
    """
    if name == "torch":
        return _TORCH
    if name not in variants():
        reason = compiled.unavailable_reason() or f"can run {', '.join(variants()[:-1])}"
        raise BackendUnavailableError(f"backend 'cpu:{name}' cannot run here; the compiled module: {reason}")
    return compiled.Pinned(name)


def _implementation(dtype: torch.dtype) -> Any:
    return compiled if compiled.instruction_sets(dtype) else _TORCH


def suppressed_attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(arguments[0].dtype).suppressed_attention(*arguments)


def packed_suppressed_attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(arguments[0].dtype).packed_suppressed_attention(*arguments)


def suppressed_attention_backward(*arguments: Any, **saved: Any) -> list[torch.Tensor | None]:
    return _implementation(arguments[0].dtype).suppressed_attention_backward(*arguments, **saved)  # type: ignore[no-any-return]


def packed_suppressed_attention_backward(*arguments: Any, **saved: Any) -> list[torch.Tensor | None]:
    return _implementation(arguments[0].dtype).packed_suppressed_attention_backward(*arguments, **saved)  # type: ignore[no-any-return]
