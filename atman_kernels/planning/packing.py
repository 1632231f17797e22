"""Which variants go into one pack, and how many tokens a pack may have."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels.errors import InputError
from atman_kernels.pack import VariantPack


@dataclass(frozen=True)
class Variant:
    """One perturbation of one question's base run.

    Attributes:
        question: index of the question.
        unit: index of the suppressed unit; None for an unsuppressed variant.
        prefix: positions whose K/V it takes from the base run.
        length: number of positions of the question; the suffix is [prefix, length).
    """

    question: int
    unit: int | None
    prefix: int
    length: int

    @property
    def suffix(self) -> int:
        return self.length - self.prefix


class VariantQueue:
    """Variants waiting for a pack, longest suffix first, with a token budget that can shrink.

    Similar suffixes end up in one pack, whichever question they belong to. A variant longer than the budget gets
    a pack of its own.

    Example:
        >>> queue = VariantQueue([Variant(0, u, prefix=u, length=8) for u in range(8)], token_budget=15)
        >>> [[v.suffix for v in pack] for pack in queue]
        [[8, 7], [6, 5, 4], [3, 2, 1]]
    """

    def __init__(self, variants: Iterable[Variant], token_budget: int) -> None:
        self._waiting = deque(sorted(variants, key=lambda v: -v.suffix))
        self.token_budget = token_budget

    def __iter__(self) -> Iterator[list[Variant]]:
        while self._waiting:
            taken = [self._waiting.popleft()]
            tokens = taken[0].suffix
            while self._waiting and tokens + self._waiting[0].suffix <= self.token_budget:
                taken.append(self._waiting.popleft())
                tokens += taken[-1].suffix
            yield taken

    def put_back(self, variants: list[Variant]) -> bool:
        """Variants that ran out of memory come back and the budget is halved.

        Returns:
            False if there is nothing left to halve: the pack was a single variant.
        """
        self._waiting.extendleft(reversed(variants))
        self.token_budget = max(1, sum(v.suffix for v in variants) // 2)
        return len(variants) > 1


def lay_out(variants: list[Variant], base_starts: tuple[int, ...], device: torch.device) -> VariantPack:
    """The pack of some variants; `base_starts` says where each question's base begins.

    Example:
        >>> pack = lay_out([Variant(1, 0, prefix=2, length=5)], base_starts=(0, 9), device=torch.device("cpu"))
        >>> pack.row_position.tolist(), pack.base_starts.tolist()
        ([2, 3, 4], [9])
    """
    return VariantPack.build(
        [v.suffix for v in variants],
        [v.prefix for v in variants],
        [base_starts[v.question] for v in variants],
        device=device,
    )


def pack_factors(variants: list[Variant], factors: list[Tensor], width: int) -> Tensor:
    """Factor rows of some variants over absolute positions, (len(variants), width); 1 where nothing is said.

    Args:
        variants: the rows' variants.
        factors: per question, (n_units, length).
        width: columns of the result, at least the longest question's length.
    """
    rows = torch.ones(len(variants), width)
    for row, variant in zip(rows, variants, strict=True):
        if variant.unit is not None:
            own = factors[variant.question][variant.unit]
            row[: own.shape[0]] = own
    return rows


# Past these many tokens a pack's matrix products are as fast as they get, and on a CPU its activations leave
# the caches. Measured on SmolLM2-135M (benchmarks/results); a GPU wants enough rows to fill all of its SMs.
MOST_TOKENS = {"cpu": 1024, "cuda": 16384}


def token_budget(free_bytes: int, bytes_per_token: int, device_type: str) -> int:
    """How many tokens a pack may have: what half of the free memory holds, within what is useful.

    Args:
        free_bytes: memory that is free once the model and the base runs are in.
        bytes_per_token: activations of one token at their peak.
        device_type: "cpu", "cuda", …

    Raises:
        InputError: not even one token fits.
    """
    most = MOST_TOKENS.get(device_type, MOST_TOKENS["cpu"])
    budget = min(most, free_bytes // 2 // max(1, bytes_per_token))
    if budget < 1:
        raise InputError(f"token_budget: {free_bytes} free bytes do not hold one token of {bytes_per_token} bytes")
    return budget
