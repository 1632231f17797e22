"""ContextCite: a sparse linear model of how likely the answer is, given which units are there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atman_kernels.explain.methods import MethodContext, MethodOutcome, seeded
from atman_kernels.inputs.objective import Objective
from atman_kernels.run.subsets import run_subsets


def lasso(
    context: MethodContext,
    objectives: Sequence[Objective],
    *,
    samples: int = 64,
    alpha: float = 0.01,
    keep: float = 0.5,
    seed: int = 0,
) -> MethodOutcome:
    """Weights of a Lasso from random sets of units to the answer's log-odds (Cohen-Wang et al., arXiv 2409.00729).

    Units stay with probability `keep`. The response is logit p = ln p − ln(1 − p) of the whole answer, divided by its
    number of tokens for the fit and multiplied back; units are standardised for the fit, and the weights are those of
    the plain 0/1 variables. So a unit has one score, for the whole answer: by how many nats its log-odds fall without
    it. Many are exactly 0.

    Cost: `samples` variants, whatever the number of units; each runs nearly the whole prompt.

    Args:
        samples: random sets of units.
        alpha: strength of the penalty.
        keep: probability that a unit stays.
        seed: equal seeds give equal sets for equal numbers of units.

    Raises:
        ImportError: scikit-learn is not installed; the message says how to get it.
    """
    _scikit_learn()  # before the model runs for nothing
    masks = [
        torch.rand(samples, len(objective.units), generator=seeded(seed), dtype=torch.float32, device="cpu") >= keep
        for objective in objectives
    ]
    outcome = run_subsets(context.runner, objectives, masks, "sampling sets", context.recompute)
    scores = [
        _weights(~suppressed, log_odds(logprobs.double().sum(dim=1)), logprobs.shape[1], alpha)
        for suppressed, logprobs in zip(masks, outcome.perturbed, strict=True)
    ]
    return MethodOutcome.of_run(context, outcome, scores)


def _weights(kept: Tensor, response: Tensor, tokens: int, alpha: float) -> Tensor:
    """(n_units, 1)"""
    model, scaler = _scikit_learn()
    features = scaler.fit_transform(kept.double().numpy())
    # it draws a number from numpy's global generator, of which it makes nothing, unless it has one of its own
    fitted = model(alpha=alpha, random_state=0).fit(features, response.numpy() / tokens)
    return torch.from_numpy(fitted.coef_ / scaler.scale_ * tokens)[:, None]


def log_odds(logprob: Tensor) -> Tensor:
    """ln p − ln(1 − p); a p that float32 cannot tell from 1 counts as the largest that it can."""
    logprob = logprob.clamp(max=-torch.finfo(torch.float32).eps)
    return logprob - (-torch.expm1(logprob)).log()


def _scikit_learn() -> tuple[Any, Any]:
    """Lasso and a fresh StandardScaler."""
    try:
        from sklearn.linear_model import Lasso  # type: ignore[import-untyped]
        from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError('method "lasso" needs scikit-learn: pip install atman-kernels[lasso]') from error
    return Lasso, StandardScaler()
