"""AtMan: every unit suppressed by itself."""

from collections.abc import Sequence
from dataclasses import replace

from atman_kernels.explain.methods import MethodContext, MethodOutcome
from atman_kernels.inputs.objective import Objective
from atman_kernels.progress import Listener, listener
from atman_kernels.run.search import strongest


def atman(context: MethodContext, objectives: Sequence[Objective]) -> MethodOutcome:
    """The rise of each target token's loss, in nats, with the attention to a unit turned down; see `Explainer`.

    Cost: for n tokens Σ(n − i + m) tokens through the layers, in packs.
    """
    factors = [context.factors(objective) for objective in objectives]
    heard = listener() or Listener()
    heard.asked(objectives)
    exact = None
    if context.exact is None:
        outcome = context.runner.run(
            objectives, factors, found=heard.found, recompute=context.recompute, started=context.started
        )
    else:
        searched = strongest(
            context.runner, objectives, factors, context.exact, heard.found, heard.estimated, pairs=context.pairs
        )
        outcome, exact = searched.outcome, searched.exact
    scores = [own - perturbed for own, perturbed in zip(outcome.unperturbed, outcome.perturbed, strict=True)]
    return replace(MethodOutcome.of_run(context, outcome, scores), exact=exact)
