"""Layers that a suppression acts on: by the model's own index, or by the order in which it calls them."""

import sys
import threading
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from atman_kernels.arguments import entries, integer, shown
from atman_kernels.errors import InputError
from atman_kernels.hf.models.parts import encoder_of, is_encoder_decoder, text_stack


class LayerSelection:
    """Attention layers by the index that they have in the model, or else by the order in which the model calls them."""

    def __init__(self, layers: Iterable[int] | None) -> None:
        self.wanted = None if layers is None else frozenset(layers)
        self._called: dict[int, int] = {}
        self._lock = threading.Lock()

    def index(self, module: nn.Module) -> int:
        """The layer of an attention module."""
        own = getattr(module, "layer_idx", None)  # where layers lie on several machines, each calls only some
        if isinstance(own, int):
            return own
        with self._lock:
            return self._called.setdefault(id(module), len(self._called))

    def __contains__(self, layer: nn.Module | int) -> bool:
        if self.wanted is None:
            return True
        return (layer if isinstance(layer, int) else self.index(layer)) in self.wanted


def checked_layers(model: nn.Module, layers: Iterable[int] | None, name: str = "layers") -> tuple[int, ...] | None:
    """The layers as a tuple.

    Raises:
        InputError: there are none, or one of them is no index of a layer of the model.
    """
    if layers is None:
        return None
    assert isinstance(model, PreTrainedModel)
    count = int(getattr(text_stack(model).config, "num_hidden_layers", sys.maxsize))
    if is_encoder_decoder(model):  # BART's stacks share one config, T5's do not
        count = max(count, *(int(getattr(model.config, f"{stack}_layers", 0)) for stack in ("encoder", "decoder")))
        count = max(count, int(getattr(encoder_of(model).config, "num_hidden_layers", 0)))
    given = entries(layers, name, "layer indices")
    try:
        wanted = tuple(integer(x, name, least=0, most=count - 1) for x in given)
    except InputError:
        wanted = ()
    if not wanted:
        raise InputError(f"{name} must be indices in [0, {count}), got {shown(given)}")
    return wanted
