"""Where a model runs: accelerate splits models over devices, and brings weights from memory or disk when they run."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Copy = TypeVar("Copy")


class PerDevice(dict[torch.device, Copy], Generic[Copy]):
    """What layers on several devices need, on the device of each: made when a layer first asks."""

    def __init__(self, make: Callable[[torch.device], Copy]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, device: torch.device) -> Copy:
        return self.setdefault(device, self._make(device))


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs, and leaves its logits.

    Weights that are brought when they run lie on the meta device until then, so that they do not tell.
    """
    around = _execution_device(model)
    if around is not None:
        return around
    first = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return first if first.type != "meta" else next(_execution_devices(model), first)


def devices_of(model: nn.Module) -> list[torch.device]:
    """Every device on which something of a model runs, the one of its inputs first."""
    lying = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return list(dict.fromkeys([input_device(model), *_execution_devices(model), *lying]))


def _execution_devices(model: nn.Module) -> Iterator[torch.device]:
    """From the outermost module inwards."""
    return (device for module in model.modules() if (device := _execution_device(module)) is not None)


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hooks let a module run; None without any."""
    hook: Any = getattr(module, "_hf_hook", None)
    named = (getattr(each, "execution_device", None) for each in getattr(hook, "hooks", [hook]))
    return next((torch.device(device) for device in named if device is not None), None)
