"""Successive halving: which units are worth an exact run, found out by cheaper ones.

A variant whose last k prompt tokens alone are recomputed costs k + m tokens instead of up to n + m, and ranks units
better the larger k is. So all units run with a small k, the better part of them with one several times as large, and so
on; the last few run exactly. (Successive halving: Jamieson & Talwalkar, arXiv 1502.07943, in which what is bought with
more budget is less noise; here it is less bias.)

Two things make up for what short suffixes cannot see. Units that stand near the end of the prompt, where a question
usually is, cost little: they are all exact. And hints from elsewhere, such as effects to first order, speak for units
whose influence takes many steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atman_kernels.planning.units import Unit

FEW_UNITS = 40  # up to here all units are exact: a search would save little and could miss one


@dataclass(frozen=True)
class Schedule:
    """How a search spends its tokens; the defaults were chosen on questions, see docs/search.md.

    Attributes:
        first_depth: prompt tokens that the first round recomputes.
        growth: from one round's depth to the next.
        share: one candidate in so many goes on, where rounds agree.
        deepest: no round is deeper than this part of the prompt: exact runs cost hardly more.
        margin: where two rounds agree about nothing, so many times as many candidates go on.
        wake: units before a strong one that follow it to the next round.
        tail: units that begin in so many last tokens of the prompt are exact in any case.
    """

    first_depth: int = 1
    growth: int = 16
    share: int = 8
    deepest: float = 1 / 24
    margin: float = 1.5
    wake: int = 3
    tail: int = 48


SCHEDULE = Schedule()


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


def rungs(n_units: int, prompt_length: int, exact: int, schedule: Schedule = SCHEDULE) -> tuple[Rung, ...]:
    """The rounds before the exact runs; none where all units are exact.

    Args:
        n_units: how many units have a score.
        prompt_length: n tokens.
        exact: how many units are to be exact in the end.

    Example:
        >>> rungs(1000, 1000, exact=16)
        (Rung(recompute=1, keep=125), Rung(recompute=16, keep=16))
        >>> rungs(30, 1000, exact=16)
        ()
    """
    found: list[Rung] = []
    candidates, depth = n_units, schedule.first_depth
    deepest = max(depth, int(prompt_length * schedule.deepest))
    while n_units > max(FEW_UNITS, exact) and depth <= deepest and candidates > exact:
        candidates = max(exact, math.ceil(candidates / schedule.share))
        found.append(Rung(depth, candidates))
        depth *= schedule.growth
    return (*found[:-1], *(Rung(last.recompute, exact) for last in found[-1:]))


class Halving:
    """A search under way.

    Args:
        starts: where each unit begins, in tokens.
        prompt_length, exact, schedule: see `rungs`.

    Attributes:
        candidates: units that the next round is about.

    Example:
        >>> search = Halving(starts=range(60), prompt_length=60, exact=2)
        >>> search.depth, len(search.candidates)
        (1, 12)
        >>> search.learn({unit: float(unit == 7) for unit in search.candidates})
        >>> search.depth, search.chosen[:3], len(search.chosen)
        (None, [5, 6, 7], 51)
    """

    def __init__(
        self,
        starts: Sequence[int],
        prompt_length: int,
        exact: int,
        schedule: Schedule = SCHEDULE,
    ) -> None:
        self._exact, self._schedule = exact, schedule
        self._hints: Sequence[float] | None = None
        self._rungs = list(rungs(len(starts), prompt_length, exact, schedule))
        order = sorted(range(len(starts)), key=lambda unit: starts[unit])
        self._tail = [unit for unit in order if self._rungs and starts[unit] >= prompt_length - schedule.tail]
        self.candidates = sorted(set(order) - set(self._tail))
        if len(self.candidates) <= exact:  # nothing to choose among
            self._rungs = []
        self._before: list[int] = []
        self._following = {unit: order[at + 1 : at + 1 + schedule.wake] for at, unit in enumerate(order)}

    @classmethod
    def over(cls, units: Sequence[Unit], prompt_length: int, exact: int) -> "Halving":
        """A search among units of a prompt."""
        return cls([min(unit.token_indices) for unit in units], prompt_length, exact)

    def hint(self, effects: Sequence[float]) -> None:
        """Before the first `learn`: every unit's effect as something else than a round estimates it."""
        self._hints = effects
        self._before = sorted(self.candidates, key=lambda unit: -effects[unit])

    @property
    def chosen(self) -> list[int]:
        """Units that are to be run exactly, once there is no further round."""
        return sorted([*self.candidates, *self._tail])

    @property
    def depth(self) -> int | None:
        """Prompt tokens that the next round recomputes; None where the candidates are to be run exactly."""
        return self._rungs[0].recompute if self._rungs else None

    def learn(self, effects: Mapping[int, float]) -> None:
        """Goes on to the next round.

        Args:
            effects: of every candidate at the present depth.
        """
        rung = self._rungs.pop(0)
        if self._hints is not None:
            effects = {unit: max(effect, self._hints[unit]) for unit, effect in effects.items()}
        worth = promise(effects, self._following)
        ordered = sorted(worth, key=lambda unit: -worth[unit])
        if ordered[: self._exact] == self._before[: self._exact]:  # the order has settled
            self._rungs, rung = [], Rung(rung.recompute, self._exact)
        keep = kept(rung, agreement(self._before, ordered, self._exact), self._schedule.margin)
        self.candidates, self._before = sorted(ordered[:keep]), ordered


def promise(effects: Mapping[int, float], following: Mapping[int, Sequence[int]]) -> dict[int, float]:
    """What speaks for running each unit at the next depth: its own effect so far, or part of a follower's.

    Digits of a number, pieces of a name: the answer reads the last of them, which has read those before. Their effect
    shows at depths that reach back to them only, but the last one's shows at once; so they follow in its wake, with
    half of its effect one unit before it, a quarter two before, and so on.

    Args:
        effects: each candidate's effect at the depth so far.
        following: per unit, the units that begin after it, nearest first.

    Example:
        >>> promise({0: 0.0, 1: 0.0, 2: 2.0}, following={0: [1, 2], 1: [2], 2: []})
        {0: 0.5, 1: 1.0, 2: 2.0}
    """
    return {
        unit: max(
            [own, *(effects[other] / 2**step for step, other in enumerate(following[unit], 1) if other in effects)]
        )
        for unit, own in effects.items()
    }


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


def kept(rung: Rung, agreed: float, margin: float) -> int:
    """Candidates that go on: as many as planned where two rounds agree, up to `margin` times as many where they do not.

    Example:
        >>> kept(Rung(64, 40), 1.0, margin=2), kept(Rung(64, 40), 0.75, margin=2)
        (40, 50)
    """
    return math.ceil(rung.keep * (margin - agreed * (margin - 1)))
