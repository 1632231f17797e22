"""`Pool`: the variants of one long prompt, split over workers."""

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atman_kernels import Explainer, Explanation, arguments
from atman_kernels.errors import InputError
from atman_kernels.explain.depth import Depth
from atman_kernels.explain.methods import method
from atman_kernels.inputs.request import Common, Request
from atman_kernels.inputs.tasks import CAUSAL
from atman_kernels.planning.halving import Halving
from atman_kernels.run.search import tell_if_all_are_exact
from atman_kernels.scale.cluster import Share, cluster
from atman_kernels.scale.crew import Crew, Died, Task
from atman_kernels.scale.options import model_name, sorted_options
from atman_kernels.scale.question import Asked, Hinted, Question, Scored
from atman_kernels.scale.shares import deal

# Log-probs of the unperturbed answer may differ so much between processes that run the same model.
NOISE = {"float64": 1e-6, "float32": 1e-2, "float16": 0.25, "bfloat16": 1.0}


class Pool:
    """Workers that each hold the model and explain one prompt together.

    A worker runs the whole prompt once, and then its share of the variants, or of each round of a search, whose hints
    one of them makes during the first round; shares have nearly the same number of suffix tokens. Scores are those of
    one `Explainer`. The prompt's own run is there once for every worker, which keeps it until the next prompt: of t
    tokens that are units each, t of about t² / 2 tokens.

    Args:
        model: hub id, folder, GGUF file or "smollm2", as `load_model` takes it; workers must find it where they run.
        workers: None: one for every GPU, else one.
        gpus_per_worker, cpus_per_worker, address: as in `explain_dataset`.
        options: of `load_model` and of `Explainer`, by name.

    Raises:
        InputError: an argument does not fit.
        ImportError: the extra `ray` is not installed; the message names it.

    Example:
        >>> with Pool("smollm2", workers=2) as pool:                                    # doctest: +SKIP
        ...     pool.explain(open("contract.txt").read(), " No", units="sentence").top(1)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        workers: int | None = None,
        *,
        gpus_per_worker: float | None = None,
        cpus_per_worker: int | None = None,
        address: str | None = None,
        **options: Any,
    ) -> None:
        share = Share(workers, gpus_per_worker, cpus_per_worker)
        chosen = sorted_options(options, "token", Explainer.ablate)
        late = [name for name in options if name in chosen.asking]
        if late:
            raise InputError(f"{late[0]} is an option of Pool.explain, not of Pool")
        name = model_name(model)
        self._stack = ExitStack()
        self.settled = self._stack.enter_context(cluster(address, share, "Pool"))
        self._crew = Crew(self.settled, name, self.settled.placed(chosen.loading), chosen.explaining)
        self._stack.callback(self._crew.close)
        self._questions = 0

    def explain(
        self,
        prompt: str | Sequence[dict[str, Any]],
        target: str | None = None,
        units: str = "token",
        *,
        exact: int | None = None,
        **options: Any,
    ) -> Explanation:
        """As `Explainer.explain`, with AtMan's method.

        Args:
            prompt: a text, or a list of chat messages.
            target: the answer; None: the model's own.
            units: "token" | "word" | "sentence" | "paragraph".
            exact: find this many of the strongest units and run them exactly; see docs/search.md. What goes on to the
                next round is decided here, once for all workers, which share out each round.
            options: of `Explainer.ablate`, by name: chat, include_target, max_new_tokens, language, recompute.

        Raises:
            InputError: an argument does not fit, or the workers do not compute the same.
            UnsupportedModelError: the model cannot be explained.
            RuntimeError: workers cannot start or die again and again, or the pool is closed.
        """
        if self._crew.is_closed:
            raise RuntimeError("the pool is closed")
        started = time.perf_counter()
        question, depth = self._question(prompt, target, units, exact, options)
        asked = self._ask(question)
        count = len(asked.units)
        if depth.exact is not None:
            tell_if_all_are_exact(depth.exact, count)
        search = Halving.over(asked.units, asked.prompt_length, count if depth.exact is None else depth.exact)
        rounds: list[_Round] = []
        while search.depth is not None:
            own = self._round(question, asked, search.candidates, search.depth, with_hints=not rounds)
            if own.hinted is not None and own.hinted.effects is not None:
                search.hint(own.hinted.effects)
            search.learn(dict(zip(own.units, own.scores.double().sum(1).tolist(), strict=True)))
            rounds.append(own)
        rounds.append(self._round(question, asked, search.chosen, depth.recompute))
        joined = _joined(asked, rounds, self.settled.workers, time.perf_counter() - started)
        if depth.exact is None:
            return replace(joined, recompute=depth.recompute)
        chosen = set(search.chosen)
        return replace(joined, exact=tuple(unit in chosen for unit in range(count)))

    def _question(
        self, prompt: Any, target: Any, units: str, exact: int | None, options: Mapping[str, Any]
    ) -> tuple[Question, Depth]:
        """Checked as far as no model is needed: what a worker raises ends those that are at work."""
        asking = sorted_options(options, units, Explainer.ablate).asking
        early = [name for name in options if name not in asking]
        if early:
            raise InputError(f"{early[0]} is an option of Pool, not of Pool.explain")
        depth = Depth.checked(asking["recompute"], exact, method("atman", {}), CAUSAL)
        common = {name: value for name, value in asking.items() if name not in ("units", "recompute")}
        checked = Request(Common.checked(**common), prompt, target, units).checked()
        if target is not None:
            arguments.text(target, "target", expected="a text or None")
        self._questions += 1
        return Question(self._questions, checked.prompt, target, asking), depth

    def _ask(self, question: Question) -> Asked:
        """Every worker begins with the question."""
        tasks = [Task("ask", (question,)) for _ in range(self.settled.workers)]
        every: list[Asked] = []
        for _, (asked, messages) in self._run(tasks):
            _tell(messages)
            every.append(asked)
        _check_agree(every, [])
        return every[0]

    def _round(
        self,
        question: Question,
        asked: Asked,
        units: Sequence[int],
        recompute: int | None,
        with_hints: bool = False,
    ) -> "_Round":
        """Some units, each suppressed by itself, by all workers together; the hints by one of them, meanwhile."""
        # with hints in smaller shares, of which less are left for the worker that is at the hints
        shares = self.settled.workers * (2 if with_hints else 1)
        dealt = deal(asked.suffix_tokens(units, recompute), shares)
        tasks = [Task("hint", (question,))] if with_hints else []
        tasks += [Task("score", (question, [units[i] for i in own], recompute)) for own in dealt if own]
        places = {unit: place for place, unit in enumerate(units)}
        found: list[Scored] = []
        hinted: Hinted | None = None
        scores = torch.empty(0, dtype=torch.float32, device="cpu")
        for task, outcome in self._run(tasks):
            _tell(outcome.messages)
            if isinstance(outcome, Hinted):
                hinted = outcome
                continue
            if not found:
                scores = outcome.scores.new_zeros(len(units), outcome.scores.shape[1])
            found.append(outcome)
            scores[[places[unit] for unit in task.arguments[1]]] = outcome.scores
        _check_agree([asked], found)
        return _Round(list(units), found, scores, hinted)

    def _run(self, tasks: list[Task]) -> Iterator[tuple[Task, Any]]:
        waiting = list(tasks)
        for task, outcome in self._crew.run(lambda: waiting.pop(0) if waiting else None):
            if isinstance(outcome, Died):
                raise RuntimeError(
                    f"{task.deaths} workers died of the same part of the prompt's variants: {outcome.reason}"
                )
            yield task, outcome

    def close(self) -> None:
        """Ends the workers, and Ray if the pool started it."""
        self._stack.close()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


class _Round(NamedTuple):
    """What all workers together found out about some units.

    Attributes:
        units: by number.
        scored: what each of them said.
        scores: (n_units, m).
        hinted: where hints were asked for.
    """

    units: list[int]
    scored: list[Scored]
    scores: Tensor
    hinted: Hinted | None


def _tell(messages: Sequence[str]) -> None:
    for message in messages:
        warnings.warn(message, stacklevel=2)


def _check_agree(asked: Sequence[Asked], scored: Sequence[Scored]) -> None:
    """Raises InputError if processes saw different questions or compute different things."""
    every = [*asked, *(each.asked for each in scored)]
    first = every[0]
    for other in every[1:]:
        for name in ("prompt", "target", "target_tokens", "units"):
            if getattr(other, name) != getattr(first, name):
                raise InputError(
                    f"workers disagree on the {name}: {getattr(first, name)!r:.200} and {getattr(other, name)!r:.200}; "
                    "where the answer is the model's own, give it as target"
                )
    for each in scored[1:]:
        apart = float((each.base_logprobs - scored[0].base_logprobs).abs().max())
        if apart > NOISE.get(first.settings["dtype"], 1.0):
            raise InputError(f"workers disagree on the answer's log-probabilities, by {apart:.2g}: their models differ")


def _joined(asked: Asked, rounds: Sequence[_Round], workers: int, seconds: float) -> Explanation:
    """What was found, as one process would tell it; scores are against the run of the process that they come from."""
    scores = rounds[-1].scores.new_zeros(len(asked.units), rounds[-1].scores.shape[1])
    for each in rounds:
        scores[each.units] = each.scores
    scored = [own for each in rounds for own in each.scored]
    hinted = rounds[0].hinted
    costs = [each.cost for each in scored] + ([] if hinted is None else [hinted.cost])
    stats: dict[str, Any] = {
        "seconds": seconds,
        "answering_seconds": max(each.asked.seconds for each in scored),
        "questions": 1,
        "workers": workers,
        "token_budget": max(cost["token_budget"] for cost in costs),
    }
    stats |= {name: sum(cost[name] for cost in costs) for name in ("tokens_through_model", "forwards", "variants")}
    return Explanation(
        prompt=asked.prompt,
        target=asked.target,
        units=asked.units,
        scores=scores.float(),
        target_tokens=asked.target_tokens,
        base_logprobs=scored[-1].base_logprobs.float(),
        settings={
            "method": "atman",
            **asked.settings,
            **({} if hinted is None else {"hints": hinted.source}),
            "path": scored[-1].path,
        },
        stats=stats,
    )
