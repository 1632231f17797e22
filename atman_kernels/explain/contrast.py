"""Why this answer rather than that one: two explanations of one prompt as one."""

import torch
from torch import Tensor

from atman_kernels.errors import InputError
from atman_kernels.inputs.objective import Objective
from atman_kernels.result.data import RISE, AnswerLogprobs
from atman_kernels.result.explanation import Explanation


def check_versus(target: str | None, versus: str | None, include_target: bool) -> None:
    """What can be known before the model runs.

    Raises:
        InputError: versus is the target, or the target's own tokens would be units.
    """
    if versus is None:
        return
    if versus == target:
        raise InputError(f"versus must be another answer than target, got {versus!r} for both")
    if include_target:
        raise InputError("include_target does not go with versus: the two answers have no tokens in common to explain")


def check_answers(objective: Objective, other: Objective) -> None:
    """As `check_versus`, once the model has answered: other texts may still be the same tokens."""
    first, second = objective.sequence, other.sequence
    if first is not None and second is not None and torch.equal(first.targets, second.targets):
        raise InputError(f"versus must be another answer than target, got the same tokens for both: {other.target!r}")


def contrast(explanation: Explanation, other: Explanation, errors: Tensor | None) -> Explanation:
    """The explanation of one answer minus that of another to the same prompt.

    There is one target token, "A rather than B", whose `base_logprobs` is ln p(A) − ln p(B): above 0 where the model
    prefers A. A unit's score is its total for A minus its total for B; with AtMan, by how much suppressing the unit
    brings that preference down.

    Args:
        explanation, other: of the two answers, with the same units.
        errors: (n_units,) standard errors of the difference, where it is an estimate.
    """
    sides = torch.stack([explanation.scores.double().sum(1), other.scores.double().sum(1)], dim=1)
    own, others = (float(each.base_logprobs.double().sum()) for each in (explanation, other))
    measure = explanation.measure
    return Explanation(
        prompt=explanation.prompt,
        target=explanation.target,
        units=explanation.units,
        scores=(sides[:, :1] - sides[:, 1:]).float(),
        target_tokens=(f"{explanation.target} rather than {other.target}",),
        base_logprobs=torch.tensor([own - others], dtype=torch.float32, device="cpu"),
        settings=explanation.settings,
        stats=explanation.stats,
        standard_errors=errors,
        measure="fall of ln p(answer) − ln p(other answer) when suppressed, in nats"
        if measure == RISE
        else f"{measure}; of the answer minus of the other answer",
        versus=other.target,
        logprobs=AnswerLogprobs(own, others),
        recompute=explanation.recompute,
        exact=explanation.exact,
        levels=explanation.levels,
        sides=sides.float(),
    )
