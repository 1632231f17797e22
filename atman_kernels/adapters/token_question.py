"""Explanations of token ids that another library has made."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from atman_kernels.errors import InputError
from atman_kernels.explain.explainer import Explainer
from atman_kernels.hf.attention.suppression import suppress
from atman_kernels.hf.models.eval_mode import evaluating
from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.limits import check_ids, check_length, language_positions
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.planning.units import Unit
from atman_kernels.run.runner import Outcome


def token_question(explainer: Explainer, ids: Tensor, prompt_length: int, units: Sequence[Unit]) -> CausalObjective:
    """A question about ids (n + m,), of which the first n are the prompt.

    Raises:
        InputError: there is no prompt, no answer or no unit, or the model has too few positions.
    """
    if not 0 < prompt_length < len(ids):
        came = f"{prompt_length} and {len(ids) - prompt_length}"
        raise InputError(f"prompt and target must have at least one token each, got {came}")
    if not units:
        raise InputError("the input has no feature; expected at least one")
    check_length(len(ids) - 1, language_positions(explainer.model))
    check_ids(explainer.model, explainer.tokenizer, ids[:prompt_length].tolist(), "prompt")
    check_ids(explainer.model, explainer.tokenizer, ids[prompt_length:].tolist(), "target")
    texts = explainer.tokenizer.convert_ids_to_tokens(ids.tolist())
    return CausalObjective(
        prompt=explainer.tokenizer.decode(ids[:prompt_length]),
        target=explainer.tokenizer.decode(ids[prompt_length:]),
        ids=ids.to(input_device(explainer.model)),
        prompt_length=prompt_length,
        units=tuple(units),
        target_tokens=tuple(texts[prompt_length:]),
    )


def unit_factors(explainer: Explainer, question: CausalObjective) -> Tensor:
    """(n_units, n + m - 1) factors on the CPU, one row per unit; similar tokens as the explainer's threshold says."""
    return explainer.factors_of(question)


def run_rows(
    explainer: Explainer, questions: Sequence[CausalObjective], factors: Sequence[Tensor], recompute: int | None = None
) -> Outcome:
    """Log-probs of the answers under any rows of factors (n_rows, n + m - 1), one tensor of rows per question.

    Args:
        recompute: see `Explainer.explain`.
    """
    with evaluating(explainer.model):
        return explainer.runner.run(questions, factors, recompute=recompute)


def suppressing(explainer: Explainer, factors: Tensor) -> AbstractContextManager[None]:
    """Suppresses every forward of the explainer's model in the context: factors (1, L), its mode, its layers."""
    how = explainer.runner.perturbation
    return suppress(explainer.model, factors, mode=how.mode, layers=how.layers)
