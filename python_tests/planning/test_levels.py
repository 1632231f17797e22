"""Levels of nested units: what they may be, how a text is cut into them, and which units are opened."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atman_kernels.errors import InputError
from atman_kernels.planning.levels import FEWEST, MOST, Levels, checked_units, divisible, opened, split_levels

TEXT = "One. Two three.\n\nFour five. Six.\n\nSeven"
GRANULARITIES = ("paragraph", "sentence", "word", "token")


def by_characters(text, width=3):
    return [(at, min(at + width, len(text))) for at in range(0, len(text), width)]


def test_every_level_cuts_the_one_above():
    one, two, three = split_levels(TEXT, by_characters(TEXT, 1), Levels(("paragraph", "sentence", "word")))
    assert [unit.text for unit in one] == ["One. Two three.", "Four five. Six.", "Seven"]
    assert [(unit.text, unit.parent) for unit in two] == [
        ("One.", 0), ("Two three.", 0), ("Four five.", 1), ("Six.", 1), ("Seven", 2),
    ]  # fmt: skip
    assert [unit.text for unit in three if unit.parent == 1] == ["Two", "three", "."]


def test_documents_are_cut_at_their_rims():
    documents = ((0, 8, "Doc A"), (8, 26, "Doc B"))  # the second sentence lies in both
    one, two = split_levels(TEXT, by_characters(TEXT, 1), Levels((documents, "sentence")))
    assert [unit.name for unit in one] == ["Doc A", "Doc B"]
    assert [(unit.text, unit.parent) for unit in two] == [("One.", 0), ("Two", 0), ("three.", 1), ("Four five", 1)]


texts = st.text(st.sampled_from("ab.!\n  é\u4e2d"), min_size=1, max_size=60)


@given(texts, st.integers(1, 4), st.sets(st.sampled_from(GRANULARITIES), min_size=2))
def test_levels_share_out_the_tokens_of_their_parents(text, width, chosen):
    levels = Levels(tuple(name for name in GRANULARITIES if name in chosen))
    found = split_levels(text, by_characters(text, width), levels)
    for above, level in pairwise(found):
        for number, parent in enumerate(above):
            inside = [unit for unit in level if unit.parent == number]
            assert sorted(token for unit in inside for token in unit.token_indices) == sorted(parent.token_indices)
            assert all(parent.start <= unit.start <= unit.end <= parent.end or not unit.text.strip() for unit in inside)
    assert all(unit.text == text[unit.start : unit.end] for level in found for unit in level)
    assert divisible(found[-1], []) == [False] * len(found[-1])


@given(st.lists(st.floats(-100, 100), max_size=30), st.none() | st.integers(1, 40))
def test_the_strongest_are_opened(totals, count):
    found = opened(totals, count)
    assert found == sorted(set(found))
    least, most = (FEWEST, MOST) if count is None else (count, count)
    assert min(least, len(totals)) <= len(found) <= most
    weakest = min((abs(totals[i]) for i in found), default=0)
    assert all(abs(total) <= weakest for i, total in enumerate(totals) if i not in found)
    if count is None and FEWEST < len(found) < MOST:
        sizes = sorted(map(abs, totals))
        assert sum(abs(totals[i]) for i in found) >= 0.8 * sum(sizes) * (1 - 1e-9)
        assert sum(sorted(abs(totals[i]) for i in found)[1:]) < 0.8 * sum(sizes)


SPANS = [(0, 4), (5, 9)]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (("word",), r"got one level, \('word',\); expected two or more, or 'word' by itself"),
        (("word", "sentence"), "expected each level to refine the one before it; sentences do not refine words"),
        (("word", "word"), "words do not refine words"),
        (("line", "word"), "got the level 'line', expected one of token, word, sentence, paragraph, or for the first"),
        (("paragraph", "line"), "got the level 'line', expected one of token"),
        (("paragraph", SPANS), r"got the level \[\(0, 4\), \(5, 9\)\], expected one of token"),
        (([(0, 4), (3, 9, "B")], "word"), r"got spans \(0, 4\) and \(3, 9, 'B'\), expected spans .* not to overlap"),
        (([(0, "x")], "word"), r"units\[0\]: got \(0, 'x'\), expected a span"),
        ((7, "word"), "units: got 7, expected"),
        ((0, 120, "Doc A"), "units: got 0, expected"),
    ],
)
def test_what_levels_must_not_be(units, message):
    with pytest.raises(InputError, match=message):
        checked_units(units)
