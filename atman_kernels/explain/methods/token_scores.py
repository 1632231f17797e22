"""What a method that scores single tokens returns, and how those scores become units'."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atman_kernels.explain.question import Question


class TokenScores(NamedTuple):
    """Scores of one question, token by token.

    Attributes:
        scores: (L, m), from each token that the model reads to each target token.
        logprobs: (m,) of the target tokens.
        stats: what else is worth knowing, in JSON types.
    """

    scores: Tensor
    logprobs: Tensor
    stats: dict[str, Any] = {}  # noqa: RUF012  (never changed)


def unit_scores(question: Question, scores: Tensor) -> Tensor:
    """(L, m) of tokens -> (n_units, m) of units: the sum over each unit's tokens, in the scores' dtype, on the CPU."""
    scores = scores.detach().cpu()
    return torch.stack([scores[list(unit.token_indices)].sum(0) for unit in question.units])
