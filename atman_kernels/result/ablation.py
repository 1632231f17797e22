"""The result of an ablation: an answer's log-probabilities with sets of units suppressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atman_kernels.planning.units import Unit


@dataclass(frozen=True, eq=False)
class Ablation:
    """An answer's log-probabilities with sets of units suppressed, from `Explainer.ablate`.

    Attributes:
        prompt: the exact text that was tokenized.
        target: the text whose log-probability was measured.
        units: what the masks' columns stand for.
        masks: (n_variants, n_units) bool: True where a unit was suppressed.
        logprobs: (n_variants, n_target_tokens) float32 on the CPU, in nats.
        target_tokens: the text of each target token.
        base_logprobs: (n_target_tokens,) float32, with nothing suppressed.
        settings: how it was computed.
        stats: what it cost; `variants` counts what the model ran, equal masks once.

    Example:
        >>> every_pair = lambda units: torch.combinations(torch.arange(len(units)))     # doctest: +SKIP
        >>> masks = lambda units: torch.nn.functional.one_hot(every_pair(units)).sum(1).bool()  # doctest: +SKIP
        >>> found = explainer.ablate("Anna met Bert. Anna met", " Bert", masks=masks)   # doctest: +SKIP
        >>> found.rises.sum(1).argmax()  # the pair of tokens that the answer rests on  # doctest: +SKIP
    """

    prompt: str
    target: str
    units: tuple[Unit, ...]
    masks: Tensor
    logprobs: Tensor
    target_tokens: tuple[str, ...]
    base_logprobs: Tensor
    settings: dict[str, Any]
    stats: dict[str, Any]

    @property
    def rises(self) -> Tensor:
        """(n_variants, n_target_tokens): how much each token's loss rises, in nats; what `explain` calls a score."""
        return self.base_logprobs - self.logprobs

    def __repr__(self) -> str:
        variants, tokens = self.logprobs.shape
        return f"Ablation({variants} variants of {len(self.units)} units × {tokens} target tokens)"
