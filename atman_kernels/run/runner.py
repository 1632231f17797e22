"""`VariantRunner`: log-probabilities of answers under suppression, by the fastest way that was shown to be exact."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.forward.base import Base, PackingUnsupportedError, base_run, join_and_clear, own_logprobs
from atman_kernels.hf.forward.full_rows import full_row_logprobs
from atman_kernels.hf.models.memory import activation_bytes_per_token, free_bytes
from atman_kernels.hf.models.packability import why_lengths_do_not_mix, why_rows_do_not_mix
from atman_kernels.hf.models.parts import computing_dtype
from atman_kernels.hf.models.tasks import task_of
from atman_kernels.inputs.text_generation import Question
from atman_kernels.planning.factors import first_suppressed
from atman_kernels.planning.packing import Variant, token_budget
from atman_kernels.planning.sharing import Content, Stage, share
from atman_kernels.progress import Meter, Progress
from atman_kernels.run.packed import PackedRuns, Perturbation, Work, run_full_rows, unit_variants

# Root mean square difference of a target's log-probs between two exact ways to compute them. The floor covers what the
# order of additions does to a well-behaved model (SmolLM2's packed suffixes differ by up to 0.34 in bfloat16); beyond
# the ceiling the two ways do not compute the same thing.
NOISE_FLOOR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 6e-2, torch.bfloat16: 0.5}
NOISE_CEILING = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.25, torch.bfloat16: 1.0}
FORWARD_SHARE = 16  # a forward costs, however small it is, what one part in so many of a full pack costs
NOISE_MARGIN = 8.0  # packed against base, in units of the noise between the model's own attention and ours
# The same for one row alone and beside others, where the attention is ours on both sides: a healthy bfloat16 model
# (SmolLM2) differs by 0.05, dynamic int8 by 1.7.
BATCH_NOISE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Outcome:
    """Log-probabilities of the answers of some questions, on the CPU.

    Attributes:
        unperturbed: per question, (m,) with nothing suppressed.
        perturbed: per question, (n_variants, m), one row per row of factors.
        work: what it cost.
    """

    unperturbed: list[Tensor]
    perturbed: list[Tensor]
    work: Work


class VariantRunner:
    """Runs questions under many rows of factors on one model.

    Variants are packed once a probe showed, on this model and these prompts, that a packed suffix reproduces the
    model; otherwise full rows are recomputed in batches, and one warning says so. Questions whose images are still to
    be seen share nothing: their variants are always full rows.

    Args:
        model: a transformers causal language model, in eval mode.
        perturbation: mode and layers.
        token_budget: tokens per forward; None takes what memory allows. It is halved when memory runs out.
        progress: show a progress bar for what takes longer than a second; or who is told, see `Explainer`.
    """

    def __init__(
        self, model: PreTrainedModel, perturbation: Perturbation, token_budget: int | None, progress: Progress
    ) -> None:
        self.model = model
        self.perturbation = perturbation
        self.token_budget = token_budget
        self.progress = progress
        self.unpackable: str | None = None  # the reason, once it is known
        self._mixing = why_rows_do_not_mix(model)  # why rows must not share a forward, once it is known
        self._told = False
        self._tolerance: float | None = None
        self._dtype = computing_dtype(model)  # in which both were found

    def run(
        self,
        questions: Sequence[Question],
        factors: Sequence[Tensor],
        description: str = "explaining",
        found: Callable[[int, int, Tensor], object] = lambda question, row, difference: None,
    ) -> Outcome:
        """Every question under every row of its factors.

        Args:
            questions: what is asked.
            factors: per question, (n_variants, L) over the positions of its `inputs`, on the CPU.
            description: what the progress bar says.
            found: is told of every variant as soon as it is known: question, row, and (m,) the fall of the answer's
                log-probabilities.

        Raises:
            UnsupportedModelError: our attention does not reproduce the model's own, or is never called.
            MemoryError: a single variant does not fit.
        """
        if task_of(self.model) != "text-generation":
            name = type(self.model).__name__
            raise UnsupportedModelError(f"{name} is no language model, in which prompt and answer are one sequence")
        questions, factors = list(questions), list(factors)
        work = Work()
        dtype = computing_dtype(self.model)
        if dtype != self._dtype:  # autocast comes and goes
            self._dtype, self._tolerance, self.unpackable = dtype, None, None
        sees = any(question.pictured is not None for question in questions)
        base = None if sees else self._base(questions, work)
        suffix_start = int if base is None else _snap(base[0].suffix_starts())
        variants = unit_variants(questions, [first_suppressed(rows) for rows in factors], suffix_start)
        budget = self.token_budget or token_budget(
            free_bytes(self.model.device), activation_bytes_per_token(self.model), self.model.device.type
        )
        runs = PackedRuns(self.model, questions, factors, self.perturbation, budget, work)
        stage = Stage([]) if base is None else runs.thinned(base[0], self._stage(runs, base[0], variants))
        total = sum(v.length for v in variants) if base is None else stage.tokens
        finished: Iterable[tuple[Variant, Tensor]]
        with Meter(self.progress, total, description) as meter:
            if base is not None:
                unperturbed = self._probe(runs, *base)
            if base is None or unperturbed is None:
                unperturbed, finished = self._full_rows(questions, factors, variants, budget, work, meter)
            else:
                work.advance = meter.advance
                finished = runs.run_stage(base[0], stage)
            # a variant that suppresses nothing, and tokens before its suffix, are as they were
            perturbed = [own.repeat(len(rows), 1) for own, rows in zip(unperturbed, factors, strict=True)]
            for variant, logprobs in finished:
                assert variant.unit is not None  # riders are among themselves
                row = perturbed[variant.question][variant.unit]
                row[-len(logprobs) :] = logprobs.cpu()
                found(variant.question, variant.unit, unperturbed[variant.question] - row)
        return Outcome(unperturbed, perturbed, work)

    def _stage(self, runs: PackedRuns, base: Base, variants: list[Variant]) -> Stage:
        """The variants, and what several of them have in common."""
        if base.patterns:
            return Stage(variants)  # what a row sees depends on the rows after it
        contents = [
            Content(None if question.embedded is not None else question.ids, rows, question.prompt_length - 1)
            for question, rows in zip(runs.questions, runs.factors, strict=True)
        ]
        return share(variants, contents, runs.budget // FORWARD_SHARE)

    def _base(self, questions: list[Question], work: Work) -> tuple[Base, list[Tensor]] | None:
        """The unperturbed runs, (K/V, log-probs); None if this model is known not to pack."""
        mixed = why_lengths_do_not_mix(self.model, [len(question.inputs) for question in questions])
        if self.unpackable is not None:
            return None
        if self._mixing is not None:
            self.unpackable = self._mixing  # told once, by `_full_rows`
            return None
        if mixed is not None:
            self._fall_back(mixed)
            return None
        bases, logprobs = [], []
        for question in questions:
            try:
                base, own = base_run(self.model, question.inputs, question.rows, question.targets)
            except PackingUnsupportedError as error:
                self._fall_back(str(error))
                return None
            work.add(len(question.inputs), 1)
            self._check_attention(question, own, work)
            bases.append(base)
            logprobs.append(own)
            del base  # the list alone holds it, so that joining frees what it has copied
        try:
            return join_and_clear(bases), logprobs
        except PackingUnsupportedError as error:
            self._fall_back(str(error))
            return None

    def _check_attention(self, question: Question, ours: Tensor, work: Work) -> None:
        """The model with our attention is the model with its own; once per explainer where that has to be computed."""
        own = question.own_logprobs
        if own is None and self._tolerance is not None:
            return
        if own is None:
            own = own_logprobs(self.model, question.inputs, question.rows, question.targets)
        work.add(len(question.inputs), 1)
        name, dtype = type(self.model).__name__, computing_dtype(self.model)
        if not bool(own.isfinite().all()):
            raise UnsupportedModelError(f"{name} gives the target no finite log-probability in {dtype}")
        noise = _rms(own - ours)
        ceiling = NOISE_CEILING.get(dtype, 1.0)
        if not noise <= ceiling:
            raise UnsupportedModelError(
                f"{name} cannot be explained: our attention does not reproduce its own (log-probs of the target differ "
                f"by {noise:.2g}, {ceiling:g} is the most that {dtype} explains)"
            )
        self._tolerance = NOISE_FLOOR.get(dtype, 1e-2) + NOISE_MARGIN * noise

    def _probe(self, runs: PackedRuns, base: Base, expected: list[Tensor]) -> list[Tensor] | None:
        """Unsuppressed variants, packed: their log-probs, or None if they are not those of the base runs.

        One begins in the middle of the prompt, to see that packing works on this model and prompt; one with the
        answer, which is what suppressed variants are then compared with: the same arithmetic on both sides.
        """
        suffix_start = _snap(base.suffix_starts())
        variants = [
            Variant(q, None, suffix_start(prefix), len(question.inputs))
            for q, question in enumerate(runs.questions)
            for prefix in (question.prompt_length // 2, question.prompt_length - 1)
        ]
        unperturbed: list[Tensor] = list(expected)
        try:
            finished = list(runs.run(base, variants))
        except PackingUnsupportedError as error:
            self._fall_back(str(error))
            return None
        assert self._tolerance is not None
        for variant, logprobs in finished:
            wrong = _rms(logprobs - expected[variant.question])
            if not wrong <= self._tolerance:
                self._fall_back(
                    f"a packed suffix gives log-probs that differ by {wrong:.2g} from the unpacked run's, where "
                    f"{self._tolerance:.2g} would be rounding"
                )
                return None
            if variant.prefix == suffix_start(runs.questions[variant.question].prompt_length - 1):
                unperturbed[variant.question] = logprobs.cpu()
        return unperturbed

    def _fall_back(self, reason: str) -> None:
        self.unpackable = reason
        warnings.warn(
            f"{type(self.model).__name__} cannot be packed ({reason}): full rows are recomputed in batches, which "
            "is exact but slower",
            stacklevel=2,
        )

    def _full_rows(
        self,
        questions: list[Question],
        factors: list[Tensor],
        variants: list[Variant],
        budget: int,
        work: Work,
        meter: Meter,
    ) -> tuple[list[Tensor], list[tuple[Variant, Tensor]]]:
        """Every variant as a whole row: (m,) log-probs per question with nothing suppressed, and those of the variants.

        An unsuppressed rider goes in the first batch of each question. It shows whether rows may share a forward, and
        is what suppressed ones are compared with. Where they may not, every row runs alone, from the beginning.
        """
        alone = self._full_row_baseline(questions, work)
        riders = [Variant(q, None, 0, len(question.inputs)) for q, question in enumerate(questions)]
        everything, unperturbed, finished = [*variants, *riders], list(alone), []
        meter.restart(sum(variant.length for variant in everything))
        work.advance = meter.advance
        if self._mixing is not None:
            self.tell_that_rows_mix()
            budget = 1  # a variant longer than the budget gets a forward of its own
        found = run_full_rows(self.model, questions, factors, everything, self.perturbation, budget, work)
        for variant, logprobs in found:
            if variant.unit is not None:
                finished.append((variant, logprobs))
            elif self._mixing is not None or not self.rows_mix(logprobs.cpu(), alone[variant.question]):
                unperturbed[variant.question] = logprobs.cpu()
            else:
                return self._full_rows(questions, factors, variants, budget, work, meter)
        return unperturbed, finished

    def _full_row_baseline(self, questions: list[Question], work: Work) -> list[Tensor]:
        """Unsuppressed log-probs of each question's row alone."""
        unperturbed = []
        for question in questions:
            logprobs = full_row_logprobs(
                self.model,
                question.whole,
                torch.ones(1, len(question.inputs), device=self.model.device, dtype=torch.float32),
                question.rows,
                question.targets,
                mode=self.perturbation.mode,
            )[0]
            work.add(question.cost, 1)
            self._check_attention(question, logprobs, work)
            unperturbed.append(logprobs.cpu())
        return unperturbed

    @property
    def runs_rows_alone(self) -> bool:
        """Whether it is known that rows must not share a forward."""
        return self._mixing is not None

    def rows_mix(self, beside: Tensor, alone: Tensor) -> bool:
        """Whether a row depends on the rows beside it, as where activations are quantised over all rows at once.

        Args:
            beside: what the model gives for an unsuppressed row in a batch with suppressed ones.
            alone: the same without them.
        """
        different = _rms(beside - alone)
        limit = BATCH_NOISE.get(computing_dtype(self.model), 1e-2)
        if different <= limit:
            return False
        self._mixing = (
            f"a row beside others differs by {different:.2g} from the same row alone, {limit:.2g} would be rounding"
        )
        return True

    def tell_that_rows_mix(self) -> None:
        """Warns, once, that rows run one by one."""
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"{type(self.model).__name__} cannot run rows in batches ({self._mixing}): they run one by one, which is "
            "exact but much slower",
            stacklevel=2,
        )


def _snap(starts: Tensor | None) -> Callable[[int], int]:
    """Moves the start of a suffix back to where a suffix may begin; see `Base.suffix_starts`."""
    allowed = None if starts is None else starts.tolist()
    return lambda position: position if allowed is None else allowed[position]


def _rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())
