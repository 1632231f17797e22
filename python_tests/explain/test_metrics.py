"""Measures of explanations on cases small enough to work out by hand."""

import doctest
import math

import pytest
import torch
from torch import tensor

from atman_kernels import InputError
from atman_kernels.evaluation import metrics

ON_FIRST = tensor([True, False, False, False])


def test_precision_and_recall_by_hand() -> None:
    relevance = tensor([[4.0, 2.0], [2.0, -9.0]])  # clipped: 4 2 2 0
    mask = tensor([[True, False], [True, True]])
    assert metrics.precision(relevance, mask) == pytest.approx(6 / 8)
    assert metrics.recall(relevance, mask) == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_fraction_of_a_unit_counts_in_part() -> None:
    relevance, mask = tensor([2.0, 2.0]), tensor([1.0, 0.5])
    assert metrics.precision(relevance, mask) == pytest.approx(3 / 4)
    assert metrics.recall(relevance, mask) == pytest.approx(1.0)


@pytest.mark.parametrize("relevance", [torch.zeros(4), tensor([-1.0, -2.0, 0.0, -0.5])])
def test_a_map_without_positive_relevance_finds_nothing(relevance: torch.Tensor) -> None:
    assert metrics.precision(relevance, ON_FIRST) == 0
    assert metrics.recall(relevance, ON_FIRST) == 0
    assert not metrics.hit(relevance, ON_FIRST, k=4)


def test_scale_does_not_matter_up_to_the_ends_of_the_range() -> None:
    relevance = tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for scale in (1e-320, 1e-30, 1.0, 5e307):
        assert metrics.precision(relevance * scale, ON_FIRST) == pytest.approx(0.75, abs=1e-3)
        assert metrics.recall(relevance * scale, ON_FIRST) == pytest.approx(1.0, abs=1e-3)


def test_localisation_takes_means_over_items() -> None:
    maps = [tensor([1.0, p]) for p in (0.0, 1.0, 3.0, 9.0, 1.0)]  # precisions 1, 1/2, 1/4, 1/10, 1/2; recalls 1, 1, …
    found = metrics.localisation(maps, [tensor([True, False])] * 5)
    assert found.precision.tolist() == pytest.approx([1, 0.5, 0.25, 0.1, 0.5])
    assert found.recall.tolist() == pytest.approx([1, 1, 1 / 3, 1 / 9, 1])
    assert found.summary() == pytest.approx(
        {"mAP": 2.35 / 5, "mAP_IQ": 1.25 / 3, "mAR": (3 + 4 / 9) / 5, "mAR_IQ": (2 + 1 / 3) / 3}
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7),
        ([0.0, 1.0], 0.5),
        ([9.0, 1.0, 2.0, 4.0], 3),
        ([1.0] * 3 + [0.0], 1),
        ([0, 0, 1, 2, 3, 4, 5, 99], 2.5),
    ],
)
def test_interquartile_mean_by_hand(values: list[float], expected: float) -> None:
    assert metrics.interquartile_mean(tensor(values, dtype=torch.float64)) == pytest.approx(expected)


def test_hits_by_hand() -> None:
    relevance = tensor([0.1, 0.9, 0.5, 0.7])
    truth = tensor([True, False, True, False])  # best of the truth: third
    assert [metrics.hit(relevance, truth, k) for k in (1, 2, 3, 4)] == [False, False, True, True]


def test_ties_do_not_hit() -> None:
    equal = torch.ones(4)
    assert [metrics.hit(equal, ON_FIRST, k) for k in (1, 3, 4)] == [False, False, True]
    assert metrics.hit(equal, tensor([True] * 4))
    assert metrics.hit(tensor([1.0, 1.0, 0.0, 0.0]), tensor([True, True, False, False]))


WEIGHTS = tensor([1.0, 4.0, 2.0])


def weighted(suppressed: torch.Tensor) -> torch.Tensor:
    return -(suppressed * WEIGHTS).sum(1)


def test_faithfulness_by_hand() -> None:
    found = metrics.faithfulness(WEIGHTS, weighted)
    assert found.fractions.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert found.most_first.tolist() == [0, -4, -6, -7]
    assert found.least_first.tolist() == [0, -1, -3, -7]
    assert found.area == pytest.approx((3 + 3) / 3)
    assert metrics.faithfulness(-WEIGHTS, weighted).area == pytest.approx(-2)


def test_insertion_is_deletion_read_backwards() -> None:
    order = [1, 2, 0]  # most relevant first
    inserted = [float(weighted(tensor([[unit not in order[:k] for unit in range(3)]]))) for k in range(4)]
    assert metrics.faithfulness(WEIGHTS, weighted).least_first.flip(0).tolist() == inserted


def test_every_variant_is_asked_for_once_and_at_once() -> None:
    calls = []

    def logprobs(suppressed: torch.Tensor) -> torch.Tensor:
        calls.append(suppressed)
        return weighted(suppressed)

    metrics.faithfulness(WEIGHTS, logprobs)
    [asked] = calls
    assert asked.dtype == torch.bool
    assert len(asked.unique(dim=0)) == len(asked) == 6


def test_fewer_steps_skip_counts_and_keep_the_ends() -> None:
    relevance = torch.arange(8.0)
    found = metrics.faithfulness(relevance, lambda suppressed: -suppressed.sum(1).double(), steps=2)
    assert found.fractions.tolist() == [0, 0.5, 1]
    assert found.most_first.tolist() == found.least_first.tolist() == [0, -4, -8]
    assert metrics.faithfulness(tensor([1.0]), lambda suppressed: -suppressed.sum(1).double()).area == 0


def test_equal_units_keep_their_order() -> None:
    assert metrics.faithfulness(torch.ones(3), weighted).most_first.tolist() == [0, -1, -5, -7]
    assert metrics.faithfulness(torch.ones(3), weighted).least_first.tolist() == [0, -2, -6, -7]


def test_confidence_interval_holds_what_theory_says() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    low, high = metrics.confidence_interval(values)
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=half / 10)
    assert (low, high) == metrics.confidence_interval(values, seed=0)
    assert (low, high) != metrics.confidence_interval(values, seed=1)
    narrow = metrics.confidence_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_interval_of_the_interquartile_mean_ignores_an_outlier() -> None:
    values = torch.cat([torch.zeros(40), tensor([1e6])])
    assert metrics.confidence_interval(values, interquartile=True) == (0, 0)
    assert metrics.confidence_interval(values)[1] > 1e4


def test_rank_correlation_by_hand() -> None:
    assert metrics.rank_correlation(tensor([1.0, 2.0, 3.0]), tensor([1.0, 8.0, 9.0])) == pytest.approx(1)
    assert metrics.rank_correlation(tensor([1.0, 2.0, 3.0]), tensor([3.0, 2.0, 1.0])) == pytest.approx(-1)
    # ranks 1 2 3 4 against 1 2.5 2.5 4: covariance 4.5, variances 5 and 4.5
    with_tie = metrics.rank_correlation(tensor([1.0, 2.0, 3.0, 4.0]), tensor([0.0, 5.0, 5.0, 9.0]))
    assert with_tie == pytest.approx(4.5 / math.sqrt(5 * 4.5))


NAN = tensor([math.nan, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("measure", [metrics.precision, metrics.recall, metrics.hit])
@pytest.mark.parametrize(
    ("relevance", "mask", "named"),
    [
        (NAN, ON_FIRST, "relevance: .*finite"),
        (tensor([math.inf, 1.0, 0.0, 0.0]), ON_FIRST, "relevance: .*finite"),
        ([1.0, 0.0, 0.0, 0.0], ON_FIRST, "relevance: got list"),
        (torch.ones(4), torch.zeros(4, dtype=torch.bool), "(mask|truth): got an empty one"),
        (torch.ones(3), ON_FIRST, r"(mask|truth): .*\(4,\).*\(3,\)"),
        (torch.ones(4), [True] * 4, "(mask|truth): got list"),
    ],
)
def test_items_that_are_refused(measure, relevance, mask, named: str) -> None:
    with pytest.raises(InputError, match=named):
        measure(relevance, mask)


@pytest.mark.parametrize("mask", [tensor([2.0, 0.0, 0.0, 0.0]), tensor([-1.0, 1.0, 0.0, 0.0]), NAN])
def test_masks_outside_their_range_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"mask: .*\[0, 1\]"):
        metrics.precision(torch.ones(4), mask)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: metrics.localisation([], []), "relevances, masks: got 0 and 0"),
        (lambda: metrics.localisation([torch.ones(4)], []), "relevances, masks: got 1 and 0"),
        (lambda: metrics.hit(torch.ones(4), ON_FIRST, k=0), "^k must be .*, got 0"),
        (lambda: metrics.hit(torch.ones(4), ON_FIRST, k=True), "^k must be .*, got True"),
        (lambda: metrics.hit(torch.ones(4), ON_FIRST.float()), "truth: .*float32"),
        (lambda: metrics.interquartile_mean(tensor([])), "values: "),
        (lambda: metrics.interquartile_mean(NAN), "values: .*finite"),
        (lambda: metrics.confidence_interval(torch.ones(1)), "values: got one"),
        (lambda: metrics.confidence_interval(NAN), "values: .*finite"),
        (lambda: metrics.confidence_interval(torch.ones(3), level=95), "^level must be .*, got 95"),
        (lambda: metrics.confidence_interval(torch.ones(3), resamples=0), "^resamples must be .*, got 0"),
        (lambda: metrics.rank_correlation(torch.ones(3), torch.arange(3.0)), "first: got a constant"),
        (lambda: metrics.rank_correlation(torch.arange(3.0), torch.ones(3)), "second: got a constant"),
        (lambda: metrics.rank_correlation(torch.arange(3.0), torch.arange(4.0)), "second: got 4 values"),
        (lambda: metrics.rank_correlation(torch.arange(4.0), NAN), "second: .*finite"),
        (lambda: metrics.faithfulness(NAN, weighted), "relevance: .*finite"),
        (lambda: metrics.faithfulness(torch.ones(2, 2), weighted), r"relevance: .*\(2, 2\)"),
        (lambda: metrics.faithfulness(WEIGHTS, weighted, steps=4), "^steps must be .*, got 4"),
        (lambda: metrics.faithfulness(WEIGHTS, weighted, steps=0), "^steps must be .*, got 0"),
        (lambda: metrics.faithfulness(WEIGHTS, lambda s: weighted(s)[1:]), r"logprobs: .*\(5,\).*\(6,\)"),
        (lambda: metrics.faithfulness(WEIGHTS, lambda s: weighted(s) * math.nan), "logprobs: .*not all finite"),
        (lambda: metrics.faithfulness(WEIGHTS, lambda s: None), "logprobs: it returned NoneType"),
    ],
)
def test_bad_input_is_named(call, named: str) -> None:
    with pytest.raises(InputError, match=named) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_the_examples_run() -> None:
    done = doctest.testmod(metrics, raise_on_error=False)
    assert done.attempted
    assert not done.failed
