"""From what a method found to an `Explanation`: scores with the facts that a reader needs beside them."""

import time
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import atman_kernels
from atman_kernels.explain.head_weights import recorded
from atman_kernels.explain.methods import Method, MethodOutcome
from atman_kernels.hf.models.placement import devices_of
from atman_kernels.inputs.objective import Objective
from atman_kernels.result.data import LOG_PROBABILITY, RISE
from atman_kernels.result.explanation import Explanation


def explanation_of(
    objective: Objective,
    method: Method,
    outcome: MethodOutcome,
    index: int,
    settings: dict[str, Any],
    stats: dict[str, Any],
    recompute: int | None = None,
) -> Explanation:
    """One objective's share of what a method found.

    Args:
        index: of the objective among those that the method saw.
        settings: how it was explained; what the objective itself knows is added.
        stats: what it cost.
    """
    scores, logprobs = outcome.scores[index].float(), outcome.logprobs[index]
    tokens = objective.target_tokens
    if scores.shape[1] < len(tokens):  # one score for the whole answer
        tokens, logprobs = (objective.target,), logprobs.sum(dim=0, keepdim=True)
    return Explanation(
        prompt=objective.prompt,
        target=objective.target,
        units=objective.units,
        scores=scores,
        target_tokens=tokens,
        base_logprobs=logprobs.float(),
        measure=method.measure or _measure(objective.value),
        value=objective.value,
        recompute=recompute,
        levels=objective.levels,
        exact=None if outcome.exact is None else tuple(outcome.exact[index].tolist()),
        settings=settings | objective.facts,
        stats=stats,
        standard_errors=None if outcome.draws is None else errors_of(outcome.draws[index]),
    )


def _measure(value: str) -> str:
    """What a score is where a suppression is measured."""
    return RISE if value == LOG_PROBABILITY else f"fall of the {value} when suppressed"


def errors_of(draws: Tensor) -> Tensor:
    """(n_units,) standard errors of the means of (n_draws, n_units) independent draws."""
    return draws.std(dim=0).div(len(draws) ** 0.5).float()


def settings_of(model: PreTrainedModel, method: Method, outcome: MethodOutcome, units: Any) -> dict[str, Any]:
    """What was done to what, in JSON types."""
    own = {} if method.measure is None else {"options": recorded(method.options)}
    return {"method": method.name, **own, **outcome.settings, **origin_of(model, units)}


def origin_of(model: PreTrainedModel, units: Any) -> dict[str, Any]:
    """What was explained, and with which versions."""
    return {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "units": units,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": ", ".join(map(str, devices_of(model))),
        "versions": {
            "atman_kernels": atman_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def stats_of(outcome: MethodOutcome, started: float, answered: float) -> dict[str, Any]:
    """What explaining cost.

    Args:
        started, answered: `time.perf_counter()` when asking began, and when all answers were there.
    """
    return {
        "seconds": time.perf_counter() - started,
        "answering_seconds": answered - started,
        "questions": len(outcome.scores),
        **outcome.stats,
    }
