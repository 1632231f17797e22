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
from atman_kernels.planning.halving import Halving


class Question(NamedTuple):
    """What is asked.

    Attributes:
        number: tells it from those before.
        prompt, target: as of `Pool.explain`.
        options: of `Explainer.ablate`, all of them.
        exact: how many units are searched for; None: none, all are run.
    """

    number: int
    prompt: Any
    target: str | None
    options: Mapping[str, Any]
    exact: int | None = None


class Asked(NamedTuple):
    """What a process made of a question; all make the same of it, but for seconds and the last digits of hints.

    Attributes:
        prompt, target, target_tokens, units, settings: as of `Explanation`.
        prompt_length: n tokens.
        seconds: until the answer was there.
        hints: of a search, see `Halving`.
    """

    prompt: str
    target: str
    target_tokens: tuple[str, ...]
    units: tuple[Unit, ...]
    prompt_length: int
    settings: dict[str, Any]
    seconds: float
    hints: list[float] | None = None

    def suffix_tokens(self, units: Sequence[int], recompute: int | None) -> list[int]:
        """What the variants of some units cost: the tokens from a unit's first one to the end, or the last of these."""
        length = self.prompt_length + len(self.target_tokens)
        most = length if recompute is None else recompute + len(self.target_tokens)
        return [min(length - min(self.units[unit].token_indices), most) for unit in units]


class Scored(NamedTuple):
    """What came of some units.

    Attributes:
        asked: the question, as the process knows it that ran them.
        scores: (n_units, m), against that process's own unperturbed run.
        base_logprobs: (m,) of that run.
        path: see `Outcome`.
        cost: of these units, and with the first of them of what they go on from.
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
            hints, settings = self._hints(explainer, question.exact)
        self._explainer, self.question = explainer, question
        self._told: dict[str, int] = {}
        self.asked = Asked(
            self._objective.prompt,
            self._objective.target,
            self._objective.target_tokens,
            self._objective.units,
            self._objective.prompt_length,
            explainer.suppression | settings | origin_of(explainer.model, units),
            seconds,
            hints,
        )

    def _hints(self, explainer: Explainer, exact: int | None) -> tuple[list[float] | None, dict[str, Any]]:
        """What a search of these units is told beforehand, where there is one, and what the settings say of that."""
        asked = self._objective
        if exact is None or Halving.over(asked.units, asked.prompt_length, exact).depth is None:
            return None, {}
        explainer.runner.packable(self._started)  # else there is no search
        hints = Hints(MethodContext(explainer.model, explainer.runner))
        found = hints([asked])
        self._started.work.add(hints.tokens, 0)
        return None if found is None else found[0].tolist(), {"hints": hints.source}

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
        total = outcome.work.stats
        cost = {
            name: total[name] - self._told.get(name, 0) for name in ("tokens_through_model", "forwards", "variants")
        }
        self._told = total
        cost["token_budget"] = total["token_budget"]
        return Scored(self.asked, base - perturbed, base, outcome.path, cost, messages)
