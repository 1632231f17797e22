"""One prompt in one of several processes that explain it together: what all of them must agree on, and the units that
this one runs."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from atman_kernels import Explainer, Unit
from atman_kernels.explain.assembly import origin_of
from atman_kernels.explain.methods import MethodContext
from atman_kernels.explain.methods.perturbation import Hints
from atman_kernels.hf.models.eval_mode import evaluating


class Question(NamedTuple):
    """What is asked.

    Attributes:
        number: tells it from those before.
        prompt, target: as of `Pool.explain`.
        options: of `Explainer.ablate`, all of them.
    """

    number: int
    prompt: Any
    target: str | None
    options: Mapping[str, Any]


class Asked(NamedTuple):
    """What a process made of a question; all make the same of it, but for seconds.

    Attributes:
        prompt, target, target_tokens, units, settings: as of `Explanation`.
        prompt_length: n tokens.
        seconds: until the answer was there.
    """

    prompt: str
    target: str
    target_tokens: tuple[str, ...]
    units: tuple[Unit, ...]
    prompt_length: int
    settings: dict[str, Any]
    seconds: float

    def suffix_tokens(self, units: Sequence[int], recompute: int | None) -> list[int]:
        """What the variants of some units cost: the tokens from a unit's first one to the end, or the last of these."""
        length = self.prompt_length + len(self.target_tokens)
        most = length if recompute is None else recompute + len(self.target_tokens)
        return [min(length - min(self.units[unit].token_indices), most) for unit in units]


class Hinted(NamedTuple):
    """What a search of all units is told beforehand.

    Attributes:
        effects: per unit; None if there are none.
        source: what they are, or why there are none.
        cost, messages: as of `Scored`.
    """

    effects: list[float] | None
    source: str | None
    cost: dict[str, int]
    messages: list[str]


class Scored(NamedTuple):
    """What came of some units.

    Attributes:
        asked: the question, as the process knows it that ran them.
        scores: (n_units, m), against that process's own unperturbed run.
        base_logprobs: (m,) of that run.
        path: see `Outcome`.
        cost: since the process was asked for something before; at first with that of the unperturbed run.
        messages: what was warned of.
    """

    asked: Asked
    scores: Tensor
    base_logprobs: Tensor
    path: str
    cost: dict[str, int]
    messages: list[str]


class Begun:
    """A question that was read, and answered if that was left to the model; its unperturbed run is kept.

    Args:
        explainer: who explains.
        question: the question.

    Attributes:
        question, asked: what it is, and what became of it.
    """

    def __init__(self, explainer: Explainer, question: Question) -> None:
        began = time.perf_counter()
        options = dict(question.options)
        units, _ = options.pop("units"), options.pop("recompute")  # of which each round has its own
        self._objective = explainer.objective_of(question.prompt, question.target, units, **options)
        seconds = time.perf_counter() - began
        with evaluating(explainer.model):
            self._started = explainer.runner.start([self._objective])
        self._explainer, self.question = explainer, question
        self._told: dict[str, int] = {}
        self.asked = Asked(
            self._objective.prompt,
            self._objective.target,
            self._objective.target_tokens,
            self._objective.units,
            self._objective.prompt_length,
            explainer.suppression | origin_of(explainer.model, units),
            seconds,
        )

    def hint(self, messages: list[str]) -> Hinted:
        """What a search of these units is told beforehand; `messages` as of `score`.

        Raises:
            UnsupportedModelError: there is no search, as variants of the model are full rows.
        """
        explainer = self._explainer
        with evaluating(explainer.model):
            explainer.runner.packable(self._started)
            hints = Hints(MethodContext(explainer.model, explainer.runner))
            found = hints([self._objective])
        self._started.work.add(hints.tokens, 0)
        effects = None if found is None else found[0].tolist()
        return Hinted(effects, hints.source, self._cost(), messages)

    def score(self, units: Sequence[int], recompute: int | None, messages: list[str]) -> Scored:
        """Units by number, each suppressed by itself.

        Args:
            recompute: see `Explainer.explain`.
            messages: what was warned of meanwhile; goes back as it is then.
        """
        explainer = self._explainer
        with evaluating(explainer.model):
            factors = explainer.factors_of(self._objective)[list(units)]
            outcome = explainer.runner.run([self._objective], [factors], recompute=recompute, started=self._started)
        (base,), (perturbed,) = outcome.unperturbed, outcome.perturbed
        return Scored(self.asked, base - perturbed, base, outcome.path, self._cost(), messages)

    def _cost(self) -> dict[str, int]:
        """Of what was not told of yet."""
        total = self._started.work.stats
        told, self._told = self._told, total
        cost = {name: total[name] - told.get(name, 0) for name in ("tokens_through_model", "forwards", "variants")}
        return cost | {"token_budget": total["token_budget"]}
