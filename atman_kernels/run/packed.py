"""How the variants of some questions get their log-probabilities: packed where that was shown to be exact.

`PackedRuns` is the way; `run_full_rows` recomputes every variant as a whole row where packing does not reproduce
the model. Both survive running out of memory: what is finished stays, the rest goes on with smaller packs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.hf.forward.base import Base
from atman_kernels.hf.forward.full_rows import full_row_logprobs
from atman_kernels.hf.forward.packed import grow, packed_logprobs
from atman_kernels.hf.models.memory import free_bytes, is_out_of_memory
from atman_kernels.hf.models.model_input import ModelInput, concatenated
from atman_kernels.inputs.text_generation import Question
from atman_kernels.pack import VariantPack
from atman_kernels.planning.packing import Variant, VariantQueue, lay_out, pack_factors, padding, whole_factors
from atman_kernels.planning.sharing import Stage, chunks, standing_on

FREE_SHARE = 4  # one part in so many of the free memory may hold the K/V of one stage's trunks


@dataclass(frozen=True)
class Perturbation:
    """What is done to the model: see `Explainer`."""

    mode: str
    layers: tuple[int, ...] | None


@dataclass
class Work:
    """What a run cost so far."""

    tokens: int = 0  # through the model's layers
    forwards: int = 0
    variants: int = 0
    token_budget: int = 0
    advance: Callable[[int], object] = field(default=lambda tokens: None, repr=False)

    def add(self, tokens: int, variants: int) -> None:
        self.tokens += tokens
        self.forwards += 1
        self.variants += variants


def unit_variants(
    questions: list[Question], first_suppressed: list[Tensor], suffix_start: Callable[[int], int] = int
) -> list[Variant]:
    """One variant per unit; its prefix ends where its suppression begins, or at the last place before where it may."""
    return [
        Variant(q, unit, suffix_start(prefix), len(question.inputs))
        for q, question in enumerate(questions)
        for unit, prefix in enumerate(first_suppressed[q].tolist())
        if prefix < len(question.inputs)  # else nothing is suppressed, and every score is 0
    ]


class PackedRuns:
    """Packed forwards over the suffixes of some questions' variants.

    Tokens whose keys are removed in every layer are read by nobody, so their rows are not run at all.

    Args:
        model: what runs.
        questions: what is asked.
        factors: per question, (n_units, L) on the CPU.
        perturbation: mode and layers.
        budget: tokens per forward; halved when memory runs out, without losing what is finished.
        work: counts what it cost.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        questions: list[Question],
        factors: list[Tensor],
        perturbation: Perturbation,
        budget: int,
        work: Work,
    ) -> None:
        self.model, self.questions, self.factors = model, questions, factors
        self.perturbation, self.budget, self.work = perturbation, budget, work
        self._unread = None
        if perturbation.mode == "log_additive" and perturbation.layers is None:
            self._unread = [_unread(q, rows) for q, rows in zip(questions, factors, strict=True)]

    def run(self, base: Base, variants: list[Variant]) -> Iterator[tuple[Variant, Tensor]]:
        """Yields variants with the log-probs of their questions' last answer tokens, as many as a suffix predicts."""
        queue = VariantQueue(variants, self.budget)
        for taken in queue:
            packed = self._packed(base, taken)
            targets = [_predicted(self.questions[v.question], v) for v in taken]
            ends = packed.pack.suffix_starts[1:].tolist()
            rows = [torch.arange(end - len(own), end, device="cpu") for own, end in zip(targets, ends, strict=False)]
            try:
                logprobs = packed_logprobs(
                    self.model,
                    base,
                    packed.pack,
                    packed.inputs,
                    torch.cat(packed.positions).to(self.model.device),
                    packed.factors,
                    torch.cat(rows).to(self.model.device),
                    torch.cat(targets),
                    mode=self.perturbation.mode,
                    layers=self.perturbation.layers,
                )
            except (RuntimeError, MemoryError) as error:
                shrink_or_raise(error, queue, taken)
                continue
            self._count(packed, queue, variants=len(taken))
            yield from zip(taken, logprobs.split([len(own) for own in targets]), strict=True)

    def thinned(self, base: Base, stage: Stage) -> Stage:
        """The stage without the rows that nobody reads.

        Where layers look at distances all rows stay: without some, the pack's positions are not the sequence's.
        """
        if self._unread is None or base.by_position:
            return stage
        return stage.map(lambda v: replace(v, removed=v.suffix - len(self._positions(v, thin=True))))

    def run_stage(self, base: Base, stage: Stage) -> Iterator[tuple[Variant, Tensor]]:
        """As `run`, for the variants of a stage and of all that stand on its trunks.

        The trunks of one level that are there at once have as many tokens as a pack, so that memory grows with the
        levels alone: with four times as many, 800 subsets of 20 sentences ran a tenth faster.
        """
        yield from self.run(base, stage.variants)
        capacity = max(1, min(self.budget, free_bytes(self.model.device) // FREE_SHARE // base.bytes_per_key))
        for trunks in chunks(stage.trunks, capacity):
            grown = base.emptied([t.stretch.length for t in trunks])
            self._grow(base, [t.stretch for t in trunks], grown)
            yield from self.run_stage(grown, standing_on(trunks))

    def _grow(self, base: Base, stretches: list[Variant], grown: Base) -> None:
        """Runs stretches of variants; the K/V of number i go to where base number i begins in `grown`."""
        places = {(v.question, v.unit): start for v, start in zip(stretches, grown.starts, strict=True)}
        queue = VariantQueue(stretches, self.budget)
        for taken in queue:
            packed = self._packed(base, taken)
            try:
                grow(
                    self.model,
                    base,
                    packed.pack,
                    packed.inputs,
                    packed.positions,
                    packed.factors,
                    grown,
                    [places[v.question, v.unit] for v in taken],
                    mode=self.perturbation.mode,
                    layers=self.perturbation.layers,
                )
            except (RuntimeError, MemoryError) as error:
                shrink_or_raise(error, queue, taken)
                continue
            self._count(packed, queue, variants=0)

    def _positions(self, variant: Variant, thin: bool) -> Tensor:
        """Where the rows of a variant that are run stand in its sequence; one at least."""
        every = torch.arange(variant.prefix, variant.length, device="cpu")
        if not thin or self._unread is None or variant.unit is None:
            return every
        read = every[~self._unread[variant.question][variant.unit, variant.prefix : variant.length]]
        return read if len(read) else every[:1]

    def _packed(self, base: Base, taken: list[Variant]) -> "_Packed":
        """Variants laid out, in an order in which kernels can share tiles: those of one base together, by prefix."""
        taken.sort(key=lambda v: (v.base_number, v.prefix))
        extra = padding(sum(v.suffix for v in taken))
        pack = lay_out(taken, base.starts, self.model.device, extra)
        positions = [self._positions(v, thin=v.removed > 0) for v in taken]
        factors = pack_factors(taken, positions, self.factors, pack.num_variants, pack.longest)
        suffixes = [
            self.questions[v.question].inputs[v.prefix : v.length]
            if v.removed == 0
            else self.questions[v.question].inputs[own]
            for v, own in zip(taken, positions, strict=True)
        ]
        positions += [torch.arange(extra, device="cpu")] if extra else []
        return _Packed(pack, concatenated(suffixes, extra), positions, factors.to(self.model.device), extra)

    def _count(self, packed: "_Packed", queue: VariantQueue, variants: int) -> None:
        self.work.add(packed.pack.num_rows, variants)
        self.work.advance(packed.pack.num_rows - packed.padding)
        self.work.token_budget = queue.token_budget


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


def _unread(question: Question, factors: Tensor) -> Tensor:
    """(n_units, L) bool: tokens that nothing attends to and that predict nothing."""
    unread = factors == 0
    unread[:, question.prompt_length - 1 :] = False
    return unread


def _predicted(question: Question, variant: Variant) -> Tensor:
    """The answer tokens that the variant's last rows predict."""
    return question.targets[max(0, variant.prefix - question.prompt_length + 1) :]


def run_full_rows(
    model: PreTrainedModel,
    questions: list[Question],
    factors: list[Tensor],
    variants: list[Variant],
    perturbation: Perturbation,
    budget: int,
    work: Work,
) -> Iterator[tuple[Variant, Tensor]]:
    """As `PackedRuns.run`, with every variant a whole row of a batch of its question."""
    for index, question in enumerate(questions):
        own = [Variant(v.question, v.unit, 0, question.cost) for v in variants if v.question == index]
        queue = VariantQueue(own, max(budget, question.cost))
        for taken in queue:
            rows = whole_factors(taken, factors, len(question.inputs)).to(model.device)
            try:
                logprobs = full_row_logprobs(
                    model,
                    question.whole,
                    rows,
                    question.rows,
                    question.targets,
                    mode=perturbation.mode,
                    layers=perturbation.layers,
                )
            except (RuntimeError, MemoryError) as error:
                shrink_or_raise(error, queue, taken)
                continue
            work.add(len(taken) * question.cost, len(taken))
            work.advance(len(taken) * len(question.inputs))
            work.token_budget = queue.token_budget
            yield from zip(taken, logprobs, strict=True)


def shrink_or_raise(error: BaseException, queue: VariantQueue, taken: list[Variant]) -> None:
    """Puts variants that ran out of memory back into the queue, with a smaller budget; raises anything else."""
    if not is_out_of_memory(error):
        raise error
    if not queue.put_back(taken):
        raise MemoryError(
            f"out of memory on a single variant of {taken[0].suffix} tokens; a shorter prompt, a smaller dtype or a "
            f"device with more memory is needed ({error})"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
