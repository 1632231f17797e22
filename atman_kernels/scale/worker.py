"""What a worker does: it holds one model, and explains rows of a data set or some units of one prompt."""

import hashlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import atman_kernels
from atman_kernels import Explainer, load_model
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.models.placement import input_device
from atman_kernels.scale.question import Asked, Begun, Hinted, Question, Scored
from atman_kernels.scale.results import row_of
from atman_kernels.scale.source import Row

SAMPLE = 64  # values of each parameter that tell models apart


class DeviceLostError(RuntimeError):
    """Nothing can be computed on the model's device any more until the process ends."""


class Worker:
    """Lives in a process of its own; `load` comes first.

    Attributes:
        in_step: other processes compute the same rows with other parts of the model, so that nothing may be tried again
            but what all of them refuse before they compute.
    """

    explainer: Explainer
    in_step: bool = False
    _begun: Begun | None = None

    def load(
        self, model: str, threads: int, loading: Mapping[str, Any], explaining: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Loads the model.

        Args:
            model: as `load_model` takes it.
            threads: of torch.
            loading, explaining: further arguments of `load_model` and of `Explainer`, by name.

        Returns:
            What must be the same for all workers, in JSON types.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        torch.set_num_threads(threads)
        loaded, tokenizer = load_model(model, **loading)
        self.explainer = Explainer(loaded, tokenizer, progress=False, **explaining)
        return facts_of(self.explainer.model)

    def explain(self, rows: Sequence[Row], options: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """Rows of the results without their ids' column, and what was warned of.

        The prompts share packs. What one of them is at fault for is found by halving, and becomes its `error`.
        """
        with _warned() as messages:
            return self._explained(list(rows), options), messages

    def _explained(self, rows: list[Row], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            explanations = self.explainer.explain_batch(
                [row.prompt for row in rows], [row.target for row in rows], **options
            )
        except Exception as error:
            self._raise_if_not_a_row_s(error)
            if len(rows) == 1:
                message = str(error).removeprefix("prompt 0: ")  # its number among those of the call
                return [failed(rows[0], f"{type(error).__name__}: {message}")]
            half = len(rows) // 2
            return self._explained(rows[:half], options) + self._explained(rows[half:], options)
        return [_origin(row) | row_of(found) for row, found in zip(rows, explanations, strict=True)]

    def _raise_if_not_a_row_s(self, error: Exception) -> None:
        """Raises what is not one row's fault: the model's, or its device's, which may be lost to this process."""
        if isinstance(error, UnsupportedModelError) or (self.in_step and not isinstance(error, InputError)):
            raise error
        try:
            torch.ones(1, dtype=torch.float32, device=input_device(self.explainer.model)).add_(1).sum().cpu()
        except RuntimeError as lost:
            raise DeviceLostError(f"{type(error).__name__}: {error}") from lost

    def ask(self, question: Question) -> tuple[Asked, list[str]]:
        """Begins with a question: what became of it, and what was warned of."""
        with _warned() as messages:
            return self._on(question).asked, messages

    def hint(self, question: Question) -> Hinted:
        """What a search of a question's units is told beforehand."""
        with _warned() as messages:
            return self._on(question).hint(messages)

    def score(self, question: Question, units: Sequence[int], recompute: int | None) -> Scored:
        """Some units of a question, by number, each suppressed by itself; `recompute` as of `Explainer.explain`."""
        with _warned() as messages:
            return self._on(question).score(units, recompute, messages)

    def _on(self, question: Question) -> Begun:
        """The question at hand: begun with by now, as by another process that died, if it is a new one."""
        if self._begun is None or self._begun.question != question:
            self._begun = None  # its keys and values go first
            self._begun = Begun(self.explainer, question)
        return self._begun


def failed(row: Row, error: str) -> dict[str, Any]:
    """A row of the results that holds nothing but an error."""
    return _origin(row) | {"error": error}


def _origin(row: Row) -> dict[str, Any]:
    return {"id": row.id, "version": atman_kernels.__version__, "fingerprint": row.fingerprint}


def facts_of(model: Any) -> dict[str, Any]:
    """What results depend on beyond what was asked for: versions, dtype, and the weights, by a sample of each."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "versions": {"atman_kernels": atman_kernels.__version__, **versions},
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _digest(model),
    }


@torch.no_grad()
def _digest(model: Any) -> str | None:
    """None where values cannot be read as numbers, as those of some quantised tensors."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        for name, parameter in model.named_parameters():
            values = getattr(parameter, "to_local", parameter.detach)().flatten()  # of a sharded one, what is here
            values = values[:: max(1, values.numel() // SAMPLE)][:SAMPLE]
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(values.double().cpu().numpy().tobytes())
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return digest.hexdigest()


@contextmanager
def _warned() -> Iterator[list[str]]:
    """The texts of the warnings inside that are for the user; they go where the results go."""
    messages: list[str] = []

    def keep(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in messages:
            messages.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = keep
        yield messages
