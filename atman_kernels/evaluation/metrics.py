"""Measures of explanations: against a known truth, against the model itself, and against each other.

Every measure takes plain tensors of relevance, one value per unit (or pixel), positive = important.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atman_kernels.arguments import entries, flag, integer, real
from atman_kernels.errors import InputError


@dataclass(frozen=True)
class Localisation:
    """How well explanations point to what they should, item by item.

    Attributes:
        precision: (n_items,) share of the relevance that lies on the truth, see `precision`.
        recall: (n_items,) share of the truth that is covered, see `recall`.

    >>> Localisation(precision=torch.tensor([1.0, 0.5]), recall=torch.tensor([0.0, 1.0])).summary()
    {'mAP': 0.75, 'mAP_IQ': 0.75, 'mAR': 0.5, 'mAR_IQ': 0.5}
    """

    precision: Tensor
    recall: Tensor

    def summary(self) -> dict[str, float]:
        """mAP and mAR, the means over the items, and mAP_IQ and mAR_IQ, their interquartile means."""
        return {
            "mAP": float(self.precision.mean()),
            "mAP_IQ": interquartile_mean(self.precision),
            "mAR": float(self.recall.mean()),
            "mAR_IQ": interquartile_mean(self.recall),
        }


def localisation(relevances: Sequence[Tensor], masks: Sequence[Tensor]) -> Localisation:
    """Average precision and recall of explanations with a known truth, as in AtMan (arXiv 2301.08110, section 4).

    Args:
        relevances: one per item, of any shape; below 0 counts as 0.
        masks: one per item, of the same shape, True (or 1) where the truth is; fractions count in part.

    Raises:
        InputError: no items, not as many masks, or an item as `precision` refuses it.

    >>> pointing = localisation([torch.tensor([3.0, 1.0, 0.0])], [torch.tensor([True, False, True])])
    >>> pointing.summary()
    {'mAP': 0.75, 'mAP_IQ': 0.75, 'mAR': 0.5, 'mAR_IQ': 0.5}
    """
    relevances, masks = (
        list(given) if isinstance(given, Tensor) and given.ndim else entries(given, name, "tensors")
        for name, given in (("relevances", relevances), ("masks", masks))
    )
    if not len(relevances) or len(relevances) != len(masks):
        raise InputError(
            f"relevances, masks: got {len(relevances)} and {len(masks)}, expected as many of both and at least one"
        )
    pairs = list(zip(relevances, masks, strict=True))
    return Localisation(
        precision=torch.tensor([precision(*pair) for pair in pairs], dtype=torch.float64, device="cpu"),
        recall=torch.tensor([recall(*pair) for pair in pairs], dtype=torch.float64, device="cpu"),
    )


def precision(relevance: Tensor, mask: Tensor) -> float:
    """Share of the relevance that lies on the truth: Σ x·y / Σ x, x the relevance clipped at 0, y the mask.

    Where no relevance is positive nothing was found, and the precision is 0.

    Args:
        relevance: of any shape, finite.
        mask: of the same shape, values in [0, 1], not 0 everywhere.

    Raises:
        InputError: shapes differ, relevance is not finite, or the mask is empty or holds other values.

    >>> precision(torch.tensor([3.0, 1.0, -5.0]), torch.tensor([True, False, False]))
    0.75
    """
    x, y = _checked_item(relevance, mask)
    x = x / x.max().clamp(min=torch.finfo(x.dtype).tiny)  # sums of huge values stay in range
    return float((x * y).sum() / x.sum()) if x.any() else 0.0


def recall(relevance: Tensor, mask: Tensor) -> float:
    """Share of the truth that the relevance covers: Σ (x / max x)·y / Σ y, x the relevance clipped at 0, y the mask.

    It is 1 where every unit of the truth is as relevant as the most relevant of all units, and 0 where no relevance
    is positive. Arguments and errors: see `precision`.

    >>> recall(torch.tensor([3.0, 1.5, -5.0]), torch.tensor([True, True, False]))
    0.75
    """
    x, y = _checked_item(relevance, mask)
    return float((x / x.max() * y).sum() / y.sum()) if x.any() else 0.0


def interquartile_mean(values: Tensor) -> float:
    """Mean of the middle half: by rank, the lowest and the highest quarter (rounded down) of the items are left out.

    Args:
        values: (n_items,), finite; at least one.

    Raises:
        InputError: values are empty, not finite or no vector.
        ImportError: scipy is missing.

    >>> interquartile_mean(torch.tensor([0.0, 4.0, 6.0, 100.0]))
    5.0
    """
    return float(_stats().trim_mean(_checked_vector(values, "values").numpy(), 0.25))


def hit(relevance: Tensor, truth: Tensor, k: int = 1) -> bool:
    """Whether a unit of the truth is among the k most relevant.

    Ties count against the explanation: equal units stand before those of the truth, so a constant map never hits
    by luck, and a hit does not depend on how equal values are sorted. So does relevance that is not positive.

    Args:
        relevance: of any shape, finite.
        truth: bool, of the same shape, True for at least one unit.
        k: >= 1.

    Raises:
        InputError: see `precision`; k is no positive integer; truth is not bool.

    >>> relevance, truth = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([False, False, True])
    >>> hit(relevance, truth, k=1), hit(relevance, truth, k=2)
    (False, True)
    """
    k = integer(k, "k", least=1)
    if not isinstance(truth, Tensor) or truth.dtype != torch.bool:
        raise InputError(f"truth: got {_described(truth)}, expected a bool tensor")
    x, _ = _checked_item(relevance, truth, "truth")
    best = x[truth].max()
    ahead = int((x[~truth] >= best).sum())
    return bool(best > 0) and ahead < k


@dataclass(frozen=True)
class Faithfulness:
    """The target's log-probability while units are suppressed one after the other.

    Insertion is the same runs read backwards: with the k most relevant units left, the others were deleted in the
    order least relevant first. So `least_first.flip(0)` is the insertion curve most relevant first, and deletion and
    insertion enclose the same area.

    Attributes:
        fractions: (points,) share of the units that are suppressed, from 0 to 1.
        most_first: (points,) log-probs, the most relevant units suppressed first.
        least_first: (points,) log-probs, the least relevant units suppressed first.

    >>> Faithfulness(torch.tensor([0.0, 1.0]), torch.tensor([4.0, 0.0]), torch.tensor([4.0, 0.0])).area
    0.0
    """

    fractions: Tensor
    most_first: Tensor
    least_first: Tensor

    @property
    def area(self) -> float:
        """∫ least_first − most_first over the share of suppressed units, by trapezoids, in nats.

        Positive = the order of the relevance is better than its reverse; an order at random gives 0 on average.
        """
        return float(torch.trapezoid(self.least_first - self.most_first, self.fractions))


def faithfulness(relevance: Tensor, logprobs: Callable[[Tensor], Tensor], steps: int | None = None) -> Faithfulness:
    """Suppress the units in order of relevance and follow the target.

    Args:
        relevance: (n_units,), finite; equal units are taken in their own order, and backwards in the reverse order.
        logprobs: called once with bool (variants, n_units), True = suppressed; returns the target's log-prob for each
            variant, (variants,), finite.
        steps: into how many steps the way from none to all units is divided; None for one unit per step.

    Raises:
        InputError: relevance is no finite vector, steps is not in [1, n_units], or logprobs returns something else.

    >>> weights = torch.tensor([1.0, 3.0])  # a target that loses a unit's weight with the unit
    >>> curves = faithfulness(torch.tensor([0.1, 0.9]), lambda suppressed: 4 - (suppressed * weights).sum(1))
    >>> curves.most_first.tolist(), curves.least_first.tolist(), curves.area
    ([4.0, 1.0, 0.0], [4.0, 3.0, 0.0], 1.0)
    """
    n = len(_checked_vector(relevance, "relevance"))
    expected = f"None or an integer from 1 to {n}"
    steps = n if steps is None else integer(steps, "steps", least=1, most=n, expected=expected)
    counts = torch.linspace(0, n, steps + 1, dtype=torch.float64, device="cpu").round().long()
    rank = relevance.detach().cpu().argsort(descending=True, stable=True).argsort()  # 0 = most relevant
    most = rank < counts[:, None]  # [points, n_units]
    least = rank >= n - counts[1:-1, None]  # the ends are the same as those of `most`
    suppressed = torch.cat([most, least])
    found = logprobs(suppressed)
    if not isinstance(found, Tensor) or found.shape != suppressed.shape[:1] or not found.isfinite().all():
        raise InputError(f"logprobs: it returned {_described(found)}, expected ({len(suppressed)},) finite values")
    found = found.detach().double().cpu()
    first, between = found[: steps + 1], found[steps + 1 :]
    return Faithfulness(counts / n, first, torch.cat([first[:1], between, first[-1:]]))


def confidence_interval(
    values: Tensor, *, interquartile: bool = False, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of the mean over items, or of their interquartile mean.

    Args:
        values: (n_items,), finite; at least two.
        interquartile: for `interquartile_mean` instead of the mean.
        level: in (0, 1).
        resamples: how often the items are drawn anew, with replacement.
        seed: of the draws; equal seeds give equal intervals.

    Raises:
        InputError: an argument is outside its range.
        ImportError: scipy is missing.

    >>> confidence_interval(torch.tensor([0.5, 0.5, 0.5]))
    (0.5, 0.5)
    """
    items = _checked_vector(values, "values").numpy()
    if len(items) < 2:
        raise InputError("values: got one item, expected at least two")
    level = real(level, "level", "a number between 0 and 1", lambda x: 0 < x < 1)
    resamples, seed = integer(resamples, "resamples", least=1), integer(seed, "seed", least=0)
    interquartile = flag(interquartile, "interquartile")
    stats = _stats()

    def statistic(sample: Any, axis: int) -> Any:
        return stats.trim_mean(sample, 0.25 if interquartile else 0.0, axis=axis)

    interval = stats.bootstrap(
        (items,),
        statistic,
        confidence_level=level,
        n_resamples=resamples,
        method="percentile",
        batch=max(1, 2**22 // len(items)),  # keeps the drawn items within tens of megabytes
        random_state=np.random.default_rng(seed),  # newer versions call it rng; this name they all take
    ).confidence_interval
    return float(interval.low), float(interval.high)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two explanations of the same units; ties share their mean rank.

    Raises:
        InputError: no finite vectors of one length, or one of them is constant, so that it has no ranks.
        ImportError: scipy is missing.

    >>> round(rank_correlation(torch.tensor([0.1, 0.2, 9.0]), torch.tensor([-1.0, 2.0, 3.0])), 6)
    1.0
    """
    a, b = _checked_vector(first, "first"), _checked_vector(second, "second")
    if len(a) != len(b):
        raise InputError(f"second: got {len(b)} values, expected {len(a)} as in first")
    for name, values in (("first", a), ("second", b)):
        if bool((values == values[0]).all()):
            raise InputError(f"{name}: got a constant, expected values that have ranks")
    return float(_stats().spearmanr(a.numpy(), b.numpy()).statistic)


def _checked_item(relevance: Tensor, mask: Tensor, mask_name: str = "mask") -> tuple[Tensor, Tensor]:
    """Relevance clipped at 0 and mask, both float64 on the CPU."""
    if not isinstance(relevance, Tensor) or relevance.is_complex():
        raise InputError(f"relevance: got {_described(relevance)}, expected a real tensor")
    if not isinstance(mask, Tensor) or mask.shape != relevance.shape:
        raise InputError(f"{mask_name}: got {_described(mask)}, expected shape {tuple(relevance.shape)} as relevance")
    if not relevance.isfinite().all():
        raise InputError("relevance: got values that are not finite, expected finite ones")
    x, y = relevance.detach().double().cpu().clamp(min=0), mask.detach().double().cpu()
    if not ((y >= 0) & (y <= 1)).all():
        raise InputError(f"{mask_name}: got values outside [0, 1], expected a mask")
    if not y.any():
        raise InputError(f"{mask_name}: got an empty one, expected at least one unit of truth")
    return x, y


def _checked_vector(values: Tensor, name: str) -> Tensor:
    """A vector as float64 on the CPU."""
    if not isinstance(values, Tensor) or values.is_complex() or values.ndim != 1 or not len(values):
        raise InputError(f"{name}: got {_described(values)}, expected a real vector of at least one value")
    if not values.isfinite().all():
        raise InputError(f"{name}: got values that are not finite, expected finite ones")
    return values.detach().double().cpu()


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    nature = "" if value.isfinite().all() else ", not all finite"
    return f"{value.dtype} of shape {tuple(value.shape)}{nature}"


def _stats() -> Any:
    try:
        from scipy import stats  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("these measures need scipy: pip install atman-kernels[evaluation]") from error
    return stats
