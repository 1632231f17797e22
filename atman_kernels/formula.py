"""The suppression transform: what a factor does to an attention score, in plain PyTorch.

Every backend written in Python uses this one definition; `docs/design.md` gives the sources.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["log_additive", "multiplicative", "shifted"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class ScoreOptions:
    """How scores are made from queries and keys: what every backend receives beside the tensors.

    Attributes:
        mode: one of `MODES`.
        is_causal: a query sees keys up to its own position only.
        scale: what q·k is multiplied by.
        sliding_window: see `window_visible`; None for no window.
        softcap: s becomes softcap * tanh(s / softcap); None for no cap.
        return_lse: whether the caller wants the log of the softmax denominator.
    """

    mode: str
    is_causal: bool
    scale: float
    sliding_window: int | None
    softcap: float | None
    return_lse: bool


def suppress_scores(scores: Tensor, factor: Tensor, mode: str, visible: Tensor) -> Tensor:
    """Scale attention scores by their key's factor.

    With s a score (after scale, softcap and position bias) and c the factor of its key:

    - ``"log_additive"``: s + ln c, so that c = 0 removes the key
    - ``"multiplicative"``: c * s
    - ``"shifted"``: m + c * (s - m), m being the smallest visible score of the row

    A factor of 1 returns the score bit for bit, in every mode.

    Args:
        scores: (..., queries, keys).
        factor: broadcastable to `scores`, >= 0, same dtype.
        mode: one of `MODES`.
        visible: bool, broadcastable to `scores`; only "shifted" looks at it. The result at keys that are
            not visible is unspecified: mask afterwards.

    Example:
        >>> suppress_scores(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0, 0.5]), "shifted", torch.tensor(True))
        tensor([[1., 2.]])
    """
    if mode == "log_additive":
        return scores + factor.log()
    if mode == "multiplicative":
        return scores * factor
    if scores.shape[-1] == 0:
        return scores
    row_minimum = scores.masked_fill(~visible, math.inf).amin(dim=-1, keepdim=True)
    row_minimum = row_minimum.masked_fill(row_minimum == math.inf, 0.0)  # a row that sees nothing
    # m + c * (s - m), written so that c = 1 gives s bit for bit and still has a derivative
    return scores + (factor - 1) * (scores - row_minimum)


def window_visible(query_position: Tensor, key_position: Tensor, is_causal: bool, sliding_window: int | None) -> Tensor:
    """Which keys a query may see by their positions alone.

    Causal: k <= q, and k > q - window. Not causal: abs(q - k) < window.

    Args:
        query_position: (..., queries) integer positions.
        key_position: (..., keys) integer positions.

    Returns:
        bool (..., queries, keys).
    """
    query, key = query_position.unsqueeze(-1), key_position.unsqueeze(-2)
    if sliding_window is None:
        return key <= query if is_causal else torch.ones_like(key <= query)
    return (key > query - sliding_window) & (key <= query if is_causal else key < query + sliding_window)
