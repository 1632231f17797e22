"""Attention that is scaled all the time, while units are suppressed one after the other; and tokens that a unit holds
in part.

With a control c on a token and a unit that keeps f of it, the token's factor is c with the unit untouched and c · f
with it suppressed, so that a score says what the unit does under the controls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atman_kernels.errors import InputError
from atman_kernels.explain.explainer import Explainer
from atman_kernels.explain.methods import MethodContext
from atman_kernels.inputs.text_generation import Question, encode_prompt
from atman_kernels.planning.factors import factor_rows
from atman_kernels.planning.units import Unit
from atman_kernels.run.runner import Outcome, VariantRunner
from atman_kernels.serve.requests import Control, Overlap, TextControl


class ControlledExplainer(Explainer):
    """An `Explainer` under controls.

    Args:
        controls: of the one prompt that is explained.
        overlap: what becomes of tokens that a unit holds in part.
        patches: the question's image tokens, each as a unit with its place; called only if a control needs them.
        settings: see `Explainer`.
    """

    def __init__(
        self,
        *given: Any,
        controls: Sequence[Control],
        overlap: Overlap,
        patches: Callable[[], Sequence[Unit]],
        **settings: Any,
    ) -> None:
        super().__init__(*given, **settings)
        self.controls, self.overlap, self._patches = controls, overlap, patches

    def factors_of(self, question: Question) -> Tensor:
        rows = super().factors_of(question)
        if self.overlap == "partial" and question.embedded is None:
            offsets = self._offsets(question)
            for row, unit in zip(rows, question.units, strict=True):
                if unit.source == "prompt" and unit.start < unit.end:
                    for token, share in self._shares(question, offsets, unit.start, unit.end).items():
                        row[token] = 1 + (self.factor - 1) * share
        return rows * self.controls_of(question)

    def controls_of(self, question: Question) -> Tensor:
        """(L,) what the attention to each token is scaled by all the time."""
        scaled = torch.ones(len(question.inputs))
        for control in self.controls:
            scaled *= self._scaled_by(question, control)
        return scaled

    def _scaled_by(self, question: Question, control: Control) -> Tensor:
        shares = self._shares_of(question, control)
        if not shares:
            raise InputError(f"controls: no token lies in {control}")
        unit = Unit("", 0, 0, tuple(shares))
        row = factor_rows([unit], len(question.inputs), control.factor)[0]
        if self.similarity_threshold is not None and question.embedded is None:
            with torch.inference_mode():
                table = self.model.get_input_embeddings()
                embeddings = table(question.inputs).float().cpu()
            row = factor_rows(
                [unit],
                len(question.inputs),
                control.factor,
                embeddings=embeddings,
                similarity_threshold=self.similarity_threshold,
            )[0]
        for token, share in shares.items():
            row[token] = 1 + (control.factor - 1) * (share if control.overlap == "partial" else 1)
        return row

    def _shares_of(self, question: Question, control: Control) -> dict[int, float]:
        """Tokens that a control holds, and how much of each."""
        if isinstance(control, TextControl):
            return self._shares(question, self._offsets(question), control.start, control.end)
        places = [unit for unit in self._patches() if unit.image == control.image and unit.box is not None]
        shares: dict[int, float] = {}
        for unit in places:
            share = _common_area(unit.box, control.box) / _area(unit.box)  # type: ignore[arg-type]
            shares |= dict.fromkeys(unit.token_indices, share) if share > 0 else {}
        return shares

    def _offsets(self, question: Question) -> list[tuple[int, int]]:
        """Characters of every token of the prompt."""
        if question.embedded is not None:
            raise InputError("controls: the text of a prompt with images takes none")
        _, encoded = encode_prompt(self.model, self.tokenizer, question.prompt, chat=False)
        return [(start, end) for start, end in encoded["offset_mapping"]]

    @staticmethod
    def _shares(question: Question, offsets: list[tuple[int, int]], start: int, end: int) -> dict[int, float]:
        """Tokens that share characters with [start, end), and which part of each lies there; white space counts not."""
        shares = {}
        for token, (first, last) in enumerate(offsets):
            piece = question.prompt[first:last]
            if piece.strip():
                first, last = first + len(piece) - len(piece.lstrip()), last - len(piece) + len(piece.rstrip())
            common = min(end, last) - max(start, first)
            if common > 0:
                shares[token] = common / (last - first)
        return shares

    def _context(self) -> MethodContext:
        context = super()._context()
        runner = _ControlledRunner(context.runner, self.controls_of)
        return MethodContext(context.model, runner, context.factors, context.factor, context.similarity_threshold)  # type: ignore[arg-type]


class _ControlledRunner:
    """A `VariantRunner` whose unsuppressed run is one under controls."""

    def __init__(self, runner: VariantRunner, controls: Callable[[Question], Tensor]) -> None:
        self._runner, self._controls = runner, controls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, questions: Sequence[Question], factors: Sequence[Tensor], **options: Any) -> Outcome:
        options.pop("found", None)  # what a variant means is known once that run is there
        rows = [torch.cat([self._controls(q)[None], own]) for q, own in zip(questions, factors, strict=True)]
        outcome = self._runner.run(questions, rows, **options)
        return Outcome([each[0] for each in outcome.perturbed], [each[1:] for each in outcome.perturbed], outcome.work)


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _common_area(one: Sequence[float], other: Sequence[float]) -> float:
    return _area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))
