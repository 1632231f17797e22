"""A text cut where its units begin and end, to be painted from left to right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from atman_kernels.planning.units import Unit


class Segment(NamedTuple):
    """A piece of text under the same units from end to end; without text, a unit that has no characters."""

    text: str
    units: tuple[int, ...]  # indices into the explanation's units, in their order


def segments(text: str, units: Sequence[Unit], source: str = "prompt") -> list[Segment]:
    """The pieces of text, in order: each character in exactly one, each unit of that source in at least one.

    Units may overlap, leave characters uncovered, share characters (tokens that are parts of one character)
    or have none (special tokens); each unit without characters gets a piece of its own.

    Example:
        >>> segments("ab c", [Unit("ab", 0, 2, (0,)), Unit("b c", 1, 4, (1,))])
        [Segment(text='a', units=(0,)), Segment(text='b', units=(0, 1)), Segment(text=' c', units=(1,))]
    """
    spans = {i: unit for i, unit in enumerate(units) if unit.source == source}
    starting: dict[int, list[int]] = {}
    empty: dict[int, list[int]] = {}
    for i, unit in spans.items():
        (starting if unit.start < unit.end else empty).setdefault(unit.start, []).append(i)

    cuts = sorted({0, len(text), *starting, *empty, *(unit.end for unit in spans.values())})
    pieces: list[Segment] = []
    covering: list[int] = []
    for start, end in zip(cuts, cuts[1:] + cuts[-1:], strict=True):  # only empty units begin at the last cut
        pieces += [Segment("", (i,)) for i in empty.get(start, ())]
        covering = sorted([i for i in covering if units[i].end > start] + starting.get(start, []))
        if start < end:
            pieces.append(Segment(text[start:end], tuple(covering)))
    return pieces


def strongest(units: Iterable[int], scores: Sequence[float]) -> int | None:
    """Of these units the one whose score is largest in absolute value; None if there are none."""
    return max(units, key=lambda i: abs(scores[i]), default=None)


def ranked(scores: Sequence[float], top: int) -> tuple[list[int], list[int]]:
    """Indices of scores to list: up to `top` positive ones, highest first; half as many negative ones, lowest first.

    Scores below 1 % of the largest in absolute value are left out.
    """
    least = 0.01 * max(map(abs, scores), default=0.0)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    positive = [i for i in order if scores[i] > least]
    negative = [i for i in reversed(order) if scores[i] < -least]
    return positive[:top], negative[: top // 2]
