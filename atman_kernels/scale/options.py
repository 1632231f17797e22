"""Options by name, given to whom they belong: who loads the model, who explains, and each explanation."""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from atman_kernels import Explainer, arguments, load_model
from atman_kernels.errors import InputError
from atman_kernels.explain import methods
from atman_kernels.explain.depth import Depth
from atman_kernels.inputs.request import Common
from atman_kernels.inputs.tasks import CAUSAL
from atman_kernels.planning.units import GRANULARITIES

# What is given in other ways, or goes with one prompt alone.
_TAKEN = {
    "self", "model", "tokenizer", "progress", "prompt", "prompts", "target", "targets", "units", "masks", "versus",
    "images", "image_units", "vision", "options",
}  # fmt: skip


class Options(NamedTuple):
    """Arguments of `load_model`, of `Explainer`, and of the method that explains; JSON types."""

    loading: dict[str, Any]
    explaining: dict[str, Any]
    asking: dict[str, Any]


def sorted_options(given: Mapping[str, Any], units: Any, asked_of: Callable[..., Any]) -> Options:
    """Options given by name, each to where its name is known, and the defaults of those not given.

    Args:
        given: the options.
        units: a granularity.
        asked_of: `Explainer.explain_batch` or `Explainer.ablate`.

    Raises:
        InputError: a name is known nowhere, or a value of what is asked does not fit.
    """
    units = arguments.choice(units, "units", GRANULARITIES)
    found = Options(*(_defaults(home) for home in (load_model, Explainer.__init__, asked_of)))
    others: dict[str, Any] = {}
    for name, value in given.items():
        for place in [part for part in found if name in part] or [others]:
            place[name] = _plain(name, value)
    method = found.asking.get("method", "atman")
    if others and method == "atman":
        known = ", ".join(sorted(set().union(*found)))
        raise InputError(f"there is no option {next(iter(others))!r}; there are {known}")
    chosen = methods.method(method, others)
    asking = found.asking
    common = ("include_target", "chat", "max_new_tokens", "language")
    Common.checked(**{option: asking[option] for option in common})
    Depth.checked(asking["recompute"], asking.get("exact"), chosen, CAUSAL, refine=asking.get("refine"))
    asking.update(chosen.options | {"units": units})
    return found


def model_name(model: Any) -> str:
    """What `load_model` takes, fit for processes that were started elsewhere on this machine.

    Raises:
        InputError: it is no name and no path.
    """
    if not isinstance(model, str | os.PathLike):
        raise InputError(
            f"model must be a hub id, a folder, a GGUF file or 'smollm2', which every worker loads for itself; got "
            f"{arguments.described(model)}"
        )
    name = arguments.text(os.fspath(model), "model")
    return os.path.abspath(name) if os.path.exists(name) else name


def _defaults(home: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(home).parameters.values()
    return {each.name: each.default for each in parameters if each.name not in _TAKEN}


def _plain(name: str, value: Any) -> Any:
    """A value in JSON types, as settings are kept and compared."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device | os.PathLike):
        return str(value)
    if isinstance(value, range | tuple | set | frozenset):
        value = sorted(value) if isinstance(value, set | frozenset) else list(value)
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} must be a number, a text or a list of them, got {arguments.described(value)}"
        ) from error
