"""The strongest units, found by a search that halves, and run exactly."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.planning.halving import WAKE, agreement, kept, promise, rungs
from atman_kernels.run.runner import Outcome, Packable, Runner, Started


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
    *,
    pairs: Sequence[tuple[int, int]] = (),
) -> Found:
    """Runs the rows that lower the objectives' values most exactly, as many as are asked for, and estimates the others.

    Args:
        runner: what runs.
        objectives: what is asked; each is a causal sequence.
        factors: per objective, (n_rows, positions).
        exact: how many rows of each objective.
        found: is told of every exact row; see `Runner.run`.
        estimated: is told likewise of every row in every round.
        pairs: objectives with the same rows, of which the second's fall is taken off the first's: they are one search.

    Raises:
        UnsupportedModelError: variants of the model are full rows, which have no depth.
    """
    started = runner.start(objectives)
    packable = runner.packable(started)
    fewest = min(len(rows) for rows in factors)
    if fewest < exact:
        warnings.warn(f"exact is {exact}, but there are {fewest} units: all of them are exact", stacklevel=2)
    seconds = dict(pairs)
    alone = set(range(len(objectives))) - set(seconds.values())
    searches = [
        _Search((number, seconds[number]) if number in seconds else (number,), packable, len(factors[number]), exact)
        for number in sorted(alone)
    ]
    searching = {number: search for search in searches for number in search.objectives}
    while any(search.depth is not None for search in searches):
        for depth in sorted({search.depth for search in searches if search.depth is not None}):
            _round(runner, started, searching, factors, depth, estimated)
    in_order = [searching[number] for number in range(len(objectives))]
    places = [torch.tensor(search.candidates, device="cpu") for search in in_order]

    def exactly(objective: int, row: int, difference: Tensor) -> None:
        found(objective, int(places[objective][row]), difference)

    rows = [own[place] for own, place in zip(factors, places, strict=True)]
    outcome = runner.run(objectives, rows, "explaining", exactly, started=started)
    flags = []
    perturbed = [search.values[number] for number, search in enumerate(in_order)]
    for values, place, exactly_known in zip(perturbed, places, outcome.perturbed, strict=True):
        values[place] = exactly_known
        flags.append(torch.zeros(len(values), dtype=torch.bool, device="cpu").index_fill_(0, place, True))
    return Found(Outcome(outcome.unperturbed, perturbed, outcome.work, outcome.path), flags)


class _Search:
    """The candidates of one objective, or of two of which the second's fall is taken off the first's.

    Args:
        objectives: their numbers.
        packable: all that is asked.
        n_rows: of factors, of each.
        exact: how many are to be exact.
    """

    def __init__(self, objectives: tuple[int, ...], packable: Packable, n_rows: int, exact: int) -> None:
        self.objectives, self.exact = objectives, exact
        self._unperturbed = {number: packable.unperturbed[number] for number in objectives}
        # then those of the deepest round so far
        self.values = {number: own.repeat(n_rows, 1) for number, own in self._unperturbed.items()}
        self.candidates = list(range(n_rows))
        objective = packable.sequences[objectives[0]]
        self._rungs = list(rungs(n_rows, objective.prompt_length, exact))
        self._before: list[int] = []
        self._following = _following(objective)

    @property
    def depth(self) -> int | None:
        """Of the next round; None where there is none."""
        return self._rungs[0].recompute if self._rungs else None

    def learn(self, values: Sequence[Tensor]) -> None:
        """What a round found out, per objective (n_candidates, m). The weaker candidates are out."""
        rung = self._rungs.pop(0)
        falls = torch.full((len(self._following),), -torch.inf, dtype=torch.float64, device="cpu")  # of who is out
        falls[self.candidates] = 0.0
        for sign, number, own in zip((1, -1), self.objectives, values, strict=False):
            self.values[number][self.candidates] = own
            falls[self.candidates] += sign * (self._unperturbed[number] - own).double().sum(1)
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
    searching: dict[int, _Search],
    factors: Sequence[Tensor],
    depth: int,
    estimated: Callable[[int, int, Tensor], object],
) -> None:
    """One round of the searches that are at a depth, which share packs.

    Args:
        searching: the search of each objective.
    """
    rows = [
        own[searching[number].candidates if searching[number].depth == depth else []]
        for number, own in enumerate(factors)
    ]

    def roughly(objective: int, row: int, difference: Tensor) -> None:
        estimated(objective, searching[objective].candidates[row], difference)

    outcome = runner.run(started.objectives, rows, "searching", roughly, recompute=depth, started=started)
    for search in {id(search): search for search in searching.values() if search.depth == depth}.values():
        search.learn([outcome.perturbed[number] for number in search.objectives])
