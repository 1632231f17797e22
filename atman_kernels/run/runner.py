"""`Runner`: what a model says to some objectives under suppression, by the fastest way that was shown to be exact."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atman_kernels.errors import UnsupportedModelError
from atman_kernels.hf.forward.base import Base, PackingUnsupportedError, base_run, join_and_clear
from atman_kernels.hf.models.memory import activation_bytes_per_token
from atman_kernels.hf.models.packability import why_lengths_do_not_mix
from atman_kernels.hf.models.parts import computing_dtype
from atman_kernels.hf.models.placement import input_device
from atman_kernels.hf.models.quantised import rounding_dtype, why_rows_do_not_mix
from atman_kernels.hf.models.ranks import ranks_of
from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.planning.factors import first_suppressed
from atman_kernels.planning.packing import Variant, token_budget
from atman_kernels.planning.sharing import Content, PrefixTree, share
from atman_kernels.progress import Listener, Meter, Progress, listener
from atman_kernels.run.full_rows import run_full_rows
from atman_kernels.run.packed import PackedRuns, variants_of
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.run.work import Work

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


Path = Literal["packed", "batched"]


@dataclass(frozen=True)
class Outcome:
    """Values of some objectives, such as the log-probabilities of their answers, on the CPU.

    Attributes:
        unperturbed: per objective, (m,) with nothing suppressed.
        perturbed: per objective, (n_rows, m), one row per row of factors.
        work: what it cost.
        path: how the variants ran, "packed" or "batched" as full rows.
    """

    unperturbed: list[Tensor]
    perturbed: list[Tensor]
    work: Work
    path: Path


class Runner:
    """Runs objectives under many rows of factors on one model.

    Variants are packed once a probe showed, on this model and these prompts, that a packed suffix reproduces the
    model; otherwise full rows are recomputed in batches, and one warning says so. Objectives that are no causal
    sequence share nothing: their variants are always full rows.

    Args:
        model: a transformers model, in eval mode.
        perturbation: what a suppression is.
        token_budget: tokens per forward; None takes what memory allows. It is halved when memory runs out.
        progress: show a progress bar for what takes longer than a second, of several ranks on the first; or who is
            told, see `Explainer`.
    """

    def __init__(
        self, model: PreTrainedModel, perturbation: Perturbation, token_budget: int | None, progress: Progress
    ) -> None:
        self.model = model
        self.perturbation = perturbation
        self.token_budget = token_budget
        self.ranks = ranks_of(model)
        self.progress = progress if callable(progress) else progress and self.ranks.own == 0  # they share a terminal
        self.unpackable: str | None = None  # the reason, once it is known
        self._mixing = why_rows_do_not_mix(model)  # why rows must not share a forward, once it is known
        self._told = False
        self._tolerance: float | None = None
        self._dtype = computing_dtype(model)  # in which both were found

    def run(
        self,
        objectives: Sequence[Objective],
        factors: Sequence[Tensor],
        description: str = "explaining",
        found: Callable[[int, int, Tensor], object] = lambda objective, row, difference: None,
        *,
        recompute: int | None = None,
        started: "Started | None" = None,
    ) -> Outcome:
        """Every objective under every row of its factors.

        Args:
            objectives: what is asked.
            factors: per objective, (n_rows, positions), on the CPU.
            description: what the progress bar says.
            found: is told of every variant as soon as it is known: objective, row, and (m,) the fall of the values.
            recompute: how many of the last prompt tokens feel the suppression, beside the answer: what comes before
                keeps the K/V of the unperturbed run. None: all that a suppression can change.
            started: what `start` returned for these objectives, to go on from.

        Raises:
            UnsupportedModelError: our attention does not reproduce the model's own, or is never called; with
                `recompute`, variants are full rows, which share no K/V.
            MemoryError: a single variant does not fit.
        """
        factors = list(factors)
        self.ranks.agree("what is suppressed", factors=factors, recompute=recompute, begun=started is not None)
        started = self.start(objectives) if started is None else started
        objectives, work = started.objectives, started.work
        packable = started.packable if recompute is None else self.packable(started)
        finished: Iterable[tuple[Variant, Tensor]]
        if packable is None:
            total = _full_row_tokens(objectives, factors)
        else:
            total, finished = self._packed(packable, factors, recompute, work)
        with Meter(self.progress, total, description) as meter:
            work.advance = meter.advance
            if packable is None:
                path: Path = "batched"
                unperturbed, finished = self._full_rows(objectives, factors, self._budget(objectives), work, meter)
            else:
                path, unperturbed = "packed", packable.unperturbed
            # a variant that suppresses nothing, and tokens before its suffix, are as they were
            perturbed = [own.repeat(len(rows), 1) for own, rows in zip(unperturbed, factors, strict=True)]
            for variant, values in finished:
                assert variant.row is not None  # riders are among themselves
                row = perturbed[variant.objective][variant.row]
                row[-len(values) :] = values.cpu()
                found(variant.objective, variant.row, unperturbed[variant.objective] - row)
        work.advance = lambda tokens: None
        return Outcome(unperturbed, perturbed, work, path)

    def packable(self, started: "Started") -> "Packable":
        """What packs go on from.

        Raises:
            UnsupportedModelError: variants are full rows, which share no keys and values that could be kept.
        """
        if started.packable is None:
            reason = self.unpackable or "its variants are full rows"
            raise UnsupportedModelError(
                f"recompute: {type(self.model).__name__} shares no keys and values between variants ({reason}), so "
                "there is nothing to keep; leave recompute and exact out"
            )
        return started.packable

    def start(self, objectives: Sequence[Objective]) -> "Started":
        """The base runs, and the probe whether packs reproduce them."""
        started, clock = Started(list(objectives), Work(ranks=self.ranks)), time.perf_counter()
        questions = [objective.content for objective in started.objectives] if self.ranks.size > 1 else []
        self.ranks.agree("the questions", questions=questions, quantisation=self._mixing)
        self._forget_other_dtypes()
        sequences = [each for objective in objectives if (each := objective.sequence) is not None]
        if len(sequences) < len(started.objectives):
            return started
        found = self._base(sequences, started.work)
        if found is None:
            return started
        base, own = found
        no_rows = [torch.ones(0, each.positions, dtype=torch.float32, device="cpu") for each in sequences]
        unperturbed = self._probe(self._runs(sequences, no_rows, started.work), base, own)
        if unperturbed is None:
            return started
        _tell_time(started.work.tokens, clock)
        return replace(started, packable=Packable(sequences, base, unperturbed))

    def _forget_other_dtypes(self) -> None:
        """Autocast comes and goes: what was found out about the model is about one dtype."""
        dtype = computing_dtype(self.model)
        if dtype != self._dtype:
            self._dtype, self._tolerance, self.unpackable = dtype, None, None

    def _budget(self, objectives: Sequence[Objective]) -> int:
        """Tokens per forward, of the memory that base runs leave."""
        if self.token_budget is not None:
            return self.ranks.least("token_budget", self.token_budget)
        part = objectives[0].part(self.model)
        free = self.ranks.free_bytes(part)
        return token_budget(free, activation_bytes_per_token(part), input_device(part).type)

    # Packs ----------------------------------------------------------------------------------------------------

    def _runs(self, sequences: list[CausalObjective], factors: list[Tensor], work: Work) -> PackedRuns:
        return PackedRuns(self.model, sequences, factors, self.perturbation, self._budget(sequences), work)

    def _packed(
        self, packable: "Packable", factors: list[Tensor], recompute: int | None, work: Work
    ) -> tuple[int, Iterator[tuple[Variant, Tensor]]]:
        """How many tokens will run, and every variant with its values, which run as they are asked for."""
        sequences, base = packable.sequences, packable.base
        runs = self._runs(sequences, factors, work)
        firsts = [first_suppressed(rows) for rows in factors]
        if recompute is not None:
            firsts = [
                torch.where(own < sequence.positions, own.clamp_min(max(0, sequence.prompt_length - recompute)), own)
                for own, sequence in zip(firsts, sequences, strict=True)
            ]
        variants = variants_of(sequences, firsts, _snap(base.suffix_starts()))
        # where K/V of suppressed tokens are the unperturbed ones, variants that agree from there on are still different
        tree = PrefixTree(variants) if recompute is not None else self._tree(runs, base, variants)
        tree = runs.thinned(base, tree)
        return tree.tokens, runs.run_tree(base, tree)

    def _tree(self, runs: PackedRuns, base: Base, variants: list[Variant]) -> PrefixTree:
        """The variants, and what several of them have in common."""
        if base.patterns:
            return PrefixTree(variants)  # what a row sees depends on the rows after it
        contents = [
            Content(None if objective.embedded is not None else objective.ids, rows, objective.prompt_length - 1)
            for objective, rows in zip(runs.objectives, runs.factors, strict=True)
        ]
        return share(variants, contents, runs.budget // FORWARD_SHARE)

    def _base(self, objectives: list[CausalObjective], work: Work) -> tuple[Base, list[Tensor]] | None:
        """The unperturbed runs, (K/V, log-probs); None if this model is known not to pack."""
        mixed = why_lengths_do_not_mix(self.model, [len(objective.inputs) for objective in objectives])
        if self.unpackable is not None:
            return None
        if self._mixing is not None:
            self.unpackable = self._mixing  # told once, by `_full_rows`
            return None
        if mixed is not None:
            self._fall_back(mixed)
            return None
        bases, logprobs = [], []
        for objective in objectives:
            try:
                base, own = base_run(self.model, objective.inputs, objective.rows, objective.targets)
            except PackingUnsupportedError as error:
                self._fall_back(str(error))
                return None
            work.add(len(objective.inputs), 1)
            self._check_attention(objective, own, work)
            bases.append(base)
            logprobs.append(own)
            del base  # the list alone holds it, so that joining frees what it has copied
        try:
            return join_and_clear(bases), logprobs
        except PackingUnsupportedError as error:
            self._fall_back(str(error))
            return None

    def _check_attention(self, objective: Objective, ours: Tensor, work: Work) -> None:
        """The model with our attention is the model with its own.

        Of causal sequences it is found out once per runner, unless the model's own values are there anyway.
        """
        own = objective.own_values
        if own is None and objective.sequence is not None and self._tolerance is not None:
            return
        if own is None:
            own = objective.values_as_it_is(self.model)
        work.add(objective.cost, 1)
        part = objective.part(self.model)
        name, dtype = type(part).__name__, rounding_dtype(part)
        if not bool(own.isfinite().all()):
            raise UnsupportedModelError(f"{name} gives the target no finite {objective.value} in {dtype}")
        noise = _rms(own - ours)
        ceiling = NOISE_CEILING.get(dtype, 1.0)
        if not noise <= ceiling:
            raise UnsupportedModelError(
                f"{name} cannot be explained: our attention does not reproduce its own (the target's "
                f"{objective.value} differs by {noise:.2g}, {ceiling:g} is the most that {dtype} explains)"
            )
        self._tolerance = NOISE_FLOOR.get(dtype, 1e-2) + NOISE_MARGIN * noise

    def _probe(self, runs: PackedRuns, base: Base, expected: list[Tensor]) -> list[Tensor] | None:
        """Unsuppressed variants, packed: their log-probs, or None if they are not those of the base runs.

        One begins in the middle of the prompt, to see that packing works on this model and prompt; one with the
        answer, which is what suppressed variants are then compared with: the same arithmetic on both sides.
        """
        suffix_start = _snap(base.suffix_starts())
        variants = [
            Variant(q, None, suffix_start(prefix), len(objective.inputs))
            for q, objective in enumerate(runs.objectives)
            for prefix in (objective.prompt_length // 2, objective.prompt_length - 1)
        ]
        unperturbed: list[Tensor] = list(expected)
        try:
            finished = list(runs.run(base, variants))
        except PackingUnsupportedError as error:
            self._fall_back(str(error))
            return None
        assert self._tolerance is not None
        for variant, logprobs in finished:
            wrong = _rms(logprobs - expected[variant.objective])
            if not wrong <= self._tolerance:
                self._fall_back(
                    f"a packed suffix gives log-probs that differ by {wrong:.2g} from the unpacked run's, where "
                    f"{self._tolerance:.2g} would be rounding"
                )
                return None
            if variant.prefix == suffix_start(runs.objectives[variant.objective].prompt_length - 1):
                unperturbed[variant.objective] = logprobs.cpu()
        return unperturbed

    def _fall_back(self, reason: str) -> None:
        self.unpackable = reason
        warnings.warn(
            f"{type(self.model).__name__} cannot be packed ({reason}): full rows are recomputed in batches, which "
            "is exact but slower",
            stacklevel=2,
        )

    # Full rows ------------------------------------------------------------------------------------------------

    def _full_rows(
        self,
        objectives: list[Objective],
        factors: list[Tensor],
        budget: int,
        work: Work,
        meter: Meter,
    ) -> tuple[list[Tensor], list[tuple[Variant, Tensor]]]:
        """Every variant as a full row: (m,) values per objective with nothing suppressed, and those of the variants.

        An unsuppressed rider goes in the first batch of each objective. It shows whether rows may share a forward, and
        is what suppressed ones are compared with. Where they may not, every row runs alone, from the beginning.
        """
        variants = variants_of(objectives, [first_suppressed(rows) for rows in factors])
        riders = [Variant(number, None, 0, objective.positions) for number, objective in enumerate(objectives)]
        everything = [*variants, *riders]
        meter.restart(_full_row_tokens(objectives, factors))
        alone = self._rows_alone(objectives, work)
        unperturbed, finished = list(alone), []
        if self._mixing is not None:
            self._tell_that_rows_mix()
            budget = 1  # a variant longer than the budget gets a forward of its own
        for variant, values in run_full_rows(
            self.model, objectives, factors, everything, self.perturbation, budget, work
        ):
            if variant.row is not None:
                finished.append((variant, values.cpu()))
            elif self._mixing is not None or not self._rows_mix(values.cpu(), alone[variant.objective]):
                unperturbed[variant.objective] = values.cpu()
            else:
                return self._full_rows(objectives, factors, budget, work, meter)
        return unperturbed, finished

    def _rows_alone(self, objectives: list[Objective], work: Work) -> list[Tensor]:
        """Unsuppressed values of each objective's row alone."""
        found, clock, before = [], time.perf_counter(), work.tokens
        for objective in objectives:
            how = self.perturbation
            values = objective.values(self.model, None, mode=how.mode, layers=how.layers)[0]
            work.add(objective.cost, 1)
            self._check_attention(objective, values, work)
            found.append(values.cpu())
        _tell_time(work.tokens - before, clock)
        return found

    def _rows_mix(self, beside: Tensor, alone: Tensor) -> bool:
        """Whether a row depends on the rows beside it, as where activations are quantised over all rows at once.

        Args:
            beside: what the model gives for an unsuppressed row in a batch with suppressed ones.
            alone: the same without them.
        """
        different = _rms(beside - alone)
        limit = BATCH_NOISE.get(rounding_dtype(self.model), 1e-2)
        if different <= limit:
            return False
        self._mixing = (
            f"a row beside others differs by {different:.2g} from the same row alone, {limit:.2g} would be rounding"
        )
        return True

    def _tell_that_rows_mix(self) -> None:
        """Warns, once, that rows run one by one."""
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"{type(self.model).__name__} cannot run rows in batches ({self._mixing}): they run one by one, which is "
            "exact but much slower",
            stacklevel=2,
        )


@dataclass(frozen=True, eq=False)
class Packable:
    """What packs go on from, where they were shown to reproduce the model.

    Attributes:
        sequences: the objectives.
        base: their K/V with nothing suppressed.
        unperturbed: per objective, (m,) its values by a packed suffix with nothing suppressed.
    """

    sequences: list[CausalObjective]
    base: Base
    unperturbed: list[Tensor]


@dataclass(frozen=True, eq=False)
class Started:
    """Objectives whose base runs are there.

    Attributes:
        objectives: what is asked.
        work: what it cost so far; runs that go on from here add to it.
        packable: None where variants are full rows.
    """

    objectives: list[Objective]
    work: Work
    packable: Packable | None = None


def _tell_time(tokens: int, clock: float) -> None:
    (listener() or Listener()).timed(tokens, time.perf_counter() - clock)


def _full_row_tokens(objectives: list[Objective], factors: list[Tensor]) -> int:
    """Tokens of all variants as full rows, with an unsuppressed one for each objective."""
    rows = [int((first_suppressed(each) < each.shape[1]).sum()) + 1 for each in factors]
    return sum(count * objective.cost for count, objective in zip(rows, objectives, strict=True))


def _snap(starts: Tensor | None) -> Callable[[int], int]:
    """Moves the start of a suffix back to where a suffix may begin; see `Base.suffix_starts`."""
    allowed = None if starts is None else starts.tolist()
    return lambda position: position if allowed is None else allowed[position]


def _rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())
