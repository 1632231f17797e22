"""Gradients of the two ops: for each an op `…_backward`, registered with torch, that a backend computes.

A backend may have two functions beside its forwards, of the same names with `_backward` at the end::

    suppressed_attention_backward(*tensors, options=, saved=, wanted=)
    packed_suppressed_attention_backward(*tensors, options=, saved=, wanted=)

``tensors`` and ``options`` are the forward's, ``saved`` is a `formula.Saved`, ``wanted`` has a bool for each tensor.
They return a list with an entry for each tensor: None where nothing is wanted, else a contiguous gradient of the
tensor's shape and dtype. What a backend has no such function for, or gives a reason against in
``backward_unsupported_reason(query, value, wanted)``, the reference computes, holding all scores of the call.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels import backends
from atman_kernels.backends import reference
from atman_kernels.formula import Saved, ScoreOptions

OPTIONS = 6  # of an op, between its tensors and the name of the backend: the fields of `ScoreOptions`
SAVED = "Tensor output, Tensor lse, Tensor? grad_output, Tensor? grad_lse"


def requires_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors will be differentiated, so that its lse has to be kept."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def register(library: torch.library.Library, name: str, tensors: str, options: str) -> None:
    """Defines the backward of op `name`, whose schema begins with `tensors` and `options`, and ties it to the op."""
    count = tensors.count("Tensor")

    def run(*arguments: Any) -> list[Tensor]:
        return _run(name, count, *arguments)

    def fake(*arguments: Any) -> list[Tensor]:
        wanted = arguments[count + OPTIONS + 1]
        return [x.new_empty(x.shape) for x, need in zip(arguments, wanted, strict=False) if need]

    library.define(f"{name}_backward({tensors}, {options}, str? backend, bool[] wanted, {SAVED}) -> Tensor[]")
    library.impl(f"{name}_backward", run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atman_kernels::{name}_backward", fake, lib=library)
    torch.library.register_autograd(
        f"atman_kernels::{name}",
        _backward(getattr(torch.ops.atman_kernels, f"{name}_backward"), count),
        setup_context=_setup_context,
        lib=library,
    )


class _Once(torch.autograd.Function):
    """Gradients as they are, with an error for who wants to differentiate them again."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            "suppressed attention has first derivatives only: a gradient that went through it (create_graph=True) "
            "cannot be differentiated again"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]


def _backward(gradients: Any, count: int) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if is_tensor else x for is_tensor, x in zip(ctx.is_tensor, ctx.arguments, strict=True)]
        wanted = list(ctx.needs_input_grad[:count])
        with torch.no_grad():
            found = gradients(*inputs, wanted, *saved, grad_output, grad_lse)
        if torch.is_grad_enabled():  # create_graph=True
            found = _Once.apply(*(x.requires_grad_() for x in found))
        given = iter(found)
        return tuple(next(given) if needed else None for needed in ctx.needs_input_grad)

    return backward


def _run(name: str, count: int, *arguments: Any) -> list[Tensor]:
    """The wanted gradients, in the order of the tensors."""
    tensors, settings, rest = arguments[:count], arguments[count : count + OPTIONS], arguments[count + OPTIONS :]
    backend, wanted, output, lse, grad_output, grad_lse = rest
    options, wanted = ScoreOptions(*settings), tuple(wanted)
    module = backends.load_for(backend, tensors[0], tensors[2])
    if lse.shape != output.shape[:-1]:  # nobody had asked for it
        output, lse = getattr(module, name)(*tensors, replace(options, return_lse=True))
        grad_lse = None
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    if not _has_backward(module, f"{name}_backward", tensors, wanted):
        module = reference
    saved = Saved(output, lse, grad_output, grad_lse)
    found = getattr(module, f"{name}_backward")(*tensors, options=options, saved=saved, wanted=wanted)
    return [x for x, need in zip(found, wanted, strict=True) if need]


def _has_backward(module: Any, name: str, tensors: tuple[Any, ...], wanted: tuple[bool, ...]) -> bool:
    if not hasattr(module, name):
        return False
    reason = getattr(module, "backward_unsupported_reason", None)
    return reason is None or reason(tensors[0], tensors[2], wanted) is None
