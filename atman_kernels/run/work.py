"""Work that is done in pieces: what it cost, and what happens when a piece does not fit into memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from atman_kernels.hf.models.memory import is_out_of_memory
from atman_kernels.hf.models.ranks import ALONE, Ranks
from atman_kernels.planning.packing import Variant, VariantQueue
from atman_kernels.progress import Listener, listener

Result = TypeVar("Result")


@dataclass
class Work:
    """What a run cost so far."""

    tokens: int = 0  # through the model's layers
    forwards: int = 0
    variants: int = 0
    token_budget: int = 0
    advance: Callable[[int], object] = field(default=lambda tokens: None, repr=False)  # shows progress, in tokens
    ranks: Ranks = field(default=ALONE, repr=False)  # which do the work together

    def add(self, tokens: int, variants: int) -> None:
        """Counts one forward over so many tokens."""
        self.tokens += tokens
        self.forwards += 1
        self.variants += variants

    @property
    def stats(self) -> dict[str, Any]:
        """As explanations give it."""
        return {
            "tokens_through_model": self.tokens,
            "forwards": self.forwards,
            "variants": self.variants,
            "token_budget": self.token_budget,
        }


def in_pieces(
    variants: list[Variant], budget: int, work: Work, run: Callable[[list[Variant]], Result]
) -> Iterator[tuple[list[Variant], Result]]:
    """Runs variants in pieces of at most `budget` tokens, and yields each piece with its result.

    When memory runs out the budget is halved, and only the piece that failed is repeated, in smaller ones; where a
    model is shared with other processes this ends all of them, see `Ranks.forward`.

    Args:
        variants: what runs.
        budget: tokens per piece; a variant that is longer makes a piece by itself.
        work: is told the budget that lasted.
        run: runs one piece, and counts what it cost.

    Raises:
        MemoryError: a single variant does not fit, or a piece on one of several ranks.
    """
    queue = VariantQueue(variants, budget)
    for taken in queue:
        work.ranks.agree("a forward", variants=[(v.objective, v.row, v.prefix, v.length) for v in taken])
        try:
            result = run(taken)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or work.ranks.gone is not None:
                raise
            if work.ranks.size > 1:
                raise work.ranks.out_of_memory(error) from error
            if not queue.put_back(taken):
                raise MemoryError(
                    f"out of memory on a single variant of {taken[0].suffix} tokens; a shorter prompt, a smaller dtype "
                    f"or a device with more memory is needed ({error})"
                ) from error
            (listener() or Listener()).retried()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        work.token_budget = queue.token_budget
        yield taken, result
