"""CPU backend: the compiled kernels of csrc/ where they were built, else blocked attention made of torch's products.

``backend="cpu"`` takes the fastest for the dtype. A variant after a colon insists on one: ``"cpu:torch"`` for the
latter, ``"cpu:avx2"`` and so on for an instruction set of the former.
"""

from types import ModuleType
from typing import Any

import torch

from atman_kernels.backends.cpu import blocked, compiled
from atman_kernels.errors import BackendUnavailableError


def unavailable_reason(device_type: str) -> str | None:
    return None if device_type == "cpu" else "it computes on the CPU only"


def variants() -> tuple[str, ...]:
    """What can stand after ``"cpu:"`` here, the fastest first."""
    return (*compiled.instruction_sets(torch.bfloat16), "torch")


def variant(name: str) -> "ModuleType | compiled.Pinned":
    """The two ops with one implementation pinned.

    Raises:
        BackendUnavailableError: it was not built, or this processor cannot run it.
    """
    if name == "torch":
        return blocked
    if name not in variants():
        reason = compiled.unavailable_reason() or f"can run {', '.join(variants()[:-1])}"
        raise BackendUnavailableError(f"backend 'cpu:{name}' cannot run here; the compiled module: {reason}")
    return compiled.Pinned(name)


def _implementation(dtype: torch.dtype) -> Any:
    return compiled if compiled.instruction_sets(dtype) else blocked


def suppressed_attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(arguments[0].dtype).suppressed_attention(*arguments)


def packed_suppressed_attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(arguments[0].dtype).packed_suppressed_attention(*arguments)
