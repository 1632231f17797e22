"""AtMan: every unit suppressed by itself."""

from collections.abc import Sequence

from atman_kernels.explain.methods import MethodContext, MethodOutcome
from atman_kernels.inputs.objective import Objective
from atman_kernels.progress import Listener, listener


def atman(context: MethodContext, objectives: Sequence[Objective]) -> MethodOutcome:
    """The rise of each target token's loss, in nats, with the attention to a unit turned down; see `Explainer`.

    Cost: for n tokens Σ(n − i + m) tokens through the layers, in packs.
    """
    factors = [context.factors(objective) for objective in objectives]
    heard = listener() or Listener()
    heard.asked(objectives)
    outcome = context.runner.run(objectives, factors, found=heard.found)
    scores = [own - perturbed for own, perturbed in zip(outcome.unperturbed, outcome.perturbed, strict=True)]
    return MethodOutcome.of_run(context, outcome, scores)
