"""Random scores: what every method must beat."""

from collections.abc import Sequence

import torch

from atman_kernels.explain.methods import MethodContext, MethodOutcome, seeded
from atman_kernels.hf.forward.base import own_logprobs
from atman_kernels.inputs.text_generation import CausalObjective


def random(context: MethodContext, questions: Sequence[CausalObjective], *, seed: int = 0) -> MethodOutcome:
    """A number from [0, 1) for each unit and target token. Cost: one forward, for the log-probs.

    Args:
        seed: equal seeds give equal scores to equal numbers of units and target tokens.
    """
    generator = seeded(seed)
    return MethodOutcome(
        scores=[
            torch.rand(len(q.units), len(q.targets), generator=generator, dtype=torch.float32, device="cpu")
            for q in questions
        ],
        logprobs=[own_logprobs(context.model, q.inputs, q.rows, q.targets).cpu() for q in questions],
    )
