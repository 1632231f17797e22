"""Backends: one definition (`reference`) and its faster twins. None imports another.

A backend is a module with the two functions of `call.Backend`, and with ``unavailable_reason(device_type)``: why it
cannot run there, or None. It may have more:

- ``unsupported_reason(query, value)``, where it does not take everything
- the two functions of `call.Differentiable`; without them the reference computes gradients, holding all scores
- ``variant(name)``, where it has variants, named after a colon ("cpu:avx2"): a `call.Backend`
"""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch

from atman_kernels.errors import BackendUnavailableError, InputError

NAMES: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")


def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend `name`, with or without a variant, cannot run on tensors of a device type; None if it can."""
    family, colon, variant = name.partition(":")
    module = _module(family)
    reason: str | None = module.unavailable_reason(device_type)
    if reason is None and colon:
        try:
            module.variant(variant)
        except BackendUnavailableError as error:
            reason = str(error)
    return reason


def availability() -> dict[str, str | None]:
    """For every backend: None if it can run on some device of this machine, else the reason why not.

    Example:
        >>> availability()["reference"] is None
        True
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    report = {}
    for name in NAMES:
        reasons = [unavailable_reason(name, device) for device in devices]
        report[name] = None if None in reasons else reasons[-1]
    return report


def load(name: str | None, device_type: str) -> Any:
    """The module of backend `name`, or of the fastest one for the device type if None.

    Raises:
        InputError: no backend has that name.
        BackendUnavailableError: it cannot run on that device type, or has no such variant.
    """
    if name is None:
        name = _fastest(device_type)
    family, colon, variant = name.partition(":") if isinstance(name, str) else (name, "", "")
    if family not in NAMES:
        raise InputError(f"backend must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    reason = unavailable_reason(family, device_type)
    if reason is not None:
        raise BackendUnavailableError(f"backend {family!r} cannot run on {device_type!r} tensors: {reason}")
    module = _module(family)
    if not colon:
        return module
    if not hasattr(module, "variant"):
        raise InputError(f"backend {family!r} has no variants, got {name!r}")
    return module.variant(variant)


def load_for(name: str | None, query: torch.Tensor, value: torch.Tensor) -> Any:
    """`load` for a call: a backend that was asked for and does not take these tensors raises, a default gives way.

    Raises:
        InputError, BackendUnavailableError: as `load`.
    """
    module = load(name, query.device.type)
    reason = module.unsupported_reason(query, value) if hasattr(module, "unsupported_reason") else None
    if reason is None:
        return module
    if name is not None:
        instead = "'reference' takes it" if query.device.type != "cpu" else "'cpu' and 'reference' take it"
        raise BackendUnavailableError(f"backend {name!r} cannot do this call: {reason}; {instead}")
    _say_once(f"attention on {query.device.type!r} runs without a kernel, holding all scores: {reason}")
    return load("reference", query.device.type)


@cache
def _module(family: str) -> Any:
    return import_module(f"{__name__}.{family}")


def _fastest(device_type: str) -> str:
    if device_type == "cpu":
        return "cpu"
    if device_type != "cuda":
        return "reference"
    reason = unavailable_reason("triton", device_type)
    if reason is not None:
        _say_once(f"attention on 'cuda' runs without a kernel, holding all scores: backend 'triton': {reason}")
    return "triton" if reason is None else "reference"


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
