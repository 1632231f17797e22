"""What any subsets of a prompt's units are worth to an answer: the runs that sampling methods are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atman_kernels.arguments import entries
from atman_kernels.errors import InputError
from atman_kernels.inputs.objective import Objective
from atman_kernels.planning.factors import subset_rows
from atman_kernels.planning.units import Unit
from atman_kernels.run.runner import Outcome, Runner

Masks = Tensor | Sequence[Sequence[bool]] | Callable[[tuple[Unit, ...]], Tensor]


def run_subsets(
    runner: Runner,
    objectives: Sequence[Objective],
    masks: Sequence[Tensor],
    description: str,
    recompute: int | None = None,
) -> Outcome:
    """Every objective under every row of its masks; equal rows run once.

    Args:
        runner: what runs, and how a unit is suppressed.
        objectives: what is asked.
        masks: per objective, (n_variants, n_units) bool, True = suppressed.
        description: what the progress bar says.
        recompute: see `Runner.run`.

    Returns:
        An `Outcome` whose `perturbed` has one row per row of the masks.
    """
    distinct = [torch.unique(rows, dim=0, return_inverse=True) for rows in masks]
    factors = [
        subset_rows(runner.perturbation.factors(runner.model, objective), rows)
        for objective, (rows, _) in zip(objectives, distinct, strict=True)
    ]
    outcome = runner.run(objectives, factors, description, recompute=recompute)
    perturbed = [found[places] for found, (_, places) in zip(outcome.perturbed, distinct, strict=True)]
    return replace(outcome, perturbed=perturbed)


def checked_masks(masks: Any, units: tuple[Unit, ...]) -> Tensor:
    """The user's masks as a (n_variants, n_units) bool tensor on the CPU.

    Raises:
        InputError: they are of another form.
    """
    made = masks(units) if callable(masks) else masks
    try:
        # an array as it is, which is quicker than its entries one by one
        listed = made if isinstance(made, Tensor) or hasattr(made, "tolist") else entries(made, "masks", "rows")
        made = torch.as_tensor(listed, device="cpu").detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"masks must be a bool tensor (n_variants, {len(units)}), got {type(made).__name__}"
        ) from error
    if made.dtype != torch.bool:
        raise InputError(f"masks must be of bool, True where a unit is suppressed, got {made.dtype}")
    if made.dim() != 2 or made.shape[1] != len(units) or not len(made):
        raise InputError(
            f"masks must have shape (n_variants, {len(units)}), with a column for each unit and at least one row, got "
            f"{tuple(made.shape)}"
        )
    return made
