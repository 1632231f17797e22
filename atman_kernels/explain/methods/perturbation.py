"""AtMan: every unit suppressed by itself."""

from collections.abc import Sequence
from typing import Any

from atman_kernels.explain.methods import MethodContext, MethodOutcome
from atman_kernels.inputs.text_generation import Question
from atman_kernels.progress import Listener, listener
from atman_kernels.run.packed import Work


def atman(context: MethodContext, questions: Sequence[Question]) -> MethodOutcome:
    """The rise of each target token's loss, in nats, with the attention to a unit turned down; see `Explainer`.

    Cost: for n tokens Σ(n − i + m) tokens through the layers, in packs.
    """
    factors = [context.factors(question) for question in questions]
    heard = listener() or Listener()
    heard.asked(questions)
    outcome = context.runner.run(questions, factors, found=heard.found)
    return MethodOutcome(
        scores=[own - perturbed for own, perturbed in zip(outcome.unperturbed, outcome.perturbed, strict=True)],
        logprobs=outcome.unperturbed,
        stats=cost(outcome.work),
        settings=suppression(context),
    )


def cost(work: Work) -> dict[str, Any]:
    """What a run cost, for `stats`."""
    return {
        "tokens_through_model": work.tokens,
        "forwards": work.forwards,
        "variants": work.variants,
        "token_budget": work.token_budget,
    }


def suppression(context: MethodContext) -> dict[str, Any]:
    """How units were suppressed, for `settings`; asked for after the run, which finds out the path."""
    return context.suppression | {"path": "packed" if context.runner.unpackable is None else "batched"}
