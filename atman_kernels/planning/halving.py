"""Successive halving: which units are worth an exact run, found out by cheaper ones.

A variant whose last k prompt tokens alone are recomputed costs k + m tokens instead of up to n + m, and ranks units
better the larger k is. So all units run with a small k, the better part of them with one several times as large, and so
on; the last few run exactly. (Successive halving: Jamieson & Talwalkar, arXiv 1502.07943, in which what is bought with
more budget is less noise; here it is less bias.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_DEPTH = 16  # prompt tokens that the first rung recomputes
GROWTH = 4  # from one rung's depth to the next
SHARE = 3  # one candidate in so many goes on, where rungs agree
WAKE = 3  # units before a strong one that follow it to the next round
FEW_UNITS = 40  # up to here all units are exact: a search would save little and could miss one


@dataclass(frozen=True)
class Rung:
    """One round of the search.

    Attributes:
        recompute: prompt tokens before the answer that its variants recompute.
        keep: candidates that go on to the next round, if the rounds agree about the strongest; of the last round, those
            that are run exactly.
    """

    recompute: int
    keep: int


def rungs(n_units: int, prompt_length: int, exact: int) -> tuple[Rung, ...]:
    """The rounds before the exact runs; none where all units are exact.

    Each round asks about a third of the candidates with four times the depth, so that none costs much more than the
    one before. There is no round whose depth is beyond a quarter of the prompt: exact runs cost hardly more.

    Args:
        n_units: how many units have a score.
        prompt_length: n tokens.
        exact: how many units are to be exact in the end.

    Example:
        >>> rungs(1000, 1000, exact=16)
        (Rung(recompute=16, keep=334), Rung(recompute=64, keep=16))
        >>> rungs(30, 1000, exact=16)
        ()
    """
    found: list[Rung] = []
    candidates, depth = n_units, FIRST_DEPTH
    while n_units > max(FEW_UNITS, exact) and depth <= max(FIRST_DEPTH, prompt_length // 4) and candidates > exact:
        candidates = max(exact, math.ceil(candidates / SHARE))
        found.append(Rung(depth, candidates))
        depth *= GROWTH
    return (*found[:-1], *(Rung(last.recompute, exact) for last in found[-1:]))


def promise(falls: Sequence[float], following: Sequence[Sequence[int]]) -> list[float]:
    """What speaks for running each unit at the next depth: its own effect so far, or part of a follower's.

    Digits of a number, pieces of a name: the answer reads the last of them, which has read those before. Their effect
    shows at depths that reach back to them only, but the last one's shows at once; so they follow in its wake, with
    half of its effect one unit before it, a quarter two before, and so on.

    Args:
        falls: each unit's effect at the depth so far.
        following: per unit, the units that begin after it, nearest first.

    Example:
        >>> promise([0.0, 0.0, 2.0], following=[[1, 2], [2], []])
        [0.5, 1.0, 2.0]
    """
    return [
        max([fall, *(falls[other] / 2**step for step, other in enumerate(others, 1))])
        for fall, others in zip(falls, following, strict=True)
    ]


def agreement(before: Sequence[int], after: Sequence[int], count: int) -> float:
    """Which part of the strongest `count` candidates of one round were among those of the round before.

    Args:
        before, after: candidates of both rounds, strongest first; a first round has none before it, and agrees by half.

    Example:
        >>> agreement([4, 2, 9, 1], [2, 4, 1], count=3)
        0.6666666666666666
    """
    if not before:
        return 0.5
    strongest = after[:count]
    return len(set(strongest) & set(before[:count])) / max(1, len(strongest))


def kept(rung: Rung, agreed: float) -> int:
    """Candidates that go on: as many as planned where two rounds agree, up to twice as many where they do not.

    Example:
        >>> kept(Rung(64, 40), 1.0), kept(Rung(64, 40), 0.75)
        (40, 50)
    """
    return math.ceil(rung.keep * (2 - agreed))
