"""Explanations of models that read both ways: every variant is a whole row of a batch, for nothing can be shared."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.explain.methods import MethodContext, MethodOutcome
from atman_kernels.explain.methods.perturbation import cost
from atman_kernels.hf.attention.pooling import encoder_run
from atman_kernels.hf.attention.suppressed_runs import SuppressedRun
from atman_kernels.hf.models.memory import activation_bytes_per_token, free_bytes
from atman_kernels.hf.models.parts import computing_dtype
from atman_kernels.planning.factors import factor_rows
from atman_kernels.planning.packing import Variant, VariantQueue, token_budget, whole_factors
from atman_kernels.planning.units import Unit
from atman_kernels.progress import Meter
from atman_kernels.run.packed import Perturbation, Work, shrink_or_raise
from atman_kernels.run.runner import NOISE_CEILING, VariantRunner


@dataclass(frozen=True, eq=False)
class Task:
    """A question that one forward of a model answers with one number per target token.

    Attributes:
        prompt, target: what is shown of both.
        units: what gets a score; token positions are those of `factor`'s columns.
        target_tokens: (m,) texts to show.
        positions: keys that factors speak of.
        cost: tokens of one row through the model's layers.
        part: whose attention is suppressed.
        values: n -> (n, m), the model's answer to n equal rows: higher is better.
        run: (factor, mode=…, layers=…) -> the run that suppresses the part's attention, where the model tells no other
            way which of its keys are which.
        value: what these values are, "log-probability" | "logit" | "cosine".
        embeddings: (positions, width) input embeddings, if tokens have neighbours; a call, as it costs something.
        facts: what an explanation's settings say beyond the usual.
    """

    prompt: str
    target: str
    units: tuple[Unit, ...]
    target_tokens: tuple[str, ...]
    positions: int
    cost: int
    part: PreTrainedModel
    values: Callable[[int], Tensor]
    run: Callable[..., SuppressedRun] | None = None
    value: str = "log-probability"
    embeddings: Callable[[], Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def values_under(task: Task, factor: Tensor | None, perturbation: Perturbation) -> Tensor:
    """(V, m) values under (V, positions) factors; (1, m) for None, which is our attention without any.

    Raises:
        UnsupportedModelError: the attention to some of the keys was not reached.
    """
    options: dict[str, Any] = {"mode": perturbation.mode, "layers": perturbation.layers}
    run = encoder_run(task.part, factor, **options) if task.run is None else task.run(factor, **options)
    with run.installed(task.part, task.part), torch.inference_mode():
        values = task.values(1 if factor is None else len(factor))
    if not run.reached:
        raise UnsupportedModelError(
            f"{type(task.part).__name__} cannot be explained: a forward of it never called the attention function"
        )
    return values


def run_task(context: MethodContext, task: Task) -> MethodOutcome:
    """The fall of the task's values with every unit suppressed.

    Raises:
        InputError: neighbours are asked for where there are no word embeddings.
        UnsupportedModelError: our attention does not reproduce the model's own.
        MemoryError: a single row does not fit.
    """
    threshold = context.similarity_threshold
    embeddings = None
    if threshold is not None:
        if task.embeddings is None:
            raise InputError("similarity_threshold needs a text: pictures and recordings have no word embeddings")
        embeddings = task.embeddings()
    factors = factor_rows(
        task.units, task.positions, context.factor, embeddings=embeddings, similarity_threshold=threshold
    )
    work = Work()
    base, values = _run(task, factors, context.runner, work)
    return MethodOutcome(
        scores=[(base - values).float()],
        logprobs=[base],
        stats=cost(work),
        settings=context.suppression | {"path": "batched"},
    )


def _run(task: Task, factors: Tensor, runner: VariantRunner, work: Work) -> tuple[Tensor, Tensor]:
    """(m,) and (n, m) values on the CPU: with nothing suppressed, and under every row of (n, positions) factors.

    The token budget is halved when memory runs out.
    """
    device = task.part.device
    alone = _check_attention(task, runner.perturbation, work)
    budget = runner.token_budget or token_budget(free_bytes(device), activation_bytes_per_token(task.part), device.type)
    if runner.runs_rows_alone:
        runner.tell_that_rows_mix()
        budget = 1  # a variant longer than the budget gets a forward of its own
    rider = Variant(0, None, 0, task.cost)  # unsuppressed, by the same way as the others
    queue = VariantQueue([*(Variant(0, unit, 0, task.cost) for unit in range(len(factors))), rider], budget)
    found: dict[int | None, Tensor] = {}
    total = (len(factors) + 1) * task.cost
    with Meter(runner.progress, total, "explaining") as meter:
        for taken in queue:
            rows = whole_factors(taken, [factors], task.positions).to(device)
            try:
                values = values_under(task, rows, runner.perturbation).cpu()
            except (RuntimeError, MemoryError) as error:
                shrink_or_raise(error, queue, taken)
                continue
            found |= {variant.unit: row for variant, row in zip(taken, values, strict=True)}
            if rider in taken and not runner.runs_rows_alone and runner.rows_mix(found[None], alone):
                return _run(task, factors, runner, work)  # from the beginning, every row alone
            work.add(len(taken) * task.cost, len(taken))
            work.token_budget = queue.token_budget
            meter.advance(len(taken) * task.cost)
    return found[None], torch.stack([found[unit] for unit in range(len(factors))])


def _check_attention(task: Task, perturbation: Perturbation, work: Work) -> Tensor:
    """(m,) values on the CPU by our attention, which has to be the model's own."""
    with torch.inference_mode():
        own = task.values(1)
    ours = values_under(task, None, perturbation)
    work.add(2 * task.cost, 2)
    name, dtype = type(task.part).__name__, computing_dtype(task.part)
    if not bool(own.isfinite().all()):
        raise UnsupportedModelError(f"{name} gives the target no finite {task.value} in {dtype}")
    noise = float((own - ours).square().mean().sqrt())
    ceiling = NOISE_CEILING.get(dtype, 1.0)
    if not noise <= ceiling:
        raise UnsupportedModelError(
            f"{name} cannot be explained: our attention does not reproduce its own (the target's {task.value} "
            f"differs by {noise:.2g}, {ceiling:g} is the most that {dtype} explains)"
        )
    return ours[0].cpu()
