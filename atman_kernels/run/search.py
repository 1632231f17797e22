"""The strongest units, found by a search that halves, and run exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.planning.halving import WAKE, agreement, kept, promise, rungs
from atman_kernels.run.runner import Outcome, Runner, Started


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        outcome: of all rows: those that are not exact have the values of the deepest round that they came to.
        exact: per objective, (n_rows,) bool.
    """

    outcome: Outcome
    exact: list[Tensor]


def strongest(
    runner: Runner,
    objectives: Sequence[Objective],
    factors: Sequence[Tensor],
    exact: int,
    found: Callable[[int, int, Tensor], object],
    estimated: Callable[[int, int, Tensor], object] = lambda objective, row, difference: None,
) -> Found:
    """Runs the rows that lower the objectives' values most exactly, as many as are asked for, and estimates the others.

    Args:
        runner: what runs.
        objectives: what is asked; each is a causal sequence.
        factors: per objective, (n_rows, positions).
        exact: how many rows of each objective.
        found: is told of every exact row; see `Runner.run`.
        estimated: is told likewise of every row in every round.

    Raises:
        UnsupportedModelError: variants of the model are full rows, which have no depth.
    """
    started = runner.start(objectives)
    packable = runner.packable(started)
    searches = [
        _Search(sequence, rows, own, exact)
        for sequence, rows, own in zip(packable.sequences, factors, packable.unperturbed, strict=True)
    ]
    while any(search.depth is not None for search in searches):
        for depth in sorted({search.depth for search in searches if search.depth is not None}):
            asked = [n for n, search in enumerate(searches) if search.depth == depth]
            _round(runner, started, searches, asked, depth, estimated)
    places = [torch.tensor(search.candidates, device="cpu") for search in searches]

    def exactly(objective: int, row: int, difference: Tensor) -> None:
        found(objective, int(places[objective][row]), difference)

    rows = [search.factors[own] for search, own in zip(searches, places, strict=True)]
    outcome = runner.run(objectives, rows, "explaining", exactly, started=started)
    flags = []
    for search, own, values in zip(searches, places, outcome.perturbed, strict=True):
        search.values[own] = values
        flags.append(torch.zeros(len(search.factors), dtype=torch.bool, device="cpu").index_fill_(0, own, True))
    perturbed = [search.values for search in searches]
    return Found(Outcome(outcome.unperturbed, perturbed, outcome.work, outcome.path), flags)


class _Search:
    """One objective's candidates."""

    def __init__(self, objective: CausalObjective, factors: Tensor, unperturbed: Tensor, exact: int) -> None:
        self.factors, self.exact = factors, exact
        self.values = unperturbed.repeat(len(factors), 1)  # then those of the deepest round so far
        self.candidates = list(range(len(factors)))
        self._unperturbed = unperturbed
        self._rungs = list(rungs(len(factors), objective.prompt_length, exact))
        self._before: list[int] = []
        self._following = _following(objective)

    @property
    def depth(self) -> int | None:
        """Of the next round; None where there is none."""
        return self._rungs[0].recompute if self._rungs else None

    def learn(self, values: Tensor) -> None:
        """What a round found out, (n_candidates, m). The weaker candidates are out."""
        rung = self._rungs.pop(0)
        self.values[self.candidates] = values
        falls = torch.full((len(self.values),), -torch.inf, dtype=torch.float64, device="cpu")  # of those that are out
        falls[self.candidates] = (self._unperturbed - values).double().sum(1)
        worth = promise(falls.tolist(), self._following)
        ordered = sorted(self.candidates, key=lambda row: -worth[row])
        agreed = agreement(self._before, ordered, self.exact)
        if ordered[: self.exact] == self._before[: self.exact]:
            self._rungs = []  # the order has settled
        self._before = ordered
        self.candidates = sorted(ordered[: kept(rung, agreed) if self._rungs else self.exact])


def _following(objective: CausalObjective) -> list[list[int]]:
    """Per unit, those that begin after it, nearest first."""
    order = sorted(range(len(objective.units)), key=lambda i: min(objective.units[i].token_indices))
    place = {unit: at for at, unit in enumerate(order)}
    return [order[place[i] + 1 : place[i] + 1 + WAKE] for i in range(len(order))]


def _round(
    runner: Runner,
    started: Started,
    searches: list[_Search],
    asked: list[int],
    depth: int,
    estimated: Callable[[int, int, Tensor], object],
) -> None:
    """One round of some objectives, which share packs."""
    rows = [s.factors[s.candidates] if n in asked else s.factors[:0] for n, s in enumerate(searches)]

    def roughly(objective: int, row: int, difference: Tensor) -> None:
        estimated(objective, searches[objective].candidates[row], difference)

    outcome = runner.run(started.objectives, rows, "searching", roughly, recompute=depth, started=started)
    for number in asked:
        searches[number].learn(outcome.perturbed[number])
