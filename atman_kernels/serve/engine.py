"""Requests as calls of the library: what a request would cost, and what the model says to it.

`measure` may be called from any thread, before a request waits; `run` by the one thread that works.
"""

import copy
import json
import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from atman_kernels.errors import Cancelled, InputError
from atman_kernels.explain import methods
from atman_kernels.explain.explainer import Explainer
from atman_kernels.formula import MODES
from atman_kernels.inputs.limits import language_positions, room_for_answer
from atman_kernels.inputs.own_answer import end_ids, generated
from atman_kernels.inputs.text_generation import read_prompt, target_ids
from atman_kernels.planning.units import GRANULARITIES
from atman_kernels.progress import listening
from atman_kernels.serve.errors import RequestError, request_error
from atman_kernels.serve.job import Job
from atman_kernels.serve.metrics import Metrics
from atman_kernels.serve.requests import AnswerRequest, ExplainRequest, Suppression
from atman_kernels.serve.settings import Settings
from atman_kernels.serve.telling import Telling, ToldJob
from atman_kernels.steering.steer import steer

if TYPE_CHECKING:
    from atman_kernels.result.explanation import Explanation

EXPLAINERS = 16  # kept: each knows of its model what took it a forward or two to find out
LOG = logging.getLogger("atman_kernels.serve")


class Engine:
    """One model, and what is done with it.

    Args:
        model: a transformers language model.
        tokenizer: its tokenizer, or the processor of a model that reads images, too.
        settings: limits.
        metrics: what is counted.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.model, self._given = model, tokenizer
        self._explainers: OrderedDict[Suppression, Explainer] = OrderedDict()
        explainer = self._explainer(Suppression())  # refuses what cannot be explained
        if explainer.task != "text-generation":
            raise InputError(f"model: only language models are served, {type(explainer.model).__name__} is none")
        self.model, self.tokenizer = explainer.model, explainer.tokenizer
        self._reads_images = explainer.processor is not None
        self._measuring = threading.Lock()
        self._measured_by = copy.deepcopy(self.tokenizer)  # tokenizers change while they work

    def describe(self) -> dict[str, Any]:
        """What there is to know about the model, for people and programs who ask."""
        return {
            "id": self.settings.name,
            "object": "model",
            "owned_by": "atman-kernels",
            "kind": "language",
            "chat": bool(getattr(self.tokenizer, "chat_template", None)),
            "images": self._reads_images,
            "positions": language_positions(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "methods": list(methods.names()),
            "modes": list(MODES),
            "units": list(GRANULARITIES),
            "limits": {
                "tokens": self.settings.max_tokens,
                "units": self.settings.max_units,
                "new_tokens": self.settings.max_new_tokens,
                "bytes": self.settings.max_bytes,
                "seconds": self.settings.seconds,
            },
        }

    # Before a request waits --------------------------------------------------------------------------------------

    def measure(self, request: ExplainRequest | AnswerRequest) -> int:
        """Tokens of the request's prompt with its answer, or with the longest that the model may give.

        Raises:
            InputError: something about it does not fit.
            RequestError: it is larger than what the service takes.
        """
        most = self.settings.max_new_tokens
        if request.max_new_tokens > most:
            raise RequestError(
                "invalid_request",
                f"max_new_tokens must be at most {most} here, got {request.max_new_tokens}",
                param="max_new_tokens",
            )
        with self._measuring:
            if isinstance(request, AnswerRequest):
                tokens = read_prompt(
                    self.model, self._measured_by, request.prompt, "token", chat=request.chat, language="en"
                )
                return self._checked(len(tokens.ids) + request.max_new_tokens)
            return self._measured(request)

    def _measured(self, request: ExplainRequest) -> int:
        methods.method(request.method, request.options)
        answers = [text for text in (request.target, request.versus) if text is not None]
        longest = max((len(target_ids(self.model, self._measured_by, text)) for text in answers), default=0)
        if request.target is None:
            longest = max(longest, request.max_new_tokens)
        if request.images:  # what they become is known once they are seen
            return self._checked(longest)
        tokens = read_prompt(
            self.model, self._measured_by, request.prompt, request.units, chat=request.chat, language=request.language
        )
        if len(tokens.units) > self.settings.max_units:
            raise RequestError(
                "too_large",
                f"units: the prompt has {len(tokens.units)}, this service takes {self.settings.max_units}; "
                "larger units are fewer",
                param="units",
            )
        return self._checked(len(tokens.ids) + longest)

    def _checked(self, tokens: int) -> int:
        if tokens > self.settings.max_tokens:
            raise RequestError(
                "too_large", f"prompt and answer have {tokens} tokens, this service takes {self.settings.max_tokens}"
            )
        return tokens

    # In the thread that works ------------------------------------------------------------------------------------

    def run(self, jobs: list[Job]) -> None:
        """Works on jobs of equal keys until each of them has its last event. Raises nothing."""
        told = [ToldJob(job, self.tokenizer, end_ids(self.model, self.tokenizer)) for job in jobs]
        for each in told:
            each.job.begin(self.settings.seconds)
        self._run(told)

    def _run(self, told: list[ToldJob]) -> None:
        while told := self._alive(told):
            try:
                self._work(told)
            except Cancelled:  # of some of them, or all; the others go on without
                continue
            except Exception as error:
                if len(told) == 1:
                    self._fail(told[0].job, error)
                else:  # each is told of its own fault, and of no other's
                    for each in told:
                        self._run([each])
                return

    def _alive(self, told: list[ToldJob]) -> list[ToldJob]:
        for each in told:
            if each.job.cancelled is not None:
                each.job.fail(each.job.cancelled)
        return [each for each in told if not each.job.finished]

    def _fail(self, job: Job, error: Exception) -> None:
        wrong = request_error(error)
        if wrong.kind == "internal":
            LOG.error("request %s failed", job.id, exc_info=error)
        job.fail(wrong)

    def _work(self, told: list[ToldJob]) -> None:
        listener = Telling(told, self.settings)
        with listening(listener):
            if isinstance(told[0].job.request, AnswerRequest):
                told[0].job.tell("result", self._answer(told[0].job.request))
                return
            found = self._explain([each.job.request for each in told])  # type: ignore[misc]
        self.metrics.explained(found)
        for each, explanation in zip(told, found, strict=True):
            each.job.tell("result", explanation)

    def _explain(self, requests: list[ExplainRequest]) -> "list[Explanation]":
        first = requests[0]
        pictures = None
        if first.images:
            if not self._reads_images:
                raise InputError(f"images: {type(self.model).__name__} reads none")
            from atman_kernels.serve.pictures import opened

            pictures = [[opened(data, number) for number, data in enumerate(first.images)]]
        return self._explainer(first.suppression).explain_batch(
            [each.prompt for each in requests],
            [each.target for each in requests],
            [each.units for each in requests],
            versus=[each.versus for each in requests],
            images=pictures,
            image_units=first.image_units,
            include_target=first.include_target,
            chat=first.chat,
            max_new_tokens=first.max_new_tokens,
            language=first.language,
            method=first.method,
            **first.options,
        )

    def _explainer(self, how: Suppression) -> Explainer:
        explainer = self._explainers.pop(how, None) or Explainer(
            self.model,
            self._given,
            mode=how.mode,
            factor=how.factor,
            similarity_threshold=how.similarity_threshold,
            layers=how.layers,
            progress=False,
        )
        self._explainers[how] = explainer
        while len(self._explainers) > EXPLAINERS:
            self._explainers.popitem(last=False)
        return explainer

    def _answer(self, request: AnswerRequest) -> dict[str, Any]:
        spans = {(start, end): factor for start, end, factor in request.spans}
        with steer(
            self.model,
            self.tokenizer,
            request.prompt,
            spans,  # type: ignore[arg-type]
            mode=request.mode,
            layers=request.layers,
            chat=request.chat,
        ) as steered:
            before = int(steered.inputs["input_ids"].shape[1])
            room = room_for_answer(before, language_positions(self.model), request.max_new_tokens)
            ids = generated(self.model, self.tokenizer, steered.inputs, before, room)
        ends = end_ids(self.model, self.tokenizer)
        while ids and ids[-1] in ends:
            ids.pop()
        return {
            "prompt": steered.texts[0],
            "answer": self.tokenizer.decode(ids),
            "spans": [
                {
                    "text": span.unit.text,
                    "start": span.unit.start,
                    "end": span.unit.end,
                    "token_indices": list(span.unit.token_indices),
                    "factor": span.factor,
                }
                for span in steered.spans[0]
            ],
        }


def as_json(result: Any) -> str:
    """A result as one line of JSON."""
    return result.to_json() if hasattr(result, "to_json") else json.dumps(result) + "\n"
