"""AtMan: every unit suppressed by itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from atman_kernels.errors import RankError
from atman_kernels.explain.methods import MethodContext, MethodOutcome
from atman_kernels.explain.methods.linear import linear
from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.progress import Listener, Meter, listener
from atman_kernels.run.search import Found, strongest


def atman(context: MethodContext, objectives: Sequence[Objective]) -> MethodOutcome:
    """The rise of each target token's loss, in nats, with the attention to a unit turned down; see `Explainer`.

    Cost: for n tokens Σ(n − i + m) tokens through the layers, in packs.
    """
    factors = [context.factors(objective) for objective in objectives]
    heard = listener() or Listener()
    exact: list[Tensor] | None = None
    settings: dict[str, Any] = {}
    if context.exact is None:
        outcome = context.runner.run(
            objectives, factors, found=heard.found, recompute=context.recompute, started=context.started
        )
    else:
        searched, settings = _search(context, objectives, factors, context.exact, heard)
        outcome, exact = searched.outcome, searched.exact
    scores = [own - perturbed for own, perturbed in zip(outcome.unperturbed, outcome.perturbed, strict=True)]
    found = MethodOutcome.of_run(context, outcome, scores)
    return replace(found, exact=exact, settings=found.settings | settings)


def _search(
    context: MethodContext, objectives: Sequence[Objective], factors: Sequence[Tensor], exact: int, heard: Listener
) -> tuple[Found, dict[str, Any]]:
    """The strongest units, and by which hints they were searched."""
    hints = Hints(context)
    found = strongest(
        context.runner, objectives, factors, exact, heard.found, heard.estimated, pairs=context.pairs, hints=hints
    )
    found.outcome.work.add(hints.tokens, 0)
    return found, {} if hints.source is None else {"hints": hints.source}


class Hints:
    """Effects to first order, by which a search sees units whose influence takes many steps; see `linear`.

    Attributes:
        source: what they are, or why there are none; None before they were asked for.
        tokens: that they put through the model, forwards: the layers' activations are made twice.
    """

    def __init__(self, context: MethodContext) -> None:
        self._context = context
        self.source: str | None = None
        self.tokens = 0

    def __call__(self, sequences: Sequence[CausalObjective]) -> list[Tensor] | None:
        if any(sequence.embedded is not None for sequence in sequences):
            self.source = "none: images are no tokens that could be differentiated"
            return None
        if self._context.runner.ranks.stage is not None:
            self.source = "none: the model's layers lie on several pipeline stages"
            return None
        found = []
        with Meter(self._context.runner.progress, sum(each.positions for each in sequences), "searching") as meter:
            for sequence in sequences:
                try:
                    outcome = linear(self._context, [sequence], whole_answer=True, checkpointing=True)
                except RankError:  # ends all processes that share the model
                    raise
                except RuntimeError as error:  # UnsupportedModelError; weights without a derivative; no memory
                    self.source = f"none: {str(error).partition(chr(10))[0]}"
                    return None
                self.tokens += 2 * sequence.positions
                found.append(outcome.scores[0][:, 0])
                meter.advance(sequence.positions)
        self.source = "effects to first order"
        return found
