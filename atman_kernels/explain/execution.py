"""How the variants of some questions get their log-probabilities: packed where that was shown to be exact.

`run_packed` is the way; `run_full_rows` recomputes every variant as a whole row where packing does not reproduce
the model. Both survive running out of memory: what is finished stays, the rest goes on with smaller packs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.explain.question import Question
from atman_kernels.hf.forward import Base, full_row_logprobs, grow, packed_logprobs
from atman_kernels.hf.memory import free_bytes, is_out_of_memory
from atman_kernels.hf.sequence import Sequence, concatenated
from atman_kernels.pack import VariantPack
from atman_kernels.planning.packing import Variant, VariantQueue, lay_out, pack_factors, padding
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


def run_stage(
    model: PreTrainedModel,
    questions: list[Question],
    base: Base,
    factors: list[Tensor],
    stage: Stage,
    perturbation: Perturbation,
    budget: int,
    work: Work,
) -> Iterator[tuple[Variant, Tensor]]:
    """As `run_packed`, for the variants of a stage and of all that stand on its trunks."""
    yield from run_packed(model, questions, base, factors, stage.variants, perturbation, budget, work)
    capacity = max(1, free_bytes(model.device) // FREE_SHARE // base.bytes_per_key)
    for trunks in chunks(stage.trunks, capacity):
        grown = base.emptied([t.stretch.length for t in trunks])
        stretches = [t.stretch for t in trunks]
        grow_packed(model, questions, base, factors, stretches, grown, perturbation, budget, work)
        yield from run_stage(model, questions, grown, factors, standing_on(trunks), perturbation, budget, work)


def grow_packed(
    model: PreTrainedModel,
    questions: list[Question],
    base: Base,
    factors: list[Tensor],
    stretches: list[Variant],
    grown: Base,
    perturbation: Perturbation,
    budget: int,
    work: Work,
) -> None:
    """Runs stretches of variants; the K/V of number i go to where base number i begins in `grown`."""
    place = {id(stretch): start for stretch, start in zip(stretches, grown.starts, strict=True)}
    queue = VariantQueue(stretches, budget)
    for taken in queue:
        packed = _packed(taken, questions, base, factors, model.device)
        try:
            grow(
                model,
                base,
                packed.pack,
                packed.ids,
                packed.factors,
                grown,
                [place[id(stretch)] for stretch in taken],
                mode=perturbation.mode,
                layers=perturbation.layers,
            )
        except (RuntimeError, MemoryError) as error:
            shrink_or_raise(error, queue, taken)
            continue
        packed.count(work, queue, variants=0)


def run_packed(
    model: PreTrainedModel,
    questions: list[Question],
    base: Base,
    factors: list[Tensor],
    variants: list[Variant],
    perturbation: Perturbation,
    budget: int,
    work: Work,
) -> Iterator[tuple[Variant, Tensor]]:
    """Yields each variant with the log-probs of its question's last answer tokens, as many as its suffix predicts."""
    queue = VariantQueue(variants, budget)
    for taken in queue:
        packed = _packed(taken, questions, base, factors, model.device)
        scored = [_scored(questions[v.question], v) for v in taken]
        starts = packed.pack.suffix_starts.tolist()
        rows = torch.cat([s + start for (s, _), start in zip(scored, starts, strict=False)])
        try:
            logprobs = packed_logprobs(
                model,
                base,
                packed.pack,
                packed.ids,
                packed.factors,
                rows,
                torch.cat([targets for _, targets in scored]),
                mode=perturbation.mode,
                layers=perturbation.layers,
            )
        except (RuntimeError, MemoryError) as error:
            shrink_or_raise(error, queue, taken)
            continue
        packed.count(work, queue, variants=len(taken))
        pieces = logprobs.split([len(s) for s, _ in scored])
        yield from zip(taken, pieces, strict=True)


@dataclass(frozen=True, eq=False)
class _Packed:
    """One forward's worth of variants: the pack, its (T,) inputs, its (V, K) factors, and how much of it is padding."""

    pack: VariantPack
    ids: Sequence
    factors: Tensor
    padding: int

    def count(self, work: Work, queue: VariantQueue, variants: int) -> None:
        work.add(self.pack.num_rows, variants)
        work.advance(self.pack.num_rows - self.padding)
        work.token_budget = queue.token_budget


def _packed(
    taken: list[Variant], questions: list[Question], base: Base, factors: list[Tensor], device: torch.device
) -> _Packed:
    """Variants laid out, in an order in which kernels can share tiles: those of one base together, by prefix."""
    taken.sort(key=lambda v: (v.base_number, v.prefix))
    extra = padding(sum(v.suffix for v in taken))
    pack = lay_out(taken, base.starts, device, extra)
    ids = concatenated([questions[v.question].inputs[v.prefix : v.length] for v in taken], extra)
    return _Packed(pack, ids, pack_factors(taken, factors, pack.num_variants, pack.longest).to(device), extra)


def run_full_rows(
    model: PreTrainedModel,
    questions: list[Question],
    factors: list[Tensor],
    variants: list[Variant],
    perturbation: Perturbation,
    budget: int,
    work: Work,
) -> Iterator[tuple[Variant, Tensor]]:
    """As `run_packed`, with every variant a whole row of a batch of its question."""
    for index, question in enumerate(questions):
        own = [Variant(v.question, v.unit, 0, v.length) for v in variants if v.question == index]
        queue = VariantQueue(own, max(budget, len(question.inputs)))
        for taken in queue:
            rows = pack_factors(taken, factors, len(taken), len(question.inputs)).to(model.device)
            try:
                logprobs = full_row_logprobs(
                    model,
                    question.inputs,
                    rows,
                    question.rows,
                    question.targets,
                    mode=perturbation.mode,
                    layers=perturbation.layers,
                )
            except (RuntimeError, MemoryError) as error:
                shrink_or_raise(error, queue, taken)
                continue
            work.add(len(taken) * len(question.inputs), len(taken))
            work.advance(len(taken) * len(question.inputs))
            work.token_budget = queue.token_budget
            yield from zip(taken, logprobs, strict=True)


def _scored(question: Question, variant: Variant) -> tuple[Tensor, Tensor]:
    """Rows within the variant's suffix that predict an answer token, and those tokens."""
    reached = question.rows >= variant.prefix
    return question.rows[reached] - variant.prefix, question.targets[reached]


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
