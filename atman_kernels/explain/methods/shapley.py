"""Shapley values: what each unit adds to the answer, averaged over orders in which units come in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atman_kernels.explain.methods import MethodContext, MethodOutcome, seeded
from atman_kernels.inputs.objective import Objective
from atman_kernels.run.subsets import run_subsets


def shapley(
    context: MethodContext, objectives: Sequence[Objective], *, permutations: int = 10, seed: int = 0
) -> MethodOutcome:
    """The mean gain in a target token's log-prob, in nats, when a unit's suppression ends, over random orders.

    Starting with every unit suppressed, units come back one by one in a random order; each gets what the log-prob
    gained as it came (permutation sampling: Castro et al. 2009). Every order is followed by its reverse, which makes
    the estimate surer (antithetic sampling: Mitchell et al., arXiv 2104.12199). For each target token the values add
    up to its log-prob as it is minus that with all units suppressed, whatever was drawn.

    Cost: at most permutations · (n_units − 1) + 1 variants; AtMan's own scores take n_units.

    Args:
        permutations: orders to draw, in pairs of opposite ones: even, at least 4. Standard errors fall with their root.
        seed: equal seeds give equal orders for equal numbers of units.
    """
    orders = [_orders(len(objective.units), permutations, seeded(seed)) for objective in objectives]
    outcome = run_subsets(
        context.runner, objectives, [_suppressed_along(each) for each in orders], "sampling orders", context.recompute
    )
    scores, draws = [], []
    for order, perturbed in zip(orders, outcome.perturbed, strict=True):
        n_orders, n_units = order.shape
        worth = perturbed.double().unflatten(0, (n_orders, n_units + 1))
        gains = torch.empty(n_orders, n_units, worth.shape[-1], dtype=torch.float64, device="cpu")
        gains.scatter_(1, order[..., None].expand_as(gains), worth.diff(dim=1))
        scores.append(gains.mean(dim=0))
        draws.append(gains.sum(dim=-1).unflatten(0, (-1, 2)).mean(dim=1))
    return MethodOutcome.of_run(context, outcome, scores, draws)


def _orders(n_units: int, permutations: int, generator: torch.Generator) -> Tensor:
    """(permutations, n_units): orders, each followed by its reverse."""
    drawn = [torch.randperm(n_units, generator=generator, device="cpu") for _ in range(permutations // 2)]
    return torch.stack([each for order in drawn for each in (order, order.flip(0))])


def _suppressed_along(orders: Tensor) -> Tensor:
    """(n_orders · (n_units + 1), n_units) bool: who is still suppressed after 0, 1, … units of each order came back."""
    n_units = orders.shape[1]
    place = orders.argsort(dim=1)  # of each unit in each order
    return (place[:, None, :] >= torch.arange(n_units + 1, device="cpu")[:, None]).flatten(0, 1)
