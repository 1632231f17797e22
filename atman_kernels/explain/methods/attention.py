"""Scores read off attention weights: raw attention, rollout, Chefer et al.'s relevance, GradCAM.

All need the weights of every layer at once: eager attention is switched on for the one forward, and each layer's
(heads, L, L) weights are kept. A target token's scores are the row of the position that predicts it.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.explain.methods import TokenScores
from atman_kernels.hf.forward.gradients import (
    Differentiable,
    differentiable_run,
    differentiation,
    target_gradients,
)
from atman_kernels.inputs.text_generation import Question


def raw_attention(model: PreTrainedModel, question: Question, *, layer: int = -1) -> TokenScores:
    """What the predicting position attends to in one layer, the mean over its heads.

    Cost: one forward with eager attention.

    Args:
        layer: which one, by index; the last by default.

    Returns:
        scores (L, m) over the model's inputs, each column a distribution; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model does not give its attention weights.
    """
    with torch.no_grad():
        run = _attended(model, question)
    weights = run.attentions[layer][0].mean(0)  # (L, L), from queries to keys
    return TokenScores(weights[question.rows].T, run.logprobs[0])


def rollout(model: PreTrainedModel, question: Question) -> TokenScores:
    """Attention followed through the layers (Abnar & Zuidema, arXiv 2005.00928).

    R = Â_N · … · Â_1, with Â = (A + I) / 2 for the residual stream and A the mean over heads.
    Cost: one forward with eager attention.

    Returns:
        scores (L, m) over the model's inputs, each column a distribution; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model does not give its attention weights.
    """
    with torch.no_grad():
        run = _attended(model, question)
    relevance = _one_hot_rows(question, run)
    for weights in reversed(run.attentions):
        relevance = (relevance @ weights[0].mean(0).to(relevance.dtype) + relevance) / 2
    return TokenScores(relevance.T, run.logprobs[0])


def chefer(model: PreTrainedModel, question: Question) -> TokenScores:
    """Attention followed through the layers, weighted by the gradient (Chefer et al., arXiv 2103.15679, eq. 5 and 6).

    R ← R + Ā · R from the first layer to the last, from R = I, with Ā the mean over heads of max(A ⊙ ∂y/∂A, 0) and y
    the target token's logit.
    Cost: one forward with eager attention, and m backward passes; weights, gradients and the graph of all layers.

    Returns:
        scores (L, m) >= 0 over the model's inputs; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model does not give its attention weights.
    """
    with differentiation(model):
        run = _attended(model, question)
        rows = _one_hot_rows(question, run)
        columns = []
        for target, gradients in enumerate(target_gradients(run.logits, run.attentions)):
            relevance = rows[target]  # (L,), one row of the product: the last layer's factor comes first
            for weights, gradient in zip(reversed(run.attentions), reversed(gradients), strict=True):
                weighted = (weights.detach() * gradient)[0].clamp_min(0).mean(0).to(relevance.dtype)
                relevance = relevance + relevance @ weighted
            columns.append(relevance)
    return TokenScores(torch.stack(columns, dim=1), run.logprobs[0].detach())


def gradcam(model: PreTrainedModel, question: Question) -> TokenScores:
    """GradCAM with the last layer's attention heads as its maps (Selvaraju et al., arXiv 1610.02391).

    max(mean over heads of α_h A_h, 0), with α_h the mean of ∂y/∂A_h over the keys that head h sees, and y the target
    token's logit; all in the row of the position that predicts the token.
    Cost: one forward with eager attention, and m backward passes through the model's last layer.

    Returns:
        scores (L, m) >= 0 over the model's inputs; log-probs (m,) of the target.

    Raises:
        UnsupportedModelError: the model does not give its attention weights.
    """
    with differentiation(model):
        run = _attended(model, question)
        last = run.attentions[-1]
        columns = []
        for row, (gradient,) in zip(question.rows.tolist(), target_gradients(run.logits, [last]), strict=True):
            maps = last.detach()[0, :, row]  # (Hq, L)
            seen = maps > 0  # a hidden key has a gradient too, but no weight
            importance = torch.where(seen, gradient[0, :, row], 0.0).sum(-1) / seen.sum(-1)
            columns.append((importance[:, None] * maps).mean(0).clamp_min(0))
    return TokenScores(torch.stack(columns, dim=1), run.logprobs[0].detach())


def _attended(model: PreTrainedModel, question: Question) -> Differentiable:
    return differentiable_run(model, question.ids[:-1], question.rows, question.targets, attentions=True)


def _one_hot_rows(question: Question, run: Differentiable) -> Tensor:
    """(m, L) float32 (float64 for float64 models): 1 at the position that predicts each target token."""
    return torch.nn.functional.one_hot(question.rows, len(question.ids[:-1])).to(run.logprobs.dtype)
