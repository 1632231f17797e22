"""A model in eval mode, for one explanation at a time."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from atman_kernels.errors import UnsupportedModelError


def check_loaded(model: nn.Module) -> None:
    """Raises UnsupportedModelError if weights are missing that nothing will bring when they are needed."""
    missing = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if missing is not None and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights: {missing} is on the meta device; load the model first, for "
            "example by from_pretrained"
        )


# those who explain a model take turns: what a forward may take of the memory, and whether dropout drops
_turns: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()

_turns_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, for one thread at a time; then every module is in the mode that it had."""
    check_loaded(model)
    with _turns_lock:
        turn = _turns.setdefault(model, threading.RLock())
    with turn:
        training = [module for module in model.modules() if module.training]
        if not training:
            yield
            return
        resting = [module for module in model.modules() if not module.training]
        model.eval()
        try:
            yield
        finally:
            model.train()  # what classes do beside the flag
            for module in training:
                module.training = True
            for module in resting:
                module.training = False
