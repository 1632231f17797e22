"""A text cut where its units begin and end, to be painted from left to right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from atman_kernels.planning.units import Unit


class Segment(NamedTuple):
    """A piece of text under the same units from end to end; without text, a unit that has no characters."""

    text: str
    units: tuple[int, ...]  # indices into the explanation's units, in their order
    inside: tuple[Segment, ...] = ()  # the same text, cut into the units that lie in this one


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


def nested_segments(
    text: str, units: Sequence[Unit], children: Sequence[Sequence[int]], source: str = "prompt"
) -> list[Segment]:
    """As `segments`, of nested units: pieces below those of the coarsest level, cut inside where these are.

    Args:
        children: per unit, the units that lie in it.

    Example:
        >>> nested_segments("a b", [Unit("a b", 0, 3, (0, 1)), Unit("a", 0, 1, (0,), parent=0)], [[1], []])[0].inside
        (Segment(text='a', units=(1,), inside=()), Segment(text=' b', units=(), inside=()))
    """

    def cut(text: str, start: int, members: Sequence[int]) -> list[Segment]:
        end = start + len(text)

        def within(at: int) -> int:
            return min(max(at, start), end) - start

        placed = [replace(units[i], start=within(units[i].start), end=within(units[i].end)) for i in members]
        found, at = [], start
        for piece in segments(text, placed, source):
            own = tuple(members[i] for i in piece.units)
            inside = cut(piece.text, at, children[own[0]]) if len(own) == 1 and children[own[0]] else []
            found.append(Segment(piece.text, own, tuple(inside)))
            at += len(piece.text)
        return found

    return cut(text, 0, [i for i, unit in enumerate(units) if unit.parent is None])


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


def outlined(
    scores: Sequence[float], units: Sequence[Unit], depths: Sequence[int], top: int
) -> tuple[list[int], list[int]]:
    """Units to list as `ranked` does, of every level as many, each below the one that it lies in.

    What a listed unit lies in is listed, too, however weak it is. Units that are not nested are listed as by `ranked`.
    """
    chosen: tuple[set[int], set[int]] = (set(), set())
    for depth in sorted(set(depths)):
        level = [i for i, own in enumerate(depths) if own == depth]
        for side, found in zip(chosen, ranked([scores[i] for i in level], top), strict=True):
            side.update(level[i] for i in found)
    return in_tree_order(chosen[0], scores, units), in_tree_order(chosen[1], [-score for score in scores], units)


def in_tree_order(chosen: set[int], scores: Sequence[float], units: Sequence[Unit]) -> list[int]:
    """The chosen units and what they lie in: strongest first, each followed by what lies in it."""
    below: dict[int | None, list[int]] = {}
    waiting, seen = list(chosen), set(chosen)
    while waiting:
        i = waiting.pop()
        parent = units[i].parent
        below.setdefault(parent, []).append(i)
        if parent is not None and parent not in seen:
            seen.add(parent)
            waiting.append(parent)

    def listed(parent: int | None) -> list[int]:
        order = sorted(below.get(parent, ()), key=lambda i: (-scores[i], i))
        return [each for i in order for each in (i, *listed(i))]

    return listed(None)
