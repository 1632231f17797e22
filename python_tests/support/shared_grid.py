"""Linear layers whose rows depend on the rows beside them."""

from typing import Any

import torch
from torch import nn


class SharedGrid(nn.Linear):
    """Activations rounded to a grid that all rows of a product share; nothing in its name says so."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        step = input.abs().amax() / 15
        return super().forward((input / step).round() * step)


def on_a_shared_grid(model: Any) -> Any:
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = SharedGrid
    return model
