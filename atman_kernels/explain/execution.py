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
from atman_kernels.hf.forward import Base, full_row_logprobs, packed_logprobs
from atman_kernels.hf.memory import is_out_of_memory
from atman_kernels.hf.sequence import concatenated
from atman_kernels.planning.packing import Variant, VariantQueue, lay_out, pack_factors, padding


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
        # variants of one question stand together, in the order of their prefixes, so that kernels can share tiles
        taken.sort(key=lambda v: (v.question, v.prefix))
        extra = padding(sum(v.suffix for v in taken))
        pack = lay_out(taken, base.starts, model.device, extra)
        suffixes = [questions[v.question].inputs[v.prefix :] for v in taken]
        ids = concatenated(suffixes, extra)
        scored = [_scored(questions[v.question], v) for v in taken]
        starts = pack.suffix_starts.tolist()
        rows = torch.cat([s + start for (s, _), start in zip(scored, starts, strict=False)])
        try:
            logprobs = packed_logprobs(
                model,
                base,
                pack,
                ids,
                pack_factors(taken, factors, pack.num_variants, pack.longest).to(model.device),
                rows,
                torch.cat([targets for _, targets in scored]),
                mode=perturbation.mode,
                layers=perturbation.layers,
            )
        except (RuntimeError, MemoryError) as error:
            shrink_or_raise(error, queue, taken)
            continue
        work.add(pack.num_rows, len(taken))
        work.advance(pack.num_rows - extra)
        work.token_budget = queue.token_budget
        pieces = logprobs.split([len(s) for s, _ in scored])
        yield from zip(taken, pieces, strict=True)


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
        own = [Variant(v.question, v.unit, 0, question.cost) for v in variants if v.question == index]
        queue = VariantQueue(own, max(budget, question.cost))
        for taken in queue:
            rows = pack_factors(taken, factors, len(taken), len(question.inputs)).to(model.device)
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
