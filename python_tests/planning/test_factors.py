"""Factor rows against plain loops."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atman_kernels.errors import InputError
from atman_kernels.planning import factors as factors_module
from atman_kernels.planning.factors import factor_rows, first_suppressed
from atman_kernels.planning.units import Unit


def unit(*tokens: int) -> Unit:
    return Unit("shown", 0, 5, tokens)


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def rows_by_loops(units, length, factor, embeddings, threshold):
    """The definition, one key at a time, in Python's floats; and how near a cosine came to the threshold."""
    vectors = embeddings.double().tolist()
    rows, margin = [], math.inf
    for each in units:
        members = [vectors[token] for token in each.token_indices]
        mean = [math.fsum(column) / len(members) for column in zip(*members, strict=True)]
        row = []
        for key in range(length):
            similarity = cosine(vectors[key], mean)
            if key in each.token_indices:
                row.append(factor)
                continue
            margin = min(margin, abs(similarity - threshold))
            row.append(1 - (1 - factor) * min(similarity, 1) if similarity >= threshold else 1.0)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32), margin


def test_without_neighbours_only_the_units_tokens_are_touched():
    rows = factor_rows([unit(0), unit(2, 3), unit(3, 1)], 5, 0.1)
    assert rows.dtype == torch.float32
    assert rows.tolist() == torch.tensor([[0.1, 1, 1, 1, 1], [1, 1, 0.1, 0.1, 1], [1, 0.1, 1, 0.1, 1]]).tolist()


def test_embeddings_alone_ask_for_no_neighbours():
    rows = factor_rows([unit(0)], 3, 0.1, embeddings=torch.ones(3, 4))
    assert rows.tolist() == factor_rows([unit(0)], 3, 0.1).tolist()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 9),
    width=st.integers(1, 6),
    factor=st.sampled_from([0, 0.0, 0.1, 0.5, 1.0, 3.0]),
    threshold=st.floats(0.01, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_neighbours_against_plain_loops(seed, length, width, factor, threshold, dtype, data):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(length, width, generator=generator).to(dtype)
    members = st.lists(st.integers(0, length - 1), min_size=1, max_size=length, unique=True)
    units = [unit(*tokens) for tokens in data.draw(st.lists(members, min_size=1, max_size=4))]

    expected, margin = rows_by_loops(units, length, factor, embeddings, threshold)
    rows = factor_rows(units, length, factor, embeddings=embeddings, similarity_threshold=threshold)
    assert rows.dtype == torch.float32
    if margin > 1e-5:  # else rounding may decide
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
    for each, row in zip(units, rows, strict=True):
        own = list(each.token_indices)
        assert (row[own] == torch.tensor(factor, dtype=torch.float32)).all()  # exactly


def test_the_mean_embedding_stands_for_a_unit():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [5.0, 0.0]])
    rows = factor_rows([unit(0, 1)], 4, 0.2, embeddings=embeddings, similarity_threshold=0.7)
    expected = torch.tensor([[0.2, 0.2, 0.2, 1 - 0.8 * math.sqrt(0.5)]])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)


def test_opposite_and_orthogonal_tokens_are_left_alone():
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    rows = factor_rows([unit(0)], 3, 0.1, embeddings=embeddings, similarity_threshold=1e-6)
    assert rows[0, 1:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_twins_match_at_the_highest_threshold(dtype):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(200, 577, generator=generator).to(dtype)
    embeddings = torch.cat([half, half])
    units = [unit(token) for token in range(200)]
    rows = factor_rows(units, 400, 0.1, embeddings=embeddings, similarity_threshold=1.0)
    torch.testing.assert_close(rows[:, 200:].diagonal(), torch.full((200,), 0.1), rtol=0, atol=2e-6)
    assert (rows[:, 200:] != 1).sum() == 200
    assert (rows >= 0.1).all()  # cosines above 1 by rounding are clipped


def test_a_factor_of_zero_never_becomes_negative():
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(1, 577, generator=generator)
    scales = torch.rand(500, 1, generator=generator) + 0.1
    rows = factor_rows([unit(0)], 500, 0, embeddings=vector * scales, similarity_threshold=0.9)
    assert (rows >= 0).all()
    assert (rows < 1e-5).all()


def test_zero_embeddings_match_nothing():
    embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    rows = factor_rows([unit(0), unit(1), unit(1, 3)], 4, 0.1, embeddings=embeddings, similarity_threshold=1e-9)
    assert (rows != 1).tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, False, True],  # their mean is zero
    ]


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=["tiny", "huge"])
def test_the_scale_of_embeddings_does_not_matter(scale):
    embeddings = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    units = [unit(0), unit(1, 2)]
    expected = factor_rows(units, 6, 0.1, embeddings=embeddings, similarity_threshold=0.05)
    rows = factor_rows(units, 6, 0.1, embeddings=embeddings * scale, similarity_threshold=0.05)
    assert (expected != 1).sum() > 3
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


def test_float64_embeddings_are_compared_in_float64():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 1e-5]], dtype=torch.float64)  # cosine 1 − 5e-11
    options = {"similarity_threshold": 1 - 1e-12}
    assert factor_rows([unit(0)], 2, 0.1, embeddings=embeddings, **options)[0, 1] == 1
    assert factor_rows([unit(0)], 2, 0.1, embeddings=embeddings.float(), **options)[0, 1] != 1


def test_embeddings_with_gradients_give_plain_rows():
    embeddings = torch.nn.Parameter(torch.ones(3, 4))
    rows = factor_rows([unit(0)], 3, 0.1, embeddings=embeddings, similarity_threshold=0.5)
    assert not rows.requires_grad
    assert embeddings.tolist() == torch.ones(3, 4).tolist()


# First suppressed position


@given(st.lists(st.lists(st.sampled_from([1.0, 1.0, 0.0, 0.1, 2.0]), min_size=5, max_size=5), min_size=1))
def test_first_suppressed_against_a_plain_loop(rows):
    expected = [next((at for at, value in enumerate(row) if value != 1), 5) for row in rows]
    found = first_suppressed(torch.tensor(rows))
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_first_suppressed_of_factor_rows():
    embeddings = torch.tensor([[1.0, 0.1], [0.0, 1.0], [1.0, 0.0]])
    rows = factor_rows([unit(2), unit(1)], 3, 0.1, embeddings=embeddings, similarity_threshold=0.9)
    assert first_suppressed(rows).tolist() == [0, 1]  # a neighbour comes before the unit
    assert first_suppressed(factor_rows([unit(2)], 3, 1.0)).tolist() == [3]


def test_first_suppressed_of_empty_rows():
    assert first_suppressed(torch.ones(2, 0)).tolist() == [0, 0]
    assert first_suppressed(torch.ones(0, 3)).tolist() == []


@pytest.mark.parametrize(("factors", "came"), [(torch.ones(3), r"\(3,\)"), ([[1.0]], "list")])
def test_first_suppressed_wants_a_matrix(factors, came):
    with pytest.raises(InputError, match=f"factors: got {came}"):
        first_suppressed(factors)


# Errors

SOME = torch.ones(4, 2)
ERRORS = {
    "negative factor": ({"factor": -0.1}, r"factor must be a finite number >= 0, got -0.1"),
    "factor nan": ({"factor": math.nan}, r"factor must be .*, got nan"),
    "factor infinite": ({"factor": math.inf}, r"factor must be .*, got inf"),
    "factor of another type": ({"factor": "0.1"}, r"factor must be .*, got '0.1'"),
    "factor bool": ({"factor": True}, r"factor must be .*, got True"),
    "no units": ({"units": []}, r"units: got none"),
    "unit without tokens": ({"units": [unit(0), unit()]}, r"units\[1\]: got 'shown' without tokens"),
    "unit beyond the sequence": ({"units": [unit(1, 4)]}, r"units\[0\]: got token positions 1 to 4, .* 3$"),
    "unit before the sequence": ({"units": [unit(-1)]}, r"units\[0\]: got token positions -1"),
    "length zero": ({"length": 0}, r"length must be an integer >= 1, got 0"),
    "length of another type": ({"length": 4.0}, r"length must be .*, got 4.0"),
    "threshold zero": ({"similarity_threshold": 0.0}, r"similarity_threshold must be in \(0, 1\] or None, got 0.0"),
    "threshold above one": ({"similarity_threshold": 1.01}, r"similarity_threshold must be .*, got 1.01"),
    "threshold nan": ({"similarity_threshold": math.nan}, r"similarity_threshold must be .*, got nan"),
    "threshold bool": ({"similarity_threshold": True}, r"similarity_threshold must be .*, got True"),
    "no embeddings": ({"embeddings": None}, r"embeddings: got None"),
    "embeddings of another length": ({"embeddings": SOME[:3]}, r"embeddings: got shape \(3, 2\), .*\(4, "),
    "embeddings in batches": ({"embeddings": SOME[None]}, r"embeddings: got shape \(1, 4, 2\)"),
    "embeddings of integers": ({"embeddings": SOME.long()}, r"embeddings: got torch.int64"),
    "embeddings not finite": ({"embeddings": SOME / 0}, r"embeddings: got values that are not finite"),
}


@pytest.mark.parametrize(("wrong", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_wrong_arguments_are_named(wrong, message):
    arguments = {
        "units": [unit(0)], "length": 4, "factor": 0.1, "embeddings": SOME, "similarity_threshold": 0.5,
    }  # fmt: skip
    factor_rows(**arguments)
    with pytest.raises(InputError, match=message):
        factor_rows(**{**arguments, **wrong})


def test_examples_of_the_docstrings():
    result = doctest.testmod(factors_module)
    assert result.attempted > 0
    assert result.failed == 0
