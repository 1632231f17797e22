"""What is done to a model: how a unit's attention is turned down."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.errors import InputError
from atman_kernels.inputs.objective import Objective
from atman_kernels.planning.factors import factor_rows


@dataclass(frozen=True)
class Perturbation:
    """How units are suppressed: see `Explainer`, whose arguments these are."""

    mode: str = "log_additive"
    factor: float = 0.0
    similarity_threshold: float | None = None
    layers: tuple[int, ...] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """In JSON types, for records of what was measured; defaults are written out."""
        return {
            "mode": self.mode,
            "factor": self.factor,
            "similarity_threshold": self.similarity_threshold,
            "layers": None if self.layers is None else list(self.layers),
        }

    def factors(self, model: PreTrainedModel, objective: Objective) -> Tensor:
        """(n_units, positions) float32 on the CPU, one row of factors per unit.

        Raises:
            InputError: similar tokens are asked for where there are no word embeddings.
        """
        if not objective.units:
            return torch.ones(0, objective.positions, dtype=torch.float32, device="cpu")
        embeddings = None
        if self.similarity_threshold is not None:
            embeddings = objective.embeddings(model)
            if embeddings is None:
                raise InputError("similarity_threshold needs a text: pictures and recordings have no word embeddings")
        return factor_rows(
            objective.units,
            objective.positions,
            self.factor,
            embeddings=embeddings,
            similarity_threshold=self.similarity_threshold,
        )
