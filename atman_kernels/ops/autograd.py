"""Gradients of the two ops: for each an op `…_backward`, registered with torch, that a backend computes.

Where a backend has none the reference computes it, holding all scores of the call.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels import backends
from atman_kernels.backends import reference
from atman_kernels.backends.call import DenseCall, PackedCall
from atman_kernels.formula import Saved

_SAVED = "Tensor output, Tensor lse, Tensor? grad_output, Tensor? grad_lse"


def register(library: torch.library.Library, kind: type[DenseCall] | type[PackedCall]) -> None:
    """Defines the backward of a kind of calls, and ties it to their op."""
    name = f"{kind.OP}_backward"

    def run(*row: Any) -> list[Tensor]:
        call, (backend, wanted, *saved) = kind.read(row)
        return _run(call, backend, _named(kind, wanted), *saved)

    def fake(*row: Any) -> list[Tensor]:
        call, (_, wanted, *_) = kind.read(row)
        tensors = [getattr(call, name) for name in _named(kind, wanted)]
        return [x.new_empty(x.shape) for x in tensors]

    library.define(f"{name}({kind.SCHEMA}, str? backend, bool[] wanted, {_SAVED}) -> Tensor[]")
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atman_kernels::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"atman_kernels::{kind.OP}",
        _backward(getattr(torch.ops.atman_kernels, name), len(kind.TENSORS)),
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
            found = _Once.apply(*(x.requires_grad_() for x in found))  # type: ignore[no-untyped-call]
        given = iter(found)
        return tuple(next(given) if needed else None for needed in ctx.needs_input_grad)

    return backward


def _named(kind: type[DenseCall] | type[PackedCall], wanted: list[bool]) -> tuple[str, ...]:
    """What is wanted, in the order of the call's tensors."""
    return tuple(name for name, is_wanted in zip(kind.TENSORS, wanted, strict=True) if is_wanted)


def _run(
    call: DenseCall | PackedCall,
    backend: str | None,
    wanted: tuple[str, ...],
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
) -> list[Tensor]:
    """The wanted gradients, in their order."""
    module = backends.load_for(backend, call.query, call.value)
    if lse.shape != output.shape[:-1]:  # nobody had asked for it
        output, lse = getattr(module, call.OP)(replace(call, options=replace(call.options, return_lse=True)))
        grad_lse = None
    saved = Saved(output, lse, torch.zeros_like(output) if grad_output is None else grad_output, grad_lse)
    backward = f"{call.OP}_backward"
    found = getattr(module if hasattr(module, backward) else reference, backward)(call, saved, frozenset(wanted))
    return [found[name] for name in wanted]
