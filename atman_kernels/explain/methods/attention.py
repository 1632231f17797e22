"""Scores read off attention weights: raw attention, rollout, Chefer et al.'s relevance, GradCAM, AT2.

The model's attention runs fused, and a layer's weights are made from its queries and keys for some rows at a time, when
their turn comes. A target token's scores are the row of the position that predicts it; followed through the layers, it
takes them from the last to the first, so that relevance is one row for each target token and never a matrix.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.explain.head_weights import HeadWeights
from atman_kernels.explain.methods import TokenScores
from atman_kernels.hf.attention.calls import AttentionCall
from atman_kernels.hf.attention.layers import LayerSelection
from atman_kernels.hf.attention.switch import Run
from atman_kernels.hf.attention.weights import by_group, grouped, noted, row_blocks
from atman_kernels.hf.forward.gradients import (
    Differentiable,
    differentiable_run,
    differentiation,
    target_gradients,
)
from atman_kernels.hf.models.parts import decoder_of
from atman_kernels.inputs.text_generation import CausalObjective

Attend = Callable[[int, AttentionCall, Tensor], Tensor]


def raw_attention(model: PreTrainedModel, question: CausalObjective, *, layer: int = -1) -> TokenScores:
    """What the predicting position attends to in one layer, the mean over its heads.

    Cost: one forward.

    Args:
        layer: which one, by index; the last by default.

    Returns:
        scores (L, m) over the model's inputs, each column a distribution; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or not every layer is attention.
    """
    wanted, found = layer % _num_layers(model), []

    def attend(index: int, call: AttentionCall, output: Tensor) -> Tensor:
        if index == wanted:
            found.append(_weights(call, question))
        return output

    with torch.no_grad(), _attention(model, question, attend) as forward:
        run = forward()
    return TokenScores(found[0].mean(0).T, run.logprobs[0])


def rollout(model: PreTrainedModel, question: CausalObjective) -> TokenScores:
    """Attention followed through the layers (Abnar & Zuidema, arXiv 2005.00928).

    R = Â_N · … · Â_1, with Â = (A + I) / 2 for the residual stream and A the mean over heads.
    Cost: one forward, and every layer's scores once more; the queries and keys of all layers are kept.

    Returns:
        scores (L, m) over the model's inputs, each column a distribution; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or not every layer is attention.
    """
    calls: list[AttentionCall] = []

    def attend(index: int, call: AttentionCall, output: Tensor) -> Tensor:
        calls.append(replace(call, value=call.value[..., :0].clone()))
        return output

    with torch.no_grad(), _attention(model, question, attend) as forward:
        run = forward()
        relevance = _one_hot_rows(question, run)
        while calls:
            relevance = _followed(relevance, calls.pop()) / 2
    return TokenScores(relevance.T, run.logprobs[0])


def chefer(model: PreTrainedModel, question: CausalObjective, *, checkpointing: bool = True) -> TokenScores:
    """Attention followed through the layers, weighted by the gradient (Chefer et al., arXiv 2103.15679, eq. 5 and 6).

    R ← R + Ā · R from the first layer to the last, from R = I, with Ā the mean over heads of max(A ⊙ ∂y/∂A, 0) and y
    the target token's logit.
    Cost: one forward and m backward passes, in each of which every layer's scores are made once more.

    Args:
        checkpointing: compute the layers again on the way back instead of keeping their activations.

    Returns:
        scores (L, m) >= 0 over the model's inputs; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or not every layer is attention; or its layers
            cannot be computed again.
    """
    # (1, L), of the target whose backward pass is under way
    relevance = torch.empty(0, dtype=torch.float32, device="cpu")

    def follow(call: AttentionCall, output: Tensor, gradient: Tensor) -> None:
        nonlocal relevance
        relevance = _followed(relevance, call, gradient)

    def attend(index: int, call: AttentionCall, output: Tensor) -> Tensor:
        return noted(output, call, follow)

    with differentiation(model, checkpointing=checkpointing), _attention(model, question, attend) as forward:
        run = forward()
        columns = []
        gradients = target_gradients(run.logits, [run.embeddings])
        for start in _one_hot_rows(question, run):
            relevance = start[None]
            next(gradients)
            columns.append(relevance[0])
    return TokenScores(torch.stack(columns, dim=1), run.logprobs[0].detach())


def gradcam(model: PreTrainedModel, question: CausalObjective) -> TokenScores:
    """GradCAM with the last layer's attention heads as its maps (Selvaraju et al., arXiv 1610.02391).

    max(mean over heads of α_h A_h, 0), with α_h the mean of ∂y/∂A_h over the keys that head h sees, and y the target
    token's logit; all in the row of the position that predicts the token.
    Cost: one forward, and m backward passes that end at the last layer's attention.

    Returns:
        scores (L, m) >= 0 over the model's inputs; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or not every layer is attention.
    """
    last: list[tuple[AttentionCall, Tensor]] = []  # the call and its output, from which the graph goes on
    final = _num_layers(model) - 1

    def attend(index: int, call: AttentionCall, output: Tensor) -> Tensor:
        if index != final:
            return output
        last.append((call, output.detach().requires_grad_()))
        return last[0][1]

    with differentiation(model), _attention(model, question, attend) as forward:
        run = forward(of_embeddings=False)
        ((call, output),) = last
        maps = _weights(call, question)  # [Hq, m, L]
        value = call.value[0].to(maps.dtype)
        columns = []
        targets = zip(question.rows.tolist(), target_gradients(run.logits, [output]), strict=True)
        for target, (row, (gradient,)) in enumerate(targets):
            d_output = grouped(gradient[0, row][:, None].to(maps.dtype), call)  # [Hkv, group, 1, Dv]
            slopes = by_group(d_output, value.mT)[:, 0]  # [Hq, L], by each weight
            seen = maps[:, target] > 0  # a hidden key has a gradient too, but no weight
            importance = torch.where(seen, slopes, 0.0).sum(-1) / seen.sum(-1)
            columns.append((importance[:, None] * maps[:, target]).mean(0).clamp_min(0))
    return TokenScores(torch.stack(columns, dim=1), run.logprobs[0].detach())


def at2(model: PreTrainedModel, question: CausalObjective, *, weights: str | None = None) -> TokenScores:
    """What each head attends to from the row that predicts a target token, times that head's learned weight.

    AT2 (Cohen-Wang et al., arXiv 2504.13752): a linear model over heads of what an ablation does, learned beforehand
    from ablations of other prompts; see `fit_at2`.
    Cost: one forward, and the answer's rows of every layer's scores once more.

    Args:
        weights: the file that `HeadWeights.save` wrote for this model.

    Returns:
        scores (L, m) over the model's inputs; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or not every layer is attention.
    """
    assert weights is not None  # `Method.check` has compared them with the model
    of_heads = HeadWeights.load(weights).weights
    scores: list[Tensor] = []  # of each layer, (L, m)

    def tell(index: int, attention: Tensor) -> None:
        scores.append(torch.einsum("h,hml->lm", of_heads[index].to(attention), attention).cpu())

    logprobs = each_layer(model, question, tell)
    return TokenScores(torch.stack(scores).sum(0), logprobs)


def each_layer(model: PreTrainedModel, question: CausalObjective, tell: Callable[[int, Tensor], object]) -> Tensor:
    """One forward, in which `tell` gets each layer's index and its (Hq, m, L) weights of the rows that predict.

    Returns:
        (m,) log-probs of the target.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or not every layer is attention.
    """

    def attend(index: int, call: AttentionCall, output: Tensor) -> Tensor:
        tell(index, _weights(call, question))
        return output

    with torch.no_grad(), _attention(model, question, attend) as forward:
        return forward().logprobs[0]


def _followed(relevance: Tensor, call: AttentionCall, gradient: Tensor | None = None) -> Tensor:
    """Rows R (m, L) -> R + R · Ā for one layer, Ā being the mean over heads of its weights A.

    With the gradient (1, T, Hq, Dv) of y by the layer's output, Ā is that of max(A ⊙ ∂y/∂A, 0).
    """
    relevance = relevance.to(call.query.device)
    found, value = relevance.clone(), call.value[0].to(relevance.dtype)
    for block in row_blocks(call):
        weights = block.weights  # [Hq, M, N]
        if gradient is not None:
            d_output = grouped(gradient[0, block.rows].transpose(0, 1).to(weights.dtype), call)
            slopes = by_group(d_output, value[:, block.keys].mT)  # y's, by each weight
            weights = slopes.mul_(weights).clamp_min_(0)
        found[:, block.keys] += relevance[:, block.rows] @ weights.mean(0).to(relevance.dtype)
    return found


def _weights(call: AttentionCall, question: CausalObjective) -> Tensor:
    """(Hq, m, L) of the rows that predict the target."""
    rows = question.rows.tolist()
    blocks = list(row_blocks(call, rows[0], rows[-1] + 1))
    found = blocks[0].weights.new_zeros(call.query.shape[1], len(rows), call.key.shape[2])
    for block in blocks:
        found[:, block.rows.start - rows[0] : block.rows.stop - rows[0], block.keys] = block.weights
    return found


@contextmanager
def _attention(
    model: PreTrainedModel, question: CausalObjective, attend: Attend
) -> Iterator[Callable[..., Differentiable]]:
    """Yields the forward. `attend` gets index, call and output of every layer's attention, and says what is its output.

    Raises:
        UnsupportedModelError: in the forward, if some layers did not come by.
    """
    run = _Attending(attend, len(question.ids) - 1)
    with run.installed(model):
        yield partial(_forward, model, question, run)


def _forward(model: PreTrainedModel, question: CausalObjective, run: "_Attending", **options: Any) -> Differentiable:
    found = differentiable_run(model, question.ids[:-1], question.rows, question.targets, **options)
    layers = _num_layers(model)
    if len(run.seen) != layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not give its attention weights: {len(run.seen)} of {layers} layers did"
        )
    return found


class _Attending(Run):
    def __init__(self, attend: Attend, length: int) -> None:
        self._attend, self._length, self._layers = attend, length, LayerSelection(None)
        self.seen: set[int] = set()

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        if call.query.shape[2] != self._length or call.key.shape[2] != self._length:
            raise UnsupportedModelError(
                f"{type(module).__name__} does not give its attention weights: it attends from {call.query.shape[2]} "
                f"to {call.key.shape[2]} positions where {self._length} tokens were read"
            )
        index = self._layers.index(module)
        self.seen.add(index)
        return self._attend(index, call, call.attend(None, "log_additive"))


def _num_layers(model: PreTrainedModel) -> int:
    return int(decoder_of(model).config.num_hidden_layers)


def _one_hot_rows(question: CausalObjective, run: Differentiable) -> Tensor:
    """(m, L) float32 (float64 for float64 models): 1 at the position that predicts each target token."""
    return torch.nn.functional.one_hot(question.rows, len(question.ids[:-1])).to(run.logprobs.dtype)
