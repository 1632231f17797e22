"""Nested units, level by level: all units of the coarsest, then those inside the strongest of each level."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from atman_kernels.explain.methods import Method, MethodContext, MethodOutcome
from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.planning.levels import divisible, opened
from atman_kernels.planning.units import Unit


def run_levels(
    method: Method,
    context: MethodContext,
    objectives: Sequence[Objective],
    pairs: Sequence[tuple[int, int]],
    refine: int | None,
) -> tuple[list[Objective], MethodOutcome]:
    """Runs a method once per level; all levels go on from one base run.

    Args:
        method: one that scores units of any cut.
        context: see `Method.run`.
        objectives: causal sequences; those without further levels are done after the first run.
        pairs: (objective of an answer, objective of the answer that it is contrasted with).
        refine: see `opened`.

    Returns:
        The objectives with the units of all levels in a row, level after level in reading order, each with its
        parent's index among them; and what was found of these.
    """
    other = dict(pairs)
    prompts = [number for number in range(len(objectives)) if number not in other.values()]
    trees = {number: _Tree(objectives[number]) for number in prompts}
    context = replace(context, started=context.runner.start(objectives))
    scores: list[list[Tensor]] = [[] for _ in objectives]
    while any(tree.level for tree in trees.values()):
        asked = list(objectives)
        for number, tree in trees.items():
            for each in (number, *([other[number]] if number in other else [])):
                asked[each] = replace(objectives[each], units=tuple(tree.level))
        outcome = method.run(context, asked)
        for found, own in zip(scores, outcome.scores, strict=True):
            found.append(own)
        for number, tree in trees.items():
            total = outcome.scores[number].double().sum(1)
            if number in other:
                total = total - outcome.scores[other[number]].double().sum(1)
            tree.open(total.tolist(), refine)
    whole = list(objectives)
    for number, tree in trees.items():
        for each in (number, *([other[number]] if number in other else [])):
            whole[each] = replace(objectives[each], units=tuple(tree.units))
    return whole, replace(outcome, scores=[torch.cat(found) for found in scores])


class _Tree:
    """The units of one prompt that have been reached.

    Attributes:
        units: of all levels so far, the last one's included.
        level: of the level to be run, with parents that count in `units`; [] where all is done.
    """

    def __init__(self, objective: Objective) -> None:
        assert isinstance(objective, CausalObjective)
        self._all = [objective.units, *objective.finer]
        self._divisible = [divisible(level, self._all[n + 1 :]) for n, level in enumerate(self._all)]
        self._numbers = list(range(len(objective.units)))  # of the level's units in `_all`
        self._depth = 0
        self.level: list[Unit] = list(objective.units)
        self.units: list[Unit] = list(self.level)

    def open(self, totals: Sequence[float], refine: int | None) -> None:
        """Goes on to the units inside the strongest of the level, whose totals these are."""
        first = len(self.units) - len(self.level)
        can = [at for at, number in enumerate(self._numbers) if self._divisible[self._depth][number]]
        places = {self._numbers[can[i]]: first + can[i] for i in opened([totals[at] for at in can], refine)}
        self._depth += 1
        finer = self._all[self._depth] if self._depth < len(self._all) else ()
        inside = [(number, unit) for number, unit in enumerate(finer) if unit.parent in places]
        self._numbers = [number for number, _ in inside]
        self.level = [replace(unit, parent=places[unit.parent]) for _, unit in inside]  # type: ignore[index]
        self.units += self.level
