"""Requests as calls of the library, and what the model says to them. Only one thread works with an engine."""

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from atman_kernels.errors import Cancelled, InputError
from atman_kernels.explain import methods
from atman_kernels.explain.explainer import Explainer
from atman_kernels.formula import MODES
from atman_kernels.hf.models.parts import decoder_of
from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.image_text import read_with_images
from atman_kernels.inputs.limits import language_positions, room_for_answer
from atman_kernels.inputs.own_answer import end_ids, generated, without_ends
from atman_kernels.planning.units import GRANULARITIES, Unit
from atman_kernels.progress import listening
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.serve.controls import ControlledExplainer
from atman_kernels.serve.errors import request_error
from atman_kernels.serve.job import Job
from atman_kernels.serve.measuring import Measuring
from atman_kernels.serve.metrics import Metrics
from atman_kernels.serve.requests import AnswerRequest, ExplainRequest
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
        self._explainers: OrderedDict[Perturbation, Explainer] = OrderedDict()
        explainer = self._explainer(Perturbation())  # refuses what cannot be explained
        if explainer.task != "text-generation":
            raise InputError(f"model: only language models are served, {type(explainer.model).__name__} is none")
        self.model, self.tokenizer = explainer.model, explainer.tokenizer
        self._reads_images = explainer.processor is not None
        self.measuring = Measuring(self.model, self._given, settings, self._reads_images)

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
            "device": str(input_device(self.model)),
            "methods": [name for name in methods.names() if name not in methods.WITH_FILES],
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
        listener = Telling(told, self.settings, self.metrics)
        with listening(listener), _before_forwards(self.model, listener.look):
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
            from atman_kernels.serve.pictures import opened

            pictures = [[opened(data, number) for number, data in enumerate(first.images)]]
        return self._explainer_for(first, pictures).explain_batch(
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
            **first.depth,
            **first.options,
        )

    def _explainer_for(self, request: ExplainRequest, pictures: Any) -> Explainer:
        if not request.needs_own_factors:
            return self._explainer(request.perturbation)

        def patches() -> Sequence[Unit]:
            read = read_with_images(
                self.model, self._given, self.tokenizer, request.prompt, pictures[0], None, "patch",
                chat=request.chat, language=request.language,
            )  # fmt: skip
            return read.units

        return ControlledExplainer(
            self.model,
            self._given,
            controls=request.controls,
            overlap=request.overlap,
            patches=patches,
            progress=False,
            **asdict(request.perturbation),
        )

    def _explainer(self, how: Perturbation) -> Explainer:
        explainer = self._explainers.pop(how, None) or Explainer(self.model, self._given, progress=False, **asdict(how))
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
        return {
            "prompt": steered.texts[0],
            "answer": self.tokenizer.decode(without_ends(ids, end_ids(self.model, self.tokenizer))),
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


@contextmanager
def _before_forwards(model: Any, look: Callable[[], None]) -> Iterator[None]:
    """Inside, `look` is called before every forward, whoever makes it: answers and gradients do not tell a listener."""
    handle = decoder_of(model).register_forward_pre_hook(lambda *_: look())
    try:
        yield
    finally:
        handle.remove()


def as_json(result: Any) -> str:
    """A result as one line of JSON."""
    return result.to_json() if hasattr(result, "to_json") else json.dumps(result) + "\n"
