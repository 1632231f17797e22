"""The strongest units, found by a search that halves, and run exactly."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.planning.halving import Halving
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
    pairs: Sequence[tuple[int, int]] = (),
    hints: Callable[[Sequence[CausalObjective]], Sequence[Tensor] | None] = lambda sequences: None,
) -> Found:
    """Runs the rows that lower the objectives' values most exactly, as many as are asked for, and estimates the others.

    Args:
        runner: what runs.
        objectives: what is asked; each is a causal sequence.
        factors: per objective, (n_rows, positions).
        exact: how many rows of each objective.
        found: is told of every exact row; see `Runner.run`.
        estimated: is told likewise of every row in every round.
        hints: of the objectives that it is given, (n_rows,) each, the falls of the values summed up, as something
            else estimates them; or None. Asked about those in which there is something to search, once the first round
            has told its estimates.
        pairs: objectives with the same rows, of which the second's fall is taken off the first's: they are one search.

    Raises:
        UnsupportedModelError: variants of the model are full rows, which have no depth.
    """
    started = runner.start(objectives)
    packable = runner.packable(started)
    tell_if_all_are_exact(exact, min(len(rows) for rows in factors))
    seconds = dict(pairs)
    alone = set(range(len(objectives))) - set(seconds.values())
    searches = [
        _Search((number, seconds[number]) if number in seconds else (number,), packable, exact)
        for number in sorted(alone)
    ]
    searching = {number: search for search in searches for number in search.objectives}
    unhinted = [search for search in searches if search.depth is not None]
    while any(search.depth is not None for search in searches):
        for depth in sorted({search.depth for search in searches if search.depth is not None}):
            learned = _round(runner, started, searching, factors, depth, estimated)
            _hint(unhinted, packable, hints)  # they take longer than the first round, which begins without them
            unhinted = []
            for search in searches:
                if search.depth == depth:
                    search.learn([learned[number] for number in search.objectives])
    in_order = [searching[number] for number in range(len(objectives))]
    places = [torch.tensor(search.chosen, device="cpu") for search in in_order]

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


def tell_if_all_are_exact(exact: int, n_units: int) -> None:
    """Warns that there are fewer units than are asked for."""
    if n_units < exact:
        warnings.warn(f"exact is {exact}, but there are {n_units} units: all of them are exact", stacklevel=3)


class _Search:
    """The candidates of one objective, or of two of which the second's fall is taken off the first's.

    Args:
        objectives: their numbers.
        packable: all that is asked.
        exact: how many are to be exact.
    """

    def __init__(self, objectives: tuple[int, ...], packable: Packable, exact: int) -> None:
        self.objectives = objectives
        self._unperturbed = {number: packable.unperturbed[number] for number in objectives}
        objective = packable.sequences[objectives[0]]
        # then those of the deepest round so far
        self.values = {number: own.repeat(len(objective.units), 1) for number, own in self._unperturbed.items()}
        self._halving = Halving.over(objective.units, objective.prompt_length, exact)

    @property
    def depth(self) -> int | None:
        """Of the next round; None where there is none."""
        return self._halving.depth

    @property
    def candidates(self) -> list[int]:
        """Rows that the next round is about."""
        return self._halving.candidates

    @property
    def chosen(self) -> list[int]:
        """Rows that are to be exact."""
        return self._halving.chosen

    def hint(self, effects: Sequence[Tensor]) -> None:
        """What to go by beside the rounds: per objective (n_rows,). Before the first round is learned."""
        self._halving.hint(self._difference(effects).tolist())

    def learn(self, values: Sequence[Tensor]) -> None:
        """What a round found out, per objective (n_candidates, m). The weaker candidates are out."""
        for number, own in zip(self.objectives, values, strict=True):
            self.values[number][self.candidates] = own
        falls = [
            (self._unperturbed[number] - own).double().sum(1)
            for number, own in zip(self.objectives, values, strict=True)
        ]
        self._halving.learn(dict(zip(self.candidates, self._difference(falls).tolist(), strict=True)))

    @staticmethod
    def _difference(effects: Sequence[Tensor]) -> Tensor:
        """(n_rows,) the effect on what is searched for: the first objective's, less the second's."""
        return effects[0] if len(effects) == 1 else effects[0] - effects[1]


def _hint(
    searches: Sequence[_Search],
    packable: Packable,
    hints: Callable[[Sequence[CausalObjective]], Sequence[Tensor] | None],
) -> None:
    """Asks for hints of what is searched for, if anything is."""
    numbers = [number for search in searches for number in search.objectives]
    found = hints([packable.sequences[number] for number in numbers]) if numbers else None
    if found is not None:
        effects = dict(zip(numbers, found, strict=True))
        for search in searches:
            search.hint([effects[number] for number in search.objectives])


def _round(
    runner: Runner,
    started: Started,
    searching: dict[int, _Search],
    factors: Sequence[Tensor],
    depth: int,
    estimated: Callable[[int, int, Tensor], object],
) -> list[Tensor]:
    """One round of the searches that are at a depth, which share packs.

    Args:
        searching: the search of each objective.

    Returns:
        per objective, (n_candidates, m) values; none where its search is at another depth.
    """
    rows = [
        own[searching[number].candidates if searching[number].depth == depth else []]
        for number, own in enumerate(factors)
    ]

    def roughly(objective: int, row: int, difference: Tensor) -> None:
        estimated(objective, searching[objective].candidates[row], difference)

    return runner.run(started.objectives, rows, "searching", roughly, recompute=depth, started=started).perturbed
