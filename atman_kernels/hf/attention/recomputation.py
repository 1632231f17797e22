"""Layers that a backward pass computes again (gradient checkpointing), under the suppression of their forward.

The backward may come when the suppression has ended, or run in a thread of its own, as it does on a GPU. Layers that
checkpoint themselves, as transformers' do, are told what to go back to. What users wrap in `torch.utils.checkpoint`
is recomputed behind our back: right in the thread and inside the block of its forward, and told of where it is not.
"""

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.replacement import replaced
from atman_kernels.hf.scope import Scope

_CHECKPOINT = "_gradient_checkpointing_func"  # under this name layers that checkpoint themselves know how
_TORCHS = torch.utils.checkpoint.__file__


class Recomputations:
    """Of the layers of a model under one suppression.

    Args:
        model: the part whose attention is suppressed.
        scope: whose forwards are.
        again: makes a context in which the same suppression is active.
    """

    def __init__(self, model: nn.Module, scope: Scope, again: Callable[[], AbstractContextManager[object]]) -> None:
        self._model, self._scope, self._again = model, scope, again
        self._carried = threading.local()
        self._due: Counter[int] = Counter()  # by id of the attention module, forwards that may be computed again

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, layers that checkpoint themselves take the suppression along."""
        with ExitStack() as stack:
            for module in self._model.modules():
                if _CHECKPOINT in module.__dict__:
                    stack.enter_context(replaced(module, self._scope, self._checkpointed, _CHECKPOINT))
            yield
        if any(count > 0 for count in self._due.values()):
            warnings.warn(
                "a layer was computed inside torch.utils.checkpoint under a suppression: a backward pass that comes "
                "now will compute it again without. Call backward inside the suppression, or use the model's own "
                "gradient checkpointing, which takes the suppression along",
                RuntimeWarning,
                stacklevel=2,
            )

    def note(self, module: nn.Module) -> None:
        """To be called when an attention module computes.

        Raises:
            UnsupportedModelError: it computes again what was not computed under this suppression.
        """
        if getattr(self._carried, "depth", 0) or torch.is_inference_mode_enabled() or not _in_a_checkpoint():
            return
        if torch._C._current_graph_task_id() == -1:  # no backward pass
            self._due[id(module)] += 1
        elif self._due[id(module)] > 0:
            self._due[id(module)] -= 1
        else:
            raise UnsupportedModelError(
                f"{type(module).__name__} is recomputed by a backward pass under a suppression that its forward was "
                "not under; call backward outside the suppression"
            )

    def _checkpointed(self, own: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return own(partial(self._repeat, function), *args, **kwargs)

    def _repeat(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward and its recomputations."""
        self._carried.depth = getattr(self._carried, "depth", 0) + 1
        try:
            if self._scope.holds():
                return function(*args, **kwargs)
            with self._again():
                return function(*args, **kwargs)
        finally:
            self._carried.depth -= 1


def _in_a_checkpoint() -> bool:
    """Whether the caller computes what a backward pass may compute again, or does so now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _TORCHS:
        frame = frame.f_back
    return frame is not None
