"""What becomes known while the model works, told to the requests it belongs to; and whether they still want to know."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from atman_kernels.errors import Cancelled
from atman_kernels.progress import Listener
from atman_kernels.result.data import as_json
from atman_kernels.serve.errors import RequestError
from atman_kernels.serve.job import Job
from atman_kernels.serve.measuring import check_size
from atman_kernels.serve.metrics import Metrics
from atman_kernels.serve.requests import ExplainRequest
from atman_kernels.serve.settings import Settings

if TYPE_CHECKING:
    from atman_kernels.inputs.objective import Objective


class ToldJob:
    """A job, and what it has been told already: its work may begin anew."""

    def __init__(self, job: Job, tokenizer: Any, ends: set[int]) -> None:
        self.job = job
        self._tokenizer, self._ends = tokenizer, ends
        self._ids: list[int] = []
        self._said = ""
        self._known = 0  # units that it has been told of

    @property
    def answers(self) -> bool:
        """Whether the model is to answer by itself."""
        return getattr(self.job.request, "target", None) is None

    def begin_answer(self) -> None:
        """The model begins to answer."""
        self._ids = []

    def say(self, token: int) -> None:
        """One more token of the answer. Characters that are not whole yet wait for the next."""
        if not self.job.streamed or (token in self._ids[-1:] and token in self._ends):
            return
        self._ids.append(token)
        text = self._tokenizer.decode([each for each in self._ids if each not in self._ends])
        if text.endswith("�") or not text.startswith(self._said) or text == self._said:
            return
        self.job.tell("answer", {"text": text[len(self._said) :]})
        self._said = text

    def ask(self, question: "Objective", first: int) -> None:
        """Tells prompt, target and units, once; of nested units each further level, of which one is number `first`."""
        if self._known > first or not self.job.streamed or not question.units:
            return
        self._known = first + len(question.units)
        if first:
            self.job.tell("units", {"first": first, "units": as_json(question.units)})
            return
        self.job.tell(
            "question",
            {
                "prompt": question.prompt,
                "target": question.target,
                "target_tokens": list(question.target_tokens),
                "units": as_json(question.units),
                "levels": list(question.levels),
                "total_tokens": question.positions,
            },
        )


class Telling(Listener):
    """Tells jobs that are worked on together. Whenever it is told, it looks whether that is still wanted.

    Args:
        told: the jobs, as the prompts of one call.
        settings: limits, for what is known only now.
        metrics: what is counted.

    Raises:
        Cancelled, from every method: nobody wants the work any more, or those who do are better off without the rest.
    """

    def __init__(self, told: Sequence[ToldJob], settings: Settings, metrics: Metrics) -> None:
        self._told, self._settings, self._metrics = told, settings, metrics
        self._answering = iter([each for each in told if each.answers])
        self._firsts: list[int] = []  # per question, the number of the level's first unit among those of all levels
        self._units: list[int] = []  # per question, units so far
        self._left = [0] * len(told)  # tokens of units that are still to come
        self._cost: list[list[int]] = [[] for _ in told]
        self._done = 0
        self._versus: dict[int, int] = {}  # question of another answer -> of the answer itself
        self._halves: dict[tuple[int, int], Tensor] = {}

    def answering(self) -> Callable[[int], object]:
        """What is told the answer's tokens, one by one; it raises `Cancelled` if nobody waits."""
        each = next(self._answering)
        each.begin_answer()

        def say(token: int) -> None:
            self.look()
            if each.job.cancelled is not None:
                raise Cancelled
            each.say(token)

        return say

    def asked(self, questions: "Sequence[Objective]") -> None:
        """The objectives are known, before the first forward; of nested units, before that of each level."""
        self.look()
        self._firsts = self._units or [0] * len(questions)
        self._units = [first + len(each.units) for first, each in zip(self._firsts, questions, strict=True)]
        requests = [each.job.request for each in self._told]
        contrasted = [number for number, each in enumerate(requests) if getattr(each, "versus", None) is not None]
        self._versus = dict(zip(range(len(self._told), len(questions)), contrasted, strict=True))
        for number, (each, question) in enumerate(zip(self._told, questions, strict=False)):
            request = each.job.request
            assert isinstance(request, ExplainRequest)
            check_size(self._settings, request, question.positions, self._units[number])  # images are seen by now
            self._cost[number] = [question.positions - min(unit.token_indices) for unit in question.units]
            self._left[number] = sum(self._cost[number])
            each.ask(question, self._firsts[number])

    def progressed(self, done: int, total: int) -> None:
        """`done` of `total` tokens went through the model."""
        self._done = done
        self.look()
        for each in self._told:
            if each.job.streamed:
                each.job.tell("progress", {"done": done, "total": total})

    def retried(self) -> None:
        """A pack ran out of memory and is tried again in parts."""
        self._metrics.out_of_memory.inc()

    def estimated(self, question: int, unit: int, scores: Tensor) -> None:
        """What a search thinks of a unit by now."""
        self._tell_unit(question, unit, scores, exact=False)

    def found(self, question: int, unit: int, scores: Tensor) -> None:
        """The scores of a unit are known."""
        if question < len(self._told):
            self._left[question] -= self._cost[question][unit]
        self._tell_unit(question, unit, scores, exact=True)

    def _tell_unit(self, question: int, unit: int, scores: Tensor, exact: bool) -> None:
        """A unit's scores; of a contrast once both answers' are known, as their difference."""
        number = self._versus.get(question, question)
        job = self._told[number].job
        if not job.streamed:
            return
        request = job.request
        assert isinstance(request, ExplainRequest)
        if request.versus is not None:
            own = scores.double().sum() * (1 if question == number else -1)
            other = self._halves.pop((number, unit), None)
            if other is None:
                self._halves[number, unit] = own
                return
            scores = (other + own)[None]
        job.tell("unit", {"index": self._firsts[question] + unit, "scores": scores.tolist(), "exact": exact})

    def look(self) -> None:
        """Whether anybody still waits, and has time."""
        now = time.monotonic()
        for each in self._told:
            if each.job.deadline is not None and now > each.job.deadline:
                seconds = self._settings.seconds
                each.job.cancel(RequestError("timed_out", f"not done within {seconds:g} seconds; ask for less"))
        gone = [number for number, each in enumerate(self._told) if each.job.cancelled is not None]
        # What is done would be done again for those who stay: worth it where more than that can be left out.
        if len(gone) == len(self._told) or sum(self._left[number] for number in gone) > self._done:
            raise Cancelled
