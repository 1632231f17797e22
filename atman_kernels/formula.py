"""The suppression transform: what a factor does to an attention score, in plain PyTorch.

Every backend written in Python uses this one definition; `docs/design.md` gives the sources.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["log_additive", "multiplicative", "shifted"]
WIDEST_WINDOW = 1 << 30  # reaches over every sequence; positions plus a window stay within 32 bits
MODES: tuple[str, ...] = get_args(Mode)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores, lse and sums are held in, where tensors come in `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """A tensor in the dtype in which is computed with it, see `wide_dtype`.

    Example:
        >>> widened(torch.ones(2, dtype=torch.bfloat16)).dtype, widened(torch.ones(2, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return x.to(wide_dtype(x.dtype))


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True)
class Saved:
    """What the backward of an op gets beside the forward's arguments; leading dimensions are the query's.

    Attributes:
        output: (..., Dv) what the forward returned.
        lse: (...) the log of each row's softmax denominator, sinks included; -inf where a row saw nothing.
        grad_output: (..., Dv) the gradient by the output.
        grad_lse: (...) the gradient by the lse; None if nothing came of it.
    """

    output: Tensor
    lse: Tensor
    grad_output: Tensor
    grad_lse: Tensor | None

    def as_batch(self) -> "Saved":
        """The same of a batch of one: of a pack (1, Hq, T, …)."""
        grad_lse = None if self.grad_lse is None else self.grad_lse[None]
        return Saved(self.output[None], self.lse[None], self.grad_output[None], grad_lse)

    def delta(self) -> Tensor:
        """(...) what every weight of a row loses in the softmax's gradient: dO · o - d lse, in the lse's dtype."""
        delta = (self.grad_output.to(self.lse.dtype) * self.output).sum(-1)
        return delta if self.grad_lse is None else delta - self.grad_lse

    def sink_gradient(self, sinks: Tensor, delta: Tensor) -> Tensor:
        """(Hq,) the gradient by the sinks, which weigh exp(sink - lse) and carry no value."""
        sinks_wide = sinks.to(delta.dtype)[:, None]  # [Hq, 1]; lse and delta (..., Hq, rows)
        weight = (sinks_wide - self.lse).exp().masked_fill(self.lse == -math.inf, 0.0)
        gradient = -(weight * delta).sum(-1)  # [..., Hq]
        return gradient.reshape(-1, len(sinks)).sum(0).to(sinks.dtype)


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
    if mode == "log_additive":  # without the infinite slope of ln at 0, by which a key's removal has no gradient
        return scores + torch.where(factor == 0, -math.inf, torch.where(factor == 0, 1.0, factor).log())
    if mode == "multiplicative":
        return scores * factor
    if scores.shape[-1] == 0:
        return scores
    row_minimum = scores.masked_fill(~visible, math.inf).amin(dim=-1, keepdim=True)
    row_minimum = row_minimum.masked_fill(row_minimum == math.inf, 0.0)  # a row that sees nothing
    # m + c * (s - m), written so that c = 1 gives s bit for bit and still has a derivative
    return scores + (factor - 1) * (scores - row_minimum)


def suppression_gradient(
    gradient: Tensor, scores: Tensor, factor: Tensor | None, mode: str, visible: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients by the scores and by the factors, from the one by `suppress_scores` of them.

    Args:
        gradient: (..., queries, keys), 0 where nothing is visible.
        scores, factor, mode, visible: as for `suppress_scores`; no factor is one of 1.

    Returns:
        two of (..., queries, keys); no second one without a factor. In "log_additive" the second is `gradient` / c, and
        the caller's to find where c = 0: exp(s - lse) · (dP - delta), the limit from the right.
    """
    if factor is None:
        return gradient, None
    if mode == "log_additive":
        return gradient, gradient / torch.where(factor == 0, 1.0, factor)
    if mode == "multiplicative" or scores.shape[-1] == 0:
        return factor * gradient, gradient * scores
    seen = scores.masked_fill(~visible, math.inf)
    minimum = seen.amin(dim=-1, keepdim=True)
    least = seen == minimum  # several share what goes through the minimum; of a row that sees nothing: all, and 0
    through_minimum = ((1 - factor) * gradient).sum(-1, keepdim=True) / least.sum(-1, keepdim=True)
    above = (scores - minimum.masked_fill(minimum == math.inf, 0.0)).masked_fill(~visible, 0.0)
    return factor * gradient + least * through_minimum, gradient * above


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
