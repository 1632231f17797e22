"""Attention that is scaled all the time, while units are suppressed one after the other; and tokens that a unit holds
in part.

With a control c on a token and a unit that keeps f of it, the token's factor is c with the unit untouched and c · f
with it suppressed, so that a score says what the unit does under the controls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels.errors import InputError
from atman_kernels.explain.explainer import Explainer
from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.inputs.tokenization import encode_prompt
from atman_kernels.planning.units import Unit
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.run.runner import Outcome, Runner
from atman_kernels.serve.requests import Control, Overlap, TextControl


class ControlledExplainer(Explainer):
    """An `Explainer` under controls.

    Args:
        controls: of the one prompt that is explained.
        overlap: what becomes of tokens that a unit holds in part.
        patches: the objective's image tokens, each as a unit with its place; called only if a control needs them.
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
        plain = self.runner.perturbation
        self.runner.perturbation = _ControlledPerturbation(**vars(plain), under_controls=self._under_controls)
        self.runner = _ControlledRunner(self.runner, self.controls_of)

    def _under_controls(self, objective: CausalObjective, rows: Tensor) -> Tensor:
        if self.overlap == "partial" and objective.embedded is None:
            offsets = self._offsets(objective)
            for row, unit in zip(rows, objective.units, strict=True):
                if unit.source == "prompt" and unit.start < unit.end:
                    for token, share in self._shares(objective, offsets, unit.start, unit.end).items():
                        row[token] = 1 + (self.factor - 1) * share
        return rows * self.controls_of(objective)

    def controls_of(self, objective: CausalObjective) -> Tensor:
        """(L,) what the attention to each token is scaled by all the time."""
        scaled = torch.ones(len(objective.inputs), dtype=torch.float32, device="cpu")
        for control in self.controls:
            scaled *= self._scaled_by(objective, control)
        return scaled

    def _scaled_by(self, objective: CausalObjective, control: Control) -> Tensor:
        shares = self._shares_of(objective, control)
        if not shares:
            raise InputError(f"controls: no token lies in {control}")
        threshold = self.similarity_threshold if objective.embedded is None else None
        held = replace(objective, units=(Unit("", 0, 0, tuple(shares)),))
        row = Perturbation(factor=control.factor, similarity_threshold=threshold).factors(self.model, held)[0]
        for token, share in shares.items():
            row[token] = 1 + (control.factor - 1) * (share if control.overlap == "partial" else 1)
        return row

    def _shares_of(self, objective: CausalObjective, control: Control) -> dict[int, float]:
        """Tokens that a control holds, and how much of each."""
        if isinstance(control, TextControl):
            return self._shares(objective, self._offsets(objective), control.start, control.end)
        places = [unit for unit in self._patches() if unit.image == control.image and unit.box is not None]
        shares: dict[int, float] = {}
        for unit in places:
            share = _common_area(unit.box, control.box) / _area(unit.box)  # type: ignore[arg-type]
            shares |= dict.fromkeys(unit.token_indices, share) if share > 0 else {}
        return shares

    def _offsets(self, objective: CausalObjective) -> list[tuple[int, int]]:
        """Characters of every token of the prompt."""
        if objective.embedded is not None:
            raise InputError("controls: the text of a prompt with images takes none")
        _, encoded = encode_prompt(self.model, self.tokenizer, objective.prompt, chat=False)
        return [(start, end) for start, end in encoded["offset_mapping"]]

    @staticmethod
    def _shares(objective: CausalObjective, offsets: list[tuple[int, int]], start: int, end: int) -> dict[int, float]:
        """Tokens that share characters with [start, end), and which part of each lies there; white space counts not."""
        shares = {}
        for token, (first, last) in enumerate(offsets):
            piece = objective.prompt[first:last]
            if piece.strip():
                first, last = first + len(piece) - len(piece.lstrip()), last - len(piece) + len(piece.rstrip())
            common = min(end, last) - max(start, first)
            if common > 0:
                shares[token] = common / (last - first)
        return shares


@dataclass(frozen=True)
class _ControlledPerturbation(Perturbation):
    """What is done to units while the controls hold."""

    under_controls: Callable[[CausalObjective, Tensor], Tensor] = field(kw_only=True)

    def factors(self, model: Any, objective: Objective) -> Tensor:
        assert isinstance(objective, CausalObjective)
        return self.under_controls(objective, super().factors(model, objective))


class _ControlledRunner(Runner):
    """A `Runner` whose unsuppressed run is one under controls."""

    def __init__(self, runner: Runner, controls: Callable[[CausalObjective], Tensor]) -> None:
        super().__init__(runner.model, runner.perturbation, runner.token_budget, runner.progress)
        self._controls = controls

    def run(self, objectives: Sequence[Objective], factors: Sequence[Tensor], *given: Any, **options: Any) -> Outcome:
        options.pop("found", None)  # what a variant means is known once that run is there
        rows = []
        for objective, own in zip(objectives, factors, strict=True):
            assert isinstance(objective, CausalObjective)
            rows.append(torch.cat([self._controls(objective)[None], own]))
        outcome = super().run(objectives, rows, *given, **options)
        unperturbed, perturbed = ([each[0] for each in outcome.perturbed], [each[1:] for each in outcome.perturbed])
        return replace(outcome, unperturbed=unperturbed, perturbed=perturbed)


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _common_area(one: Sequence[float], other: Sequence[float]) -> float:
    return _area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))
