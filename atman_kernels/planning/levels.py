"""Nested units: what the coarsest level is cut into, and which units of a level are opened into the next one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from atman_kernels.arguments import shown
from atman_kernels.errors import InputError
from atman_kernels.planning.units import GRANULARITIES, SpanChoice, Unit, checked_choice, split_units

EFFECT = 0.8  # of a level, which the units that are opened make up together
FEWEST, MOST = 3, 5  # units of a level that are opened, unless it is said how many
SPANS = "span"  # what a level of spans is called


@dataclass(frozen=True)
class Levels:
    """Units from coarse to fine, each of a level cut into those of the next.

    Attributes:
        choices: of the coarsest level a granularity or spans, then finer and finer granularities.

    Example:
        >>> Levels(("paragraph", "word")).names
        ('paragraph', 'word')
    """

    choices: tuple[str | tuple[SpanChoice, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the levels are called."""
        return tuple(choice if isinstance(choice, str) else SPANS for choice in self.choices)


def checked_units(units: Any) -> str | list[SpanChoice] | Levels:
    """Units of one level as `checked_choice` has them, or several levels: a list or tuple with granularities in it.

    Raises:
        InputError: as `checked_choice`; levels of which one does not refine the one before it, or spans of the first
            that overlap.

    >>> checked_units(["paragraph", "sentence"])
    Levels(choices=('paragraph', 'sentence'))
    >>> checked_units([[(0, 120, "Doc A"), (120, 300, "Doc B")], "word"]).names
    ('span', 'word')
    >>> checked_units("word")
    'word'
    """
    if isinstance(units, Levels):
        return units
    if not isinstance(units, list | tuple) or not any(isinstance(entry, str) for entry in units):
        return checked_choice(units)
    if len(units) < 2:
        raise InputError(f"units: got one level, {shown(units)}; expected two or more, or {units[0]!r} by itself")
    first = units[0] if isinstance(units[0], str) and units[0] in GRANULARITIES else _checked_spans(units)
    finer: list[Any] = list(units[1:])
    for entry in finer:
        if not isinstance(entry, str) or entry not in GRANULARITIES:
            raise InputError(f"units: got the level {shown(entry)}, expected one of {', '.join(GRANULARITIES)}")
    named = [first, *finer] if isinstance(first, str) else finer
    for coarse, fine in pairwise(named):
        if GRANULARITIES.index(fine) >= GRANULARITIES.index(coarse):
            raise InputError(
                f"units: got {shown(units)}, expected each level to refine the one before it; {fine}s do not refine "
                f"{coarse}s"
            )
    return Levels((first, *finer))


def _checked_spans(units: Sequence[Any]) -> tuple[SpanChoice, ...]:
    if isinstance(units[0], str):
        raise InputError(
            f"units: got the level {units[0]!r}, expected one of {', '.join(GRANULARITIES)}, or for the first one "
            "a list of (start, end, name) spans"
        )
    spans = checked_choice(units[0])
    assert not isinstance(spans, str)
    for before, after in pairwise(sorted(spans, key=lambda span: span[:2])):
        if after[0] < before[1]:
            raise InputError(
                f"units: got spans {shown(before)} and {shown(after)}, expected spans of nested units not to overlap"
            )
    return tuple(spans)


def split_levels(text: str, offsets: Iterable[Sequence[int]], levels: Levels, **options: Any) -> list[tuple[Unit, ...]]:
    """The units of each level, those below the first with their parent's index in the level above.

    Where a finer unit, by `split_units`, reaches across the rim of a coarser one, it is cut there.

    Args:
        text, offsets, options: see `split_units`.

    Raises:
        InputError: as `split_units`.

    >>> offsets = [(0, 2), (2, 6), (6, 7), (7, 9), (9, 10)]
    >>> for level in split_levels("We met. Go!"[:10], offsets, Levels(("sentence", "word"))):
    ...     print([(unit.text, unit.parent) for unit in level])
    [('We met.', None), ('Go', None)]
    [('We', 0), ('met', 0), ('.', 0), ('Go', 1)]
    """
    offsets = list(offsets)
    first, *finer = levels.choices
    found = [split_units(text, offsets, first, **options)]
    for granularity in finer:
        pieces = split_units(text, offsets, granularity, **options)
        piece_of = {token: piece for piece in pieces for token in piece.token_indices}
        inside = []
        for number, parent in enumerate(found[-1]):
            groups: dict[Unit, list[int]] = {}
            for token in parent.token_indices:
                groups.setdefault(piece_of[token], []).append(token)
            inside += [_clipped(piece, tuple(tokens), parent, number) for piece, tokens in groups.items()]
        found.append(tuple(inside))
    return found


def _clipped(piece: Unit, tokens: tuple[int, ...], parent: Unit, number: int) -> Unit:
    """What of a piece lies in a parent."""
    start, end = max(piece.start, parent.start), min(piece.end, parent.end)
    if start >= end:  # special tokens have no characters, and a rim may lie within a token
        return replace(piece, token_indices=tokens, parent=number)
    text = piece.text[start - piece.start : end - piece.start]
    return replace(piece, text=text, start=start, end=end, token_indices=tokens, parent=number)


def divisible(level: Sequence[Unit], finer: Sequence[Sequence[Unit]]) -> list[bool]:
    """Which units of a level some level below it cuts into several.

    Args:
        level: all units of a level.
        finer: all units of the levels below it, as `split_levels` has them.

    >>> one, two = Unit("a", 0, 1, (0,)), Unit("b c", 2, 5, (1, 2))
    >>> words = [Unit("a", 0, 1, (0,), parent=0), Unit("b", 2, 3, (1,), parent=1), Unit("c", 4, 5, (2,), parent=1)]
    >>> divisible([one, two], [words])
    [False, True]
    """
    if not finer:
        return [False] * len(level)
    below = divisible(finer[0], finer[1:])
    children = [0] * len(level)
    found = [False] * len(level)
    for unit, divides in zip(finer[0], below, strict=True):
        assert unit.parent is not None
        children[unit.parent] += 1
        found[unit.parent] |= divides or children[unit.parent] > 1
    return found


def opened(totals: Sequence[float], count: int | None = None) -> list[int]:
    """Which units of a level are cut into the next one: those with the largest effects, for or against the answer.

    By default so many that they make up most of all effects together, which are few where the answer rests on one
    passage and more where it rests on several; never fewer than `FEWEST`, so that a runner-up is seen, and never more
    than `MOST`, so that what a level costs is bounded.

    Args:
        totals: the effect of each unit of the level that can be cut.
        count: how many; None: as above.

    Returns:
        Their indices in `totals`, in that order.

    >>> opened([0.1, 9.0, 0.0, 0.2, -0.5])
    [1, 3, 4]
    >>> opened([3.0, 3.1, 2.9, 3.2, 3.0, 0.1])
    [0, 1, 3, 4]
    >>> opened([0.1, 9.0, 0.0, 0.2, -0.5], count=1)
    [1]
    """
    sizes = [abs(total) for total in totals]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if count is None:
        sums = list(accumulate(sizes[i] for i in order))
        enough = bisect_left(sums, EFFECT * sum(sizes)) + 1
        count = min(max(enough, FEWEST), MOST)
    return sorted(order[:count])
