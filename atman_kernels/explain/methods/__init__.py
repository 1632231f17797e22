"""The ways to get an `Explanation`, by name: AtMan, and what else the field uses.

A method is one function in a module of this package, imported when it is asked for; its keyword-only arguments are
its options. There are two kinds, and a table for each:

- `(context, questions, **options) -> MethodOutcome`: sees all questions at once and scores their units.
- `(model, question, **options) -> TokenScores`: scores single tokens; a unit gets the sum over its tokens.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.arguments import flag, integer, real
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.explain.head_weights import HeadWeights, checked_weights
from atman_kernels.hf.models.parts import decoder_of
from atman_kernels.hf.models.ranks import ranks_of
from atman_kernels.inputs.objective import Objective
from atman_kernels.progress import Listener, listener
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.run.runner import Outcome, Runner, Started

# name -> module, and what a score is; None for AtMan's own, which `Explanation` knows
OF_UNITS: dict[str, tuple[str, str | None]] = {
    "atman": ("perturbation", None),
    "linear": ("linear", "loss rise to first order, in nats"),
    "shapley": ("shapley", "Shapley value of the log-probability, in nats"),
    "lasso": ("lasso", "weight in a sparse linear model of the answer's log-odds, in nats"),
    "random": ("chance", "random number"),
}
OF_TOKENS: dict[str, tuple[str, str | None]] = {
    "raw_attention": ("attention", "share of one layer's attention"),
    "rollout": ("attention", "share of the attention, followed through the layers"),
    "chefer": ("attention", "attention weighted by its gradient, followed through the layers"),
    "gradcam": ("attention", "the last layer's attention, its heads weighted by their gradient"),
    "at2": ("attention", "attention of all heads, weighted as was learned from ablations (AT2)"),
    "input_x_gradient": ("gradients", "embedding times gradient of the log-probability, in nats"),
    "integrated_gradients": ("gradients", "part of the log-probability's distance from the baseline, in nats"),
    "attnlrp": ("attnlrp", "relevance for the logit (AttnLRP)"),
}
MOST_DRAWS = 1_000_000  # more would not end
MOST_STEPS = 10_000  # whose places take a matrix of steps × steps to find
_ORDERS = "an even integer from 4 to 1,000,000 (drawn in pairs of opposite order; a standard error takes two pairs)"
# options, by their names in all methods that have them: what a value must be, and how it is plain
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "seed": lambda x: integer(x, "seed", least=0, most=(1 << 63) - 1, expected="an integer from 0 to 2^63 − 1"),
    "permutations": lambda x: _even(integer(x, "permutations", least=4, most=MOST_DRAWS, expected=_ORDERS)),
    "samples": lambda x: integer(x, "samples", least=2, most=MOST_DRAWS),
    "alpha": lambda x: real(x, "alpha", "a finite number > 0", lambda alpha: 0 < alpha < math.inf),
    "keep": lambda x: real(x, "keep", "a number between 0 and 1", lambda keep: 0 < keep < 1),
    "steps": lambda x: integer(x, "steps", least=1, most=MOST_STEPS),
    "batch": lambda x: integer(x, "batch", least=1, most=MOST_STEPS),
    "baseline": lambda x: None if x is None else integer(x, "baseline", least=0, expected="None or a token id"),
    "layer": lambda x: integer(x, "layer"),
    "whole_answer": lambda x: flag(x, "whole_answer"),
    "checkpointing": lambda x: flag(x, "checkpointing"),
    "weights": checked_weights,
}
# these run variants, of which only the end may be recomputed
WITH_RECOMPUTE = ("atman", "shapley", "lasso")
WITH_FILES = ("at2",)  # these read files of this machine, which is not for everybody who may ask
# of models that are shared among processes: by tensor parallelism, which deals out heads; and in a pipeline
WITH_TENSOR_PARALLELISM = (
    "atman", "linear", "shapley", "lasso", "random", "input_x_gradient", "integrated_gradients", "attnlrp",
)  # fmt: skip
IN_A_PIPELINE = ("atman", "shapley", "lasso", "random")
WITH_IMAGES = ("atman", "shapley", "lasso", "random")  # the others read token ids, which images do not have


@dataclass(frozen=True, eq=False)
class MethodContext:
    """What a method may use of its explainer.

    Attributes:
        model: what is explained.
        runner: runs objectives under factors.
        recompute: see `Runner.run`.
        exact: how many units of each objective are to be exact, the others estimated; None: all.
        pairs: objectives of which the second is taken off the first: answers with an answer to compare with.
        started: what the runner knows of these objectives already; None: it has to find out.
    """

    model: PreTrainedModel
    runner: Runner
    recompute: int | None = None
    exact: int | None = None
    pairs: Sequence[tuple[int, int]] = ()
    started: Started | None = None

    @property
    def perturbation(self) -> Perturbation:
        """How units are suppressed."""
        return self.runner.perturbation

    @property
    def suppression(self) -> dict[str, Any]:
        """The same, defaults written out: JSON types, for records of what was measured."""
        return self.perturbation.settings

    def factors(self, objective: Objective) -> Tensor:
        """(n_units, positions) the factors that suppress each unit."""
        return self.perturbation.factors(self.model, objective)


@dataclass(frozen=True, eq=False)
class MethodOutcome:
    """What a method found.

    Attributes:
        scores: per question, (n_units, m); (n_units, 1) where there is but one score, for the whole answer.
        logprobs: per question, (m,) of the target tokens with the model as it is.
        stats: what it cost, JSON types.
        settings: what of the explainer's it went by, JSON types.
        exact: per objective, (n_units,) bool, where some units' scores are but estimates.
        draws: per objective, (n_draws, n_units) where the units' totals are means of random draws: those draws,
            independent of one another.

    Example:
        >>> MethodOutcome(scores=[torch.zeros(3, 2)], logprobs=[torch.zeros(2)], stats={"forwards": 1}).stats
        {'forwards': 1}
    """

    scores: list[Tensor]
    logprobs: list[Tensor]
    stats: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    draws: list[Tensor] | None = None
    exact: list[Tensor] | None = None

    @classmethod
    def of_run(
        cls, context: MethodContext, outcome: Outcome, scores: list[Tensor], draws: list[Tensor] | None = None
    ) -> "MethodOutcome":
        """Scores that were made of one run of variants."""
        settings = context.suppression | {"path": outcome.path}
        return cls(scores, outcome.unperturbed, outcome.work.stats, settings, draws)


class TokenScores(NamedTuple):
    """Scores of one question, token by token.

    Attributes:
        scores: (L, m), from each token that the model reads to each target token; or (L, 1), to the whole answer.
        logprobs: (m,) of the target tokens with the model as it is.
        stats: what else is worth knowing, JSON types.

    Example:
        >>> TokenScores(scores=torch.zeros(5, 2), logprobs=torch.zeros(2)).stats
        {}
    """

    scores: Tensor
    logprobs: Tensor
    stats: dict[str, Any] = {}  # noqa: RUF012  (never changed)


@dataclass(frozen=True)
class Method:
    """A method with its options, checked before any model runs."""

    name: str
    measure: str | None
    options: dict[str, Any]
    function: Callable[..., Any]

    def check(self, model: PreTrainedModel) -> None:
        """Raises InputError if an option does not fit the model, UnsupportedModelError if the method does not."""
        check_sharing(self.name, model)
        layer, layers = self.options.get("layer"), getattr(decoder_of(model).config, "num_hidden_layers", None)
        if layer is not None and layers is not None and not -layers <= layer < layers:
            raise InputError(f"layer must be an index into {layers} layers, got {layer}")
        baseline = self.options.get("baseline")
        if baseline is not None:
            vocabulary = int(model.get_input_embeddings().weight.shape[0])
            integer(baseline, "baseline", most=vocabulary - 1, expected=f"None or a token id below {vocabulary}")
        if self.options.get("weights") is not None:
            HeadWeights.load(self.options["weights"]).check(model)

    def run(self, context: MethodContext, objectives: Sequence[Objective]) -> MethodOutcome:
        """What the method finds for each objective."""
        (listener() or Listener()).asked(objectives)
        if self.name in OF_UNITS:
            return self.function(context, objectives, **self.options)  # type: ignore[no-any-return]
        found = [self.function(context.model, objective, **self.options) for objective in objectives]
        return MethodOutcome(
            scores=[unit_scores(objective, each.scores) for objective, each in zip(objectives, found, strict=True)],
            logprobs=[each.logprobs.cpu() for each in found],
            stats={name: [each.stats[name] for each in found] for name in found[0].stats},
        )


def names() -> tuple[str, ...]:
    """All methods' names, AtMan first.

    Example:
        >>> names()[0], "attnlrp" in names()
        ('atman', True)
    """
    return (*OF_UNITS, *OF_TOKENS)


def method(name: str, options: dict[str, Any]) -> Method:
    """The method of that name, with its options and the defaults of those not given.

    Raises:
        InputError: there is no such method, it has no such option, or an option is outside its range.

    Example:
        >>> method("random", {"seed": 64}).options
        {'seed': 64}
    """
    found = (OF_UNITS | OF_TOKENS).get(name) if isinstance(name, str) else None
    if found is None:
        raise InputError(f"method must be one of {', '.join(map(repr, names()))}, got {name!r}")
    module, measure = found
    function = getattr(import_module(f"{__name__}.{module}"), name)
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in defaults:
            raise InputError(f"method {name!r} has no option {option!r}; it has {', '.join(defaults) or 'none'}")
    return Method(name, measure, {option: OPTIONS[option](x) for option, x in (defaults | options).items()}, function)


def check_sharing(name: str, model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError if a method does not serve the way in which a model is shared among processes."""
    ranks = ranks_of(model)
    served = WITH_TENSOR_PARALLELISM if ranks.stage is None else IN_A_PIPELINE
    if ranks.size > 1 and name not in served:
        raise UnsupportedModelError(
            f"method {name!r} needs all heads and layers of {type(model).__name__} in one process, and it is shared "
            f"among {ranks.size}; there are {', '.join(served)}"
        )


def _even(number: int) -> int:
    if number % 2:
        raise InputError(f"permutations must be {_ORDERS}, got {number}")
    return number


def seeded(seed: int) -> torch.Generator:
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def unit_scores(objective: Objective, scores: Tensor) -> Tensor:
    """(L, m) of tokens -> (n_units, m) of units: the sum over each unit's tokens, in the scores' dtype, on the CPU."""
    scores = scores.detach().cpu()
    return torch.stack([scores[list(unit.token_indices)].sum(0) for unit in objective.units])
