"""AtMan: every unit suppressed by itself."""

from collections.abc import Sequence

from atman_kernels.explain.methods import MethodContext, MethodOutcome
from atman_kernels.explain.question import Question


def atman(context: MethodContext, questions: Sequence[Question]) -> MethodOutcome:
    """The rise of each target token's loss, in nats, with the attention to a unit turned down; see `Explainer`.

    Cost: for n tokens Σ(n − i + m) tokens through the layers, in packs.
    """
    outcome = context.runner.run(questions, [context.factors(question) for question in questions])
    perturbation = context.runner.perturbation
    return MethodOutcome(
        scores=[own - perturbed for own, perturbed in zip(outcome.unperturbed, outcome.perturbed, strict=True)],
        logprobs=outcome.unperturbed,
        stats={
            "tokens_through_model": outcome.work.tokens,
            "forwards": outcome.work.forwards,
            "variants": outcome.work.variants,
            "token_budget": outcome.work.token_budget,
        },
        settings={
            "mode": perturbation.mode,
            "factor": context.factor,
            "similarity_threshold": context.similarity_threshold,
            "layers": None if perturbation.layers is None else list(perturbation.layers),
            "path": "packed" if context.runner.unpackable is None else "batched",
        },
    )
