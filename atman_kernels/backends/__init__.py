"""Backends: one definition (`reference`) and its faster twins. None imports another.

A backend is a module with two functions::

    suppressed_attention(query, key, value, factor, key_mask, sinks, position_bias, options)
    packed_suppressed_attention(query, key, value, base_key, base_value, suffix_starts, prefix_lengths,
                                base_starts, row_variant, row_position, factor, sinks, position_bias, options)

Both receive validated tensors (shapes in `atman_kernels.ops`) and a `formula.ScoreOptions`, and return
``(output, lse)``; lse has no elements unless ``options.return_lse``. `unavailable_reason` of a module says why it
cannot run on a device type, or returns None. A backend with variants, named after a colon ("cpu:avx2"), has a function
`variant` that returns an object with the two functions.
"""

from importlib import import_module
from typing import Any

import torch

from atman_kernels.errors import BackendUnavailableError, InputError

NAMES: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")
_BUILT: tuple[str, ...] = ("reference", "cpu", "cuda")  # the other is named in the design and comes later


def unavailable_reason(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot run on tensors of a device type ("cpu", "cuda", …); None if it can."""
    if name not in _BUILT:
        return "not part of this version"
    return import_module(f"atman_kernels.backends.{name}").unavailable_reason(device_type)


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
        name = "cpu" if device_type == "cpu" else "reference"
    family, _, variant = name.partition(":") if isinstance(name, str) else (name, "", "")
    if family not in NAMES:
        raise InputError(f"backend must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    reason = unavailable_reason(family, device_type)
    if reason is not None:
        raise BackendUnavailableError(f"backend {family!r} cannot run on {device_type!r} tensors: {reason}")
    module = import_module(f"atman_kernels.backends.{family}")
    if not variant:
        return module
    if not hasattr(module, "variant"):
        raise InputError(f"backend {family!r} has no variants, got {name!r}")
    return module.variant(variant)
