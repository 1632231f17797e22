"""Forwards of an unmodified model that can be differentiated by its input embeddings, or by what its layers compute.

Gradients go to those tensors alone. No parameter's `requires_grad` is changed for good, and no `.grad` is written.
"""

import contextvars
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from atman_kernels.arguments import flag
from atman_kernels.errors import UnsupportedModelError
from atman_kernels.formula import widened
from atman_kernels.hf.forward.logprobs import head_in_float32, states_with_inputs
from atman_kernels.hf.models.parts import decoder_of
from atman_kernels.hf.replacement import replaced
from atman_kernels.hf.scope import Scope


@dataclass(frozen=True, eq=False)
class Differentiable:
    """A forward with its graph.

    Attributes:
        embeddings: (B, L, H) the input embeddings, a leaf.
        logits: (B, m) of the target tokens, float32 (float64 for float64 models).
        logprobs: (B, m) likewise.
    """

    embeddings: Tensor
    logits: Tensor
    logprobs: Tensor


@contextmanager
def differentiation(model: PreTrainedModel, *, checkpointing: bool = False) -> Iterator[None]:
    """Gradients are recorded inside, whatever the caller has switched off, but none for parameters.

    Args:
        checkpointing: keep the inputs of every decoder layer only, and compute each layer again on the way back:
            a third more time, one layer's activations instead of all layers'.

    Raises:
        InputError: checkpointing is neither True nor False.
        UnsupportedModelError: checkpointing, where transformers does not mark the model's layers; weights that no
            gradient can go through.
    """
    checkpointing = flag(checkpointing, "checkpointing")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be differentiated: its weights were made under torch.inference_mode; load "
            "the model outside of it"
        )
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for parameter in frozen:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        if checkpointing:
            stack.enter_context(_checkpointed(model))
        yield


def input_embeddings(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(L, H) what the model looks up for its (L,) input tokens, detached; hooks will see it in the forward."""
    return model.get_input_embeddings().forward(ids.clone()).detach()  # type: ignore[no-any-return]


def differentiable_run(
    model: PreTrainedModel,
    ids: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    embeddings: Tensor | None = None,
    of_embeddings: bool = True,
) -> Differentiable:
    """One forward inside `differentiation`, with logits for the target rows only.

    Args:
        ids: (L,) token ids.
        rows: (m,) rows whose next token is a target.
        targets: (m,) those tokens.
        embeddings: (B, L, H) to put in place of what the model looks up for `ids`; None for just that, with B = 1.
        of_embeddings: whether they require a gradient; if not, the graph begins where a layer's output is made to.

    Raises:
        UnsupportedModelError: the model has no input embeddings of its own.
    """
    ids, rows, targets = ids.clone(), rows.clone(), targets.clone()  # not inference tensors, which no graph may hold
    leaf = input_embeddings(model, ids)[None] if embeddings is None else embeddings.detach().clone()
    leaf.requires_grad_(of_embeddings)
    batch = leaf.shape[0]
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": rows} if keeps else {}
    with ExitStack() as stack:
        scope = stack.enter_context(Scope())
        stack.enter_context(_embedding_replaced(model, leaf, scope))
        stack.enter_context(states_with_inputs(model, scope))
        stack.enter_context(head_in_float32(model, scope))
        output = model(ids.expand(batch, -1), use_cache=False, return_dict=True, **options)
    all_logits = output.logits if keeps else output.logits[:, rows]  # (B, m, vocabulary)
    all_logits = widened(all_logits)
    logits = all_logits.gather(-1, targets.expand(batch, -1)[..., None]).squeeze(-1)
    return Differentiable(leaf, logits, logits - all_logits.logsumexp(-1))


def target_gradients(
    values: Tensor, inputs: Sequence[Tensor], *, whole_answer: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """Per target token the gradients of its values (B, m), summed over B, by each of the inputs: m backward passes.

    Args:
        whole_answer: the gradients of the sum over the target tokens alone, in one backward pass.

    Raises:
        InputError: whole_answer is neither True nor False.
    """
    if flag(whole_answer, "whole_answer"):
        values = values.sum(dim=1, keepdim=True)
    last = values.shape[1] - 1
    for target in range(values.shape[1]):
        yield torch.autograd.grad(values[:, target].sum(), inputs, retain_graph=target < last)


@contextmanager
def _embedding_replaced(model: PreTrainedModel, embeddings: Tensor, scope: Scope) -> Iterator[None]:
    """In the scope, the model's layers read `embeddings` (B, L, H), whatever the input ids are."""
    looked_up = False

    def instead(own: Any, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal looked_up
        looked_up = True
        return embeddings

    with replaced(model.get_input_embeddings(), scope, instead):
        yield
    if not looked_up:
        raise UnsupportedModelError(f"{type(model).__name__} does not look its input tokens up in its embeddings")


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    layers = [module for module in decoder_of(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers that can be recomputed; pass checkpointing=False"
        )

    def recomputed(own: Any, *args: Any, **kwargs: Any) -> Any:
        # the backward of a GPU runs in a thread of its own, which has none of this thread's context variables
        context = contextvars.copy_context()
        return checkpoint(partial(context.run, own), *args, use_reentrant=False, **kwargs)

    with Scope() as scope, ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(layer, scope, recomputed))
        yield
