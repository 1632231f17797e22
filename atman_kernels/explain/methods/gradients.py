"""Scores from gradients by the input embeddings: input × gradient, and integrated gradients.

What is explained is the target token's log-prob, so that scores are in nats. Any causal language model will do: its
attention stays what it is. The graph of one forward lives until the last target token's backward pass.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.explain.methods import TokenScores
from atman_kernels.formula import wide_dtype, widened
from atman_kernels.hf.forward.gradients import (
    differentiable_run,
    differentiation,
    input_embeddings,
    target_gradients,
)
from atman_kernels.inputs.text_generation import CausalObjective

UNCONVERGED = 0.1  # of the distance that integrated gradients should add up to
NEGLIGIBLE = 0.01  # nats


def input_x_gradient(
    model: PreTrainedModel, question: CausalObjective, *, whole_answer: bool = False, checkpointing: bool = False
) -> TokenScores:
    """x · ∂ log p / ∂x, summed over the features of each token's embedding x (Shrikumar et al., arXiv 1605.01713).

    Cost: one forward and m backward passes, one for the whole answer.

    Args:
        whole_answer: one column, the sum of the m, in one backward pass.
        checkpointing: compute the layers again on the way back instead of keeping their activations.

    Returns:
        scores (L, m or 1) over the model's inputs, in nats; log-probs (m,) of the target.
    """
    with differentiation(model, checkpointing=checkpointing):
        run = differentiable_run(model, question.ids[:-1], question.rows, question.targets)
        gradients = target_gradients(run.logprobs, [run.embeddings], whole_answer=whole_answer)
        columns = [_dot(run.embeddings, gradient)[0] for (gradient,) in gradients]
    return TokenScores(torch.stack(columns, dim=1), run.logprobs[0].detach())


def integrated_gradients(
    model: PreTrainedModel,
    question: CausalObjective,
    *,
    steps: int = 32,
    baseline: int | None = None,
    batch: int = 4,
    whole_answer: bool = False,
    checkpointing: bool = False,
) -> TokenScores:
    """The gradient of log p averaged over the way from a baseline to the input (Sundararajan et al., arXiv 1703.01365).

    (x − x₀) · ∫ ∂ log p(x₀ + α (x − x₀)) / ∂x dα, summed over features, by Gauss-Legendre quadrature. A column adds up
    to log p(x) − log p(x₀) as far as `steps` suffice; `stats["completeness_gap"]` is what is missing, in nats, and a
    warning says when that is much. In deep models it often is: log p jumps on the way.
    Cost: `steps` forwards and m · `steps` backward passes, `steps` for the whole answer.

    Args:
        steps: points of the quadrature, all of them inside the way.
        baseline: a token id whose embedding stands at every position of x₀; None: zeros.
        batch: points per forward; memory grows with it.
        whole_answer: one column, the sum of the m, in one backward pass per point.
        checkpointing: compute the layers again on the way back instead of keeping their activations.

    Returns:
        scores (L, m or 1) over the model's inputs, in nats; log-probs (m,) of the target.
    """
    ids, rows, targets = question.ids[:-1], question.rows, question.targets
    with differentiation(model, checkpointing=checkpointing):
        end = input_embeddings(model, ids)  # (L, H)
        start = _baseline_embeddings(model, question, baseline)
        nodes, weights = np.polynomial.legendre.leggauss(steps)  # of [-1, 1]
        columns = 1 if whole_answer else len(targets)
        total = torch.zeros(columns, *end.shape, dtype=wide_dtype(end.dtype), device=end.device)  # (m or 1, L, H)
        for alphas, shares in _batches((nodes + 1) / 2, weights / 2, batch):
            way = start + alphas.to(end)[:, None, None] * (end - start)
            run = differentiable_run(model, ids, rows, targets, embeddings=way)
            gradients = target_gradients(run.logprobs, [run.embeddings], whole_answer=whole_answer)
            for column, (gradient,) in enumerate(gradients):
                total[column] += torch.einsum("s,slh->lh", shares.to(total), gradient.to(total.dtype))
        with torch.no_grad():
            ends = differentiable_run(model, ids, rows, targets, embeddings=torch.stack([start, end])).logprobs
    scores, distances = _dot(end - start, total).T, ends[1] - ends[0]
    distances = distances.sum(dim=0, keepdim=True) if whole_answer else distances
    return TokenScores(scores, ends[1], {"completeness_gap": _completeness_gap(scores, distances, steps)})


def _completeness_gap(scores: Tensor, distances: Tensor, steps: int) -> float:
    """What (L, m) scores miss of the distances (m,) that they should add up to; a warning where it is much."""
    gaps = (scores.sum(0) - distances).abs()
    gap = float(gaps.max())
    if bool((gaps > UNCONVERGED * distances.abs() + NEGLIGIBLE).any()):
        warnings.warn(
            f"integrated gradients have not converged: with {steps} steps their sum is {gap:.2g} nats off; take more "
            "steps, or do not rely on them",
            stacklevel=2,
        )
    return gap


def _batches(points: np.ndarray, shares: np.ndarray, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.from_numpy(points).split(size), torch.from_numpy(shares).split(size), strict=True)


def _baseline_embeddings(model: PreTrainedModel, question: CausalObjective, baseline: int | None) -> Tensor:
    """(L, H)"""
    if baseline is None:
        return torch.zeros_like(input_embeddings(model, question.ids[:-1]))
    return input_embeddings(model, torch.full_like(question.ids[:-1], baseline))


def _dot(embeddings: Tensor, gradient: Tensor) -> Tensor:
    """(…, L, H) twice -> (…, L), in float32 (float64 for float64 models)."""
    return (widened(embeddings.detach()) * widened(gradient)).sum(-1)
