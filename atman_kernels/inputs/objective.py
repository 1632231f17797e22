"""`Objective`: what is asked of a model, whatever its task, ready to run.

A runner needs three things of an objective: the model's values as it is, the same under rows of factors, and, where
variants may share work, the one causal sequence that they are variants of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.attention.pooling import encoder_run
from atman_kernels.hf.attention.suppressed_runs import SuppressedRun
from atman_kernels.hf.models.ranks import ranks_of
from atman_kernels.planning.units import Unit
from atman_kernels.result.data import LOG_PROBABILITY

if TYPE_CHECKING:
    from atman_kernels.inputs.text_generation import CausalObjective


@dataclass(frozen=True, eq=False, kw_only=True)
class Objective:
    """One prompt with one answer, as a model of some task takes them.

    Attributes:
        prompt, target: the texts that are shown.
        units: what gets a score; their token indices are columns of a row of factors.
        target_tokens: (m,) texts to show, one per value.
        levels: of nested units, see `PromptTokens`; () otherwise.
        own_values: (m,) what the whole model says with its own attention, where that is known already.
        facts: what else a reader should know, for the explanation's settings: JSON types.
    """

    prompt: str
    target: str
    units: tuple[Unit, ...]
    target_tokens: tuple[str, ...]
    levels: tuple[str, ...] = ()
    own_values: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """Keys that factors speak of: columns of a row of factors."""
        raise NotImplementedError

    @property
    def cost(self) -> int:
        """Tokens of one full row through the model's layers."""
        raise NotImplementedError

    @property
    def value(self) -> str:
        """What the values are: "log-probability" | "logit" | "cosine"."""
        return LOG_PROBABILITY

    @property
    def sequence(self) -> CausalObjective | None:
        """The causal sequence whose suffixes can be packed; None where every variant is a full row."""
        return None

    @property
    def content(self) -> tuple[Any, ...]:
        """What processes that share a model must ask alike."""
        sequence = self.sequence
        read = None if sequence is None else (sequence.ids, sequence.prompt_length)
        return read, self.positions, self.units, self.target_tokens

    def part(self, model: PreTrainedModel) -> PreTrainedModel:
        """Whose activations fill the memory, and whose device the inputs are on."""
        return model

    def values_as_it_is(self, model: PreTrainedModel) -> Tensor:
        """(m,) what the model says with the attention that it came with."""
        raise NotImplementedError

    def values(
        self, model: PreTrainedModel, factors: Tensor | None, *, mode: str, layers: tuple[int, ...] | None
    ) -> Tensor:
        """(V, m) what it says under (V, positions) factors in our attention; (1, m) for None, which suppresses nothing.

        Raises:
            UnsupportedModelError: the attention to some of the keys was not reached.
        """
        raise NotImplementedError

    def embeddings(self, model: PreTrainedModel) -> Tensor | None:
        """(positions, width) input embeddings in float32 on the CPU; None where what is read has none."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class ForwardObjective(Objective):
    """A question that one forward of a model answers, with one number per target token.

    Attributes:
        suppressed: the part of the model whose attention is suppressed.
        keys: positions that factors speak of.
        row_cost: tokens of one row through the model's layers.
        forward: n -> (n, m), the model's answer to n equal rows: higher is better.
        run: (factor, mode=…, layers=…) -> the run that suppresses the part's attention, where the model has one of
            its own; None: see `encoder_run`.
        kind_of_value: see `Objective.value`.
        read_embeddings: what `embeddings` gives; a call, as it costs something.
    """

    suppressed: PreTrainedModel
    keys: int
    row_cost: int
    forward: Callable[[int], Tensor]
    run: Callable[..., SuppressedRun] | None = None
    kind_of_value: str = LOG_PROBABILITY
    read_embeddings: Callable[[], Tensor] | None = None

    @property
    def positions(self) -> int:
        return self.keys

    @property
    def cost(self) -> int:
        return self.row_cost

    @property
    def value(self) -> str:
        return self.kind_of_value

    def part(self, model: PreTrainedModel) -> PreTrainedModel:
        return self.suppressed

    def values_as_it_is(self, model: PreTrainedModel) -> Tensor:
        ranks = ranks_of(model)
        with torch.no_grad(), ranks.forward():
            values = self.forward(1)[0]
        return ranks.shared(values)

    def values(
        self, model: PreTrainedModel, factors: Tensor | None, *, mode: str, layers: tuple[int, ...] | None
    ) -> Tensor:
        make = partial(encoder_run, self.suppressed) if self.run is None else self.run
        run = make(factors, mode=mode, layers=layers)
        ranks = ranks_of(model)
        with run.installed(self.suppressed, self.suppressed), torch.no_grad(), ranks.forward():
            values = self.forward(1 if factors is None else len(factors))
        if not run.reached:
            raise UnsupportedModelError(
                f"{type(self.suppressed).__name__} cannot be explained: a forward of it never called the attention "
                "function"
            )
        return ranks.shared(values)

    def embeddings(self, model: PreTrainedModel) -> Tensor | None:
        return None if self.read_embeddings is None else self.read_embeddings()
