"""Variants as full rows of a batch: where nothing can be shared, or packing does not reproduce the model."""

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.objective import Objective
from atman_kernels.planning.packing import Variant, full_row_factors
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.run.work import Work, in_pieces


def run_full_rows(
    model: PreTrainedModel,
    objectives: list[Objective],
    factors: list[Tensor],
    variants: list[Variant],
    perturbation: Perturbation,
    budget: int,
    work: Work,
) -> Iterator[tuple[Variant, Tensor]]:
    """Yields variants with the (m,) values of their objectives.

    Args:
        model: what runs.
        objectives: what is asked.
        factors: per objective, (n_rows, positions) on the CPU.
        variants: of all objectives; a batch holds those of one.
        perturbation: mode and layers.
        budget: tokens per batch; halved when memory runs out.
        work: counts what it cost.
    """
    for number, objective in enumerate(objectives):
        own = [Variant(v.objective, v.row, 0, objective.cost) for v in variants if v.objective == number]

        def forward(taken: list[Variant], objective: Objective = objective) -> Tensor:
            rows = full_row_factors(taken, factors, objective.positions).to(input_device(objective.part(model)))
            values = objective.values(model, rows, mode=perturbation.mode, layers=perturbation.layers)
            work.add(len(taken) * objective.cost, len(taken))
            work.advance(len(taken) * objective.cost)
            return values

        for taken, values in in_pieces(own, max(budget, objective.cost), work, forward):
            yield from zip(taken, values, strict=True)
