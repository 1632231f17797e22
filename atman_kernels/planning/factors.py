"""Factor rows: how much of every key's score each variant keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from atman_kernels.arguments import integer, real
from atman_kernels.errors import InputError
from atman_kernels.formula import widened
from atman_kernels.planning.units import Unit


def factor_rows(
    units: Sequence[Unit],
    length: int,
    factor: float,
    *,
    embeddings: torch.Tensor | None = None,
    similarity_threshold: float | None = None,
) -> torch.Tensor:
    """One row of factors per unit: `factor` at the unit's own tokens, 1 everywhere else.

    With a similarity threshold κ the tokens that mean the same are suppressed along with the unit (AtMan,
    arXiv 2301.08110, section 3.3): a key k whose input embedding has cosine s ≥ κ with the mean embedding of
    the unit's tokens gets 1 − (1 − factor)·s. The unit's own tokens keep exactly `factor`.

    Args:
        units: n_units units; their token indices are positions in the sequence.
        length: number of tokens in the sequence.
        factor: finite, >= 0.
        embeddings: (length, width) input embeddings; needed with a similarity threshold only. Cosines are
            computed in float32, in float64 for float64 embeddings. A zero embedding is similar to nothing.
        similarity_threshold: κ in (0, 1], or None for no neighbours.

    Returns:
        (n_units, length) float32; on the embeddings' device if neighbours are asked for, else on the CPU.

    Raises:
        InputError: no units, a unit without tokens or with tokens outside the sequence, a factor or threshold
            outside its range, embeddings missing, of another shape or not finite.

    >>> units = [Unit("to", 0, 2, (0,)), Unit("be or", 3, 8, (1, 2)), Unit("to", 9, 11, (3,))]
    >>> factor_rows(units, 4, 0.5)
    tensor([[0.5000, 1.0000, 1.0000, 1.0000],
            [1.0000, 0.5000, 0.5000, 1.0000],
            [1.0000, 1.0000, 1.0000, 0.5000]])
    >>> embeddings = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [4.0, 3.0]])
    >>> factor_rows(units, 4, 0.5, embeddings=embeddings, similarity_threshold=0.7)
    tensor([[0.5000, 1.0000, 1.0000, 0.6000],
            [1.0000, 0.5000, 0.5000, 1.0000],
            [0.6000, 1.0000, 1.0000, 0.5000]])
    """
    _check_units(units, length)
    factor = checked_factor(factor)
    if similarity_threshold is None:
        rows = torch.ones(len(units), length, dtype=torch.float32, device="cpu")
    else:
        threshold = checked_threshold(similarity_threshold)
        rows = _neighbour_rows(units, factor, _checked_embeddings(embeddings, length), threshold)
    for row, unit in zip(rows, units, strict=True):
        row[list(unit.token_indices)] = factor
    return rows


def subset_rows(rows: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Factors that suppress several units at once, from those that suppress each of them.

    A token that several of them own, or neighbour, keeps the least that any of them leaves it; where they amplify
    it (factors above 1), the most.

    Args:
        rows: (n_units, length), as `factor_rows` makes them.
        masks: (n_variants, n_units) bool, True = suppressed.

    Returns:
        (n_variants, length), in the rows' dtype and on their device.

    Raises:
        InputError: masks of another dtype or width.

    >>> rows = torch.tensor([[0.5, 1.0, 1.0], [0.2, 0.2, 1.0]])
    >>> subset_rows(rows, torch.tensor([[True, False], [True, True], [False, False]]))
    tensor([[0.5000, 1.0000, 1.0000],
            [0.2000, 0.2000, 1.0000],
            [1.0000, 1.0000, 1.0000]])
    """
    if masks.dtype != torch.bool or masks.dim() != 2 or masks.shape[1] != len(rows):
        raise InputError(f"masks: got {masks.dtype} {tuple(masks.shape)}, expected bool (n_variants, {len(rows)})")
    result = torch.ones(len(masks), rows.shape[1], dtype=rows.dtype, device=rows.device)
    for row, mask in zip(result, masks.to(rows.device), strict=True):
        chosen = rows[mask]
        if len(chosen):
            least = chosen.amin(dim=0)
            row.copy_(torch.where(least < 1, least, chosen.amax(dim=0)))
    return result


def first_suppressed(factors: torch.Tensor) -> torch.Tensor:
    """First position of every row whose factor is not 1; the row's length where there is none.

    Args:
        factors: (n_units, length).

    Returns:
        (n_units,) int64, on the device of the factors.

    Raises:
        InputError: factors that are no matrix.

    >>> first_suppressed(torch.tensor([[1.0, 0.1, 1.0, 0.1], [1.0, 1.0, 1.0, 1.0]]))
    tensor([1, 4])
    """
    if not isinstance(factors, torch.Tensor) or factors.dim() != 2:
        came = tuple(factors.shape) if isinstance(factors, torch.Tensor) else type(factors).__name__
        raise InputError(f"factors: got {came}, expected a tensor of shape (n_units, length)")
    n_units, length = factors.shape
    if length == 0:
        return torch.zeros(n_units, dtype=torch.int64, device=factors.device)
    touched = factors != 1  # [n_units, length]
    first = touched.byte().argmax(dim=1)  # argmax gives the first of equal maxima
    return first.masked_fill_(~touched.any(dim=1), length)


def _neighbour_rows(units: Sequence[Unit], factor: float, embeddings: torch.Tensor, threshold: float) -> torch.Tensor:
    """1 − (1 − factor)·cos where cos ≥ threshold, else 1: [n_units, length]; the only matrix of that size."""
    keys = widened(embeddings.detach())
    means = torch.stack([keys[list(unit.token_indices)].mean(dim=0) for unit in units])  # [n_units, width]
    rows = _directions(means) @ _directions(keys).T
    # The few roundings of a cosine must not decide whether a token matches its own twin at κ = 1.
    matches = rows >= threshold - 8 * torch.finfo(keys.dtype).eps
    rows.clamp_(max=1).mul_(factor - 1).add_(1)
    return rows.masked_fill_(~matches, 1).to(torch.float32)


def _directions(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors scaled to norm 1; zero vectors stay zero."""
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scaled = vectors / largest.masked_fill(largest == 0, 1)  # squares of tiny or huge entries leave the range
    norms: torch.Tensor = scaled.norm(dim=-1, keepdim=True)
    return scaled / norms.clamp(min=1)  # below 1 for zero vectors only


def checked_factor(factor: Any, name: str = "factor", expected: str = "a finite number >= 0") -> float:
    """Raises InputError if it is no number >= 0 that float32, in which factors are kept, holds."""
    return real(factor, name, expected, lambda x: 0 <= x <= torch.finfo(torch.float32).max)


def checked_threshold(threshold: Any) -> float:
    """Raises InputError if it is no number in (0, 1]."""
    return real(threshold, "similarity_threshold", "in (0, 1] or None", lambda x: 0 < x <= 1)


def _check_units(units: Sequence[Unit], length: int) -> None:
    length = integer(length, "length", least=1)
    if not units:
        raise InputError("units: got none, expected at least one")
    for index, unit in enumerate(units):
        tokens = unit.token_indices
        if not tokens:
            raise InputError(f"units[{index}]: got {unit.text!r} without tokens, expected at least one token")
        if min(tokens) < 0 or max(tokens) >= length:
            raise InputError(
                f"units[{index}]: got token positions {min(tokens)} to {max(tokens)}, "
                f"expected positions from 0 to {length - 1}"
            )


def _checked_embeddings(embeddings: torch.Tensor | None, length: int) -> torch.Tensor:
    """The embeddings, once they are fit for cosines."""
    if embeddings is None:
        raise InputError("embeddings: got None, expected the ones that similarity_threshold compares")
    if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
        came = embeddings.dtype if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise InputError(f"embeddings: got {came}, expected a floating-point tensor")
    if embeddings.dim() != 2 or embeddings.shape[0] != length:
        raise InputError(f"embeddings: got shape {tuple(embeddings.shape)}, expected ({length}, width)")
    if not embeddings.isfinite().all():
        raise InputError("embeddings: got values that are not finite, expected finite ones")
    return embeddings
