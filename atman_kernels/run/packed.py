"""Variants in packs: many suffixes in one forward, over K/V that they share."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ManyOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf.forward.base import Base
from atman_kernels.hf.forward.packed import grow, packed_logprobs
from atman_kernels.hf.models.model_input import ModelInput, concatenated
from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.pack import VariantPack
from atman_kernels.planning.packing import Variant, lay_out, pack_factors, padding
from atman_kernels.planning.sharing import PrefixTree, chunks, standing_on
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.run.work import Work, in_pieces

FREE_SHARE = 4  # one part in so many of the free memory may hold the K/V of a tree's shared prefixes


def variants_of(
    objectives: ManyOf[Objective], first_suppressed: ManyOf[Tensor], suffix_start: Callable[[int], int] = int
) -> list[Variant]:
    """One variant per row of factors; its prefix ends where its suppression begins, or at the last place before where
    it may."""
    return [
        Variant(number, row, suffix_start(prefix), objective.positions)
        for number, objective in enumerate(objectives)
        for row, prefix in enumerate(first_suppressed[number].tolist())
        if prefix < objective.positions  # else nothing is suppressed, and every score is 0
    ]


class PackedRuns:
    """Packed forwards over the suffixes of some objectives' variants.

    Tokens whose keys are removed in every layer are read by nobody, so their rows are not run at all.

    Args:
        model: what runs.
        objectives: what is asked.
        factors: per objective, (n_units, L) on the CPU.
        perturbation: mode and layers.
        budget: tokens per forward; halved when memory runs out, without losing what is finished.
        work: counts what it cost.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objectives: list[CausalObjective],
        factors: list[Tensor],
        perturbation: Perturbation,
        budget: int,
        work: Work,
    ) -> None:
        self.model, self.objectives, self.factors = model, objectives, factors
        self.perturbation, self.budget, self.work = perturbation, budget, work
        self._device = input_device(model)
        self._unread = None
        if perturbation.mode == "log_additive" and perturbation.layers is None:
            self._unread = [_unread(q, rows) for q, rows in zip(objectives, factors, strict=True)]

    def run(self, base: Base, variants: list[Variant]) -> Iterator[tuple[Variant, Tensor]]:
        """Yields variants with the log-probs of their objectives' last answer tokens, as many as a suffix predicts."""

        def forward(taken: list[Variant]) -> tuple[Tensor, ...]:
            packed = self._packed(base, taken)
            targets = [_predicted(self.objectives[v.objective], v) for v in taken]
            ends = packed.pack.suffix_starts[1:].tolist()
            rows = [torch.arange(end - len(own), end, device="cpu") for own, end in zip(targets, ends, strict=False)]
            logprobs = packed_logprobs(
                self.model,
                base,
                packed.pack,
                packed.inputs,
                torch.cat(packed.positions).to(self._device),
                packed.factors,
                torch.cat(rows).to(self._device),
                torch.cat(targets),
                mode=self.perturbation.mode,
                layers=self.perturbation.layers,
            )
            self._count(packed, variants=len(taken))
            found: tuple[Tensor, ...] = logprobs.split([len(own) for own in targets])
            return found

        for taken, logprobs in in_pieces(variants, self.budget, self.work, forward):
            yield from zip(taken, logprobs, strict=True)

    def thinned(self, base: Base, tree: PrefixTree) -> PrefixTree:
        """The tree without the rows that nobody reads.

        Where layers look at distances all rows stay: without some, the pack's positions are not the sequence's.
        """
        if self._unread is None or base.by_position:
            return tree
        return tree.map(lambda v: replace(v, removed=v.suffix - len(self._positions(v, thin=True))))

    def run_tree(self, base: Base, tree: PrefixTree) -> Iterator[tuple[Variant, Tensor]]:
        """As `run`, for the variants of a tree and of all that stand on its prefixes.

        The prefixes of one level that are there at once have as many tokens as a pack, so that memory grows with the
        levels alone: with four times as many, 800 subsets of 20 sentences ran a tenth faster.
        """
        yield from self.run(base, tree.variants)
        if not tree.prefixes:
            return
        ranks = self.work.ranks
        kept = ranks.free_bytes(self.model) // FREE_SHARE // base.bytes_per_key
        capacity = ranks.least("the memory for shared prefixes", max(1, min(self.budget, kept)))
        for prefixes in chunks(tree.prefixes, capacity):
            grown = base.emptied([t.stretch.length for t in prefixes])
            self._grow(base, [t.stretch for t in prefixes], grown)
            yield from self.run_tree(grown, standing_on(prefixes))

    def _grow(self, base: Base, stretches: list[Variant], grown: Base) -> None:
        """Runs stretches of variants; the K/V of number i go to where base number i begins in `grown`."""
        places = {(v.objective, v.row): start for v, start in zip(stretches, grown.starts, strict=True)}

        def forward(taken: list[Variant]) -> None:
            packed = self._packed(base, taken)
            grow(
                self.model,
                base,
                packed.pack,
                packed.inputs,
                packed.positions,
                packed.factors,
                grown,
                [places[v.objective, v.row] for v in taken],
                mode=self.perturbation.mode,
                layers=self.perturbation.layers,
            )
            self._count(packed, variants=0)

        for _ in in_pieces(stretches, self.budget, self.work, forward):
            pass

    def _positions(self, variant: Variant, thin: bool) -> Tensor:
        """Where the rows of a variant that are run stand in its sequence; one at least."""
        every = torch.arange(variant.prefix, variant.length, device="cpu")
        if not thin or self._unread is None or variant.row is None:
            return every
        read = every[~self._unread[variant.objective][variant.row, variant.prefix : variant.length]]
        return read if len(read) else every[:1]

    def _packed(self, base: Base, taken: list[Variant]) -> "_Packed":
        """Variants laid out, in an order in which kernels can share tiles: those of one base together, by prefix."""
        taken.sort(key=lambda v: (v.base_number, v.prefix))
        extra = padding(sum(v.suffix for v in taken))
        pack = lay_out(taken, base.starts, self._device, extra)
        positions = [self._positions(v, thin=v.removed > 0) for v in taken]
        factors = pack_factors(taken, positions, self.factors, pack.num_variants, pack.longest)
        suffixes = [
            self.objectives[v.objective].inputs[v.prefix : v.length]
            if v.removed == 0
            else self.objectives[v.objective].inputs[own]
            for v, own in zip(taken, positions, strict=True)
        ]
        positions += [torch.arange(extra, device="cpu")] if extra else []
        return _Packed(pack, concatenated(suffixes, extra), positions, factors.to(self._device), extra)

    def _count(self, packed: "_Packed", variants: int) -> None:
        self.work.add(packed.pack.num_rows, variants)
        self.work.advance(packed.pack.num_rows - packed.padding)


@dataclass(frozen=True, eq=False)
class _Packed:
    """One forward's worth of variants.

    Attributes:
        pack: who sees whom.
        inputs: (T,) what the model reads.
        positions: per variant, where its rows stand in its sequence; the padding's last, where there is any.
        factors: (V, K) over the pack's positions.
        padding: rows at the end that mean nothing.
    """

    pack: VariantPack
    inputs: ModelInput
    positions: list[Tensor]
    factors: Tensor
    padding: int


def _unread(objective: CausalObjective, factors: Tensor) -> Tensor:
    """(n_units, L) bool: tokens that nothing attends to and that predict nothing."""
    unread = factors == 0
    unread[:, objective.prompt_length - 1 :] = False
    return unread


def _predicted(objective: CausalObjective, variant: Variant) -> Tensor:
    """The answer tokens that the variant's last rows predict."""
    return objective.targets[max(0, variant.prefix - objective.prompt_length + 1) :]
