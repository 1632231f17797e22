"""`Explainer`: which parts of a prompt made a model answer as it did."""

import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import atman_kernels
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.explain.execution import Perturbation, Work, run_full_rows, run_packed, unit_variants
from atman_kernels.explain.explanation import Explanation
from atman_kernels.explain.question import Prompt, Question, UnitChoice, ask
from atman_kernels.formula import MODES
from atman_kernels.hf.forward import Base, PackingUnsupportedError, base_run, full_row_logprobs, own_logprobs
from atman_kernels.hf.interface import decoder_of
from atman_kernels.hf.memory import activation_bytes_per_token, free_bytes
from atman_kernels.hf.suppression import checked_layers
from atman_kernels.planning.factors import factor_rows, first_suppressed
from atman_kernels.planning.packing import Variant, token_budget

# Root mean square difference of a target's log-probs between two exact ways to compute them. The floor covers what the
# order of additions does to a well-behaved model (SmolLM2's packed suffixes differ by up to 0.34 in bfloat16); beyond
# the ceiling the two ways do not compute the same thing.
NOISE_FLOOR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 6e-2, torch.bfloat16: 0.5}
NOISE_CEILING = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.25, torch.bfloat16: 1.0}
NOISE_MARGIN = 8.0  # packed against base, in units of the noise between the model's own attention and ours


class Explainer:
    """Explains answers of one model by suppressing the attention to parts of the prompt (AtMan).

    A unit's score for an answer token is the loss of that token with the unit suppressed in every layer, minus its
    loss without: positive means that the answer rests on the unit. Scores are exact; the work is shared.

    Args:
        model: a transformers causal language model; it is used as it is, in eval mode, and left as it was.
        tokenizer: its (fast) tokenizer.
        mode: "log_additive" | "multiplicative" | "shifted", see `atman_kernels.suppressed_attention`.
        factor: what is kept of the attention to a suppressed unit, >= 0. The paper's f is 1 - factor.
        similarity_threshold: also suppress tokens whose input embedding has at least this cosine with the unit's,
            in proportion; in (0, 1]. None: the unit alone.
        layers: attention layers to act on, by index; None for all.
        token_budget: tokens per forward; None takes what memory allows. It is halved when memory runs out.
        progress: show a progress bar for what takes longer than a second.

    Raises:
        InputError: an argument does not fit.
        UnsupportedModelError: the model's attention cannot be reached.

    Example:
        >>> explainer = Explainer(model, tokenizer)                                     # doctest: +SKIP
        >>> explainer.explain("The capital of France is", target=" Paris").top(1)       # doctest: +SKIP
        [(Unit(text=' France', start=14, end=21, ...), 5.73)]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mode: str = "log_additive",
        factor: float = 0.1,
        similarity_threshold: float | None = None,
        layers: Iterable[int] | None = None,
        token_budget: int | None = None,
        progress: bool = True,
    ) -> None:
        decoder_of(model)  # refuses what cannot be reached
        if mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if not (isinstance(factor, int | float) and 0 <= factor < float("inf")):
            raise InputError(f"factor must be a finite number >= 0, got {factor!r}")
        if similarity_threshold is not None and not 0 < similarity_threshold <= 1:
            raise InputError(f"similarity_threshold must be in (0, 1] or None, got {similarity_threshold!r}")
        if token_budget is not None and token_budget < 1:
            raise InputError(f"token_budget must be >= 1 or None, got {token_budget!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.factor = float(factor)
        self.similarity_threshold = similarity_threshold
        self.token_budget = token_budget
        self.progress = progress
        self._perturbation = Perturbation(mode, checked_layers(model, layers))
        self._tolerance: float | None = None
        self._unpackable: str | None = None  # the reason, once it is known

    def explain(
        self,
        prompt: Prompt,
        target: str | None = None,
        units: UnitChoice = "token",
        *,
        include_target: bool = False,
        chat: bool = False,
        max_new_tokens: int = 32,
        language: str = "en",
    ) -> Explanation:
        """Score every unit of a prompt for every token of an answer.

        Args:
            prompt: a text, or a list of chat messages (for which the tokenizer's chat template is used).
            target: the answer, tokenized apart from the prompt and appended to it (so it usually starts with a
                space); None lets the model answer first, greedily.
            units: "token" | "word" | "sentence" | "paragraph", or (start, end) character spans of the prompt,
                which may overlap and leave text out.
            include_target: earlier answer tokens become units too, and explain the later ones.
            chat: put a text prompt into the tokenizer's chat template as the user's message.
            max_new_tokens: length of the model's own answer at most.
            language: of the text, for sentence splitting.

        Returns:
            An `Explanation`; scores (n_units, n_target_tokens) are in nats.

        Raises:
            InputError: an argument does not fit.
            UnsupportedModelError: the model cannot be explained, with the reason.
        """
        return self.explain_batch(
            [prompt],
            [target],
            [units],
            include_target=include_target,
            chat=chat,
            max_new_tokens=max_new_tokens,
            language=language,
        )[0]

    def explain_batch(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[str | None] | None = None,
        units: str | Sequence[UnitChoice] = "token",
        *,
        include_target: bool = False,
        chat: bool = False,
        max_new_tokens: int = 32,
        language: str = "en",
    ) -> list[Explanation]:
        """Explain several prompts at once: their variants share forwards.

        Args:
            prompts: as in `explain`, one or more.
            targets: one per prompt; None, whole or in places, lets the model answer.
            units: one granularity for all prompts, or one choice per prompt.
            include_target, chat, max_new_tokens, language: as in `explain`.

        Returns:
            One `Explanation` per prompt. Their `stats` are those of the whole batch.

        Raises:
            InputError, UnsupportedModelError: as in `explain`.
        """
        if isinstance(prompts, str) or not prompts:
            raise InputError("prompts must be a list with at least one prompt")
        answers = [None] * len(prompts) if targets is None else list(targets)
        choices = [units] * len(prompts) if isinstance(units, str) else list(units)
        for name, given in (("targets", answers), ("units", choices)):
            if len(given) != len(prompts):
                raise InputError(f"{name} has {len(given)} entries for {len(prompts)} prompts")
        started = time.perf_counter()
        training = self.model.training
        self.model.eval()
        try:
            questions = [
                ask(
                    self.model,
                    self.tokenizer,
                    prompt,
                    answer,
                    choice,
                    include_target=include_target,
                    chat=chat,
                    max_new_tokens=max_new_tokens,
                    language=language,
                )
                for prompt, answer, choice in zip(prompts, answers, choices, strict=True)
            ]
            answered = time.perf_counter()
            results, work = self._scores(questions)
        finally:
            self.model.train(training)
        stats = {
            "seconds": time.perf_counter() - started,
            "answering_seconds": answered - started,
            "questions": len(questions),
            "tokens_through_model": work.tokens,
            "forwards": work.forwards,
            "variants": work.variants,
            "token_budget": work.token_budget,
        }
        names = [choice if isinstance(choice, str) else "spans" for choice in choices]
        return [
            self._explanation(question, scores, logprobs, name, stats)
            for question, (scores, logprobs), name in zip(questions, results, names, strict=True)
        ]

    def _scores(self, questions: list[Question]) -> tuple[list[tuple[Tensor, Tensor]], Work]:
        """Scores (n_units, m) and base log-probs (m,) per question, and what they cost."""
        work = Work()
        base = self._base(questions, work)
        factors = [self._factors(question) for question in questions]
        prefixes = [first_suppressed(rows) for rows in factors]
        variants = unit_variants(questions, prefixes)
        budget = self.token_budget or token_budget(
            free_bytes(self.model.device), activation_bytes_per_token(self.model), self.model.device.type
        )
        total = sum(v.suffix if base else v.length for v in variants)
        with tqdm(total=total, unit="tok", desc="explaining", disable=not self.progress, delay=1, leave=False) as bar:
            if base is not None:
                unperturbed = self._probe(questions, *base, factors, budget, work)
            if base is None or unperturbed is None:
                bar.reset(total=sum(v.length for v in variants))
                unperturbed = self._full_row_baseline(questions, factors, budget, work)
                work.advance = bar.update
                finished = run_full_rows(self.model, questions, factors, variants, self._perturbation, budget, work)
            else:
                work.advance = bar.update
                finished = run_packed(
                    self.model, questions, base[0], factors, variants, self._perturbation, budget, work
                )
            scores = [torch.zeros(len(q.units), len(q.targets)) for q in questions]
            for variant, logprobs in finished:
                difference = unperturbed[variant.question][-len(logprobs) :] - logprobs.cpu()
                scores[variant.question][variant.unit, -len(logprobs) :] = difference.float()
        return list(zip(scores, unperturbed, strict=True)), work

    def _factors(self, question: Question) -> Tensor:
        """(n_units, L) on the CPU."""
        embeddings = None
        if self.similarity_threshold is not None:
            with torch.inference_mode():
                embeddings = self.model.get_input_embeddings()(question.inputs).float().cpu()
        rows = factor_rows(
            question.units,
            len(question.ids),
            self.factor,
            embeddings=None if embeddings is None else torch.nn.functional.pad(embeddings, (0, 0, 0, 1)),
            similarity_threshold=self.similarity_threshold,
        )
        return rows[:, :-1]  # the last answer token is no key

    def _base(self, questions: list[Question], work: Work) -> tuple[Base, list[Tensor]] | None:
        """The unperturbed runs, (K/V, log-probs); None if this model is known not to pack."""
        if self._unpackable is not None:
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
        return Base.join(bases), logprobs

    def _check_attention(self, question: Question, ours: Tensor, work: Work) -> None:
        """Once per explainer: the model with our attention is the model with its own."""
        if self._tolerance is not None:
            return
        own = own_logprobs(self.model, question.inputs, question.rows, question.targets)
        work.add(len(question.inputs), 1)
        name, dtype = type(self.model).__name__, self.model.dtype
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

    def _probe(
        self,
        questions: list[Question],
        base: Base,
        expected: list[Tensor],
        factors: list[Tensor],
        budget: int,
        work: Work,
    ) -> list[Tensor] | None:
        """Unsuppressed variants, packed: their log-probs, or None if they are not those of the base runs.

        One begins in the middle of the prompt, to see that packing works on this model and prompt; one with the
        answer, which is what suppressed variants are then compared with: the same arithmetic on both sides.
        """
        variants = [
            Variant(q, None, prefix, len(question.inputs))
            for q, question in enumerate(questions)
            for prefix in (question.prompt_length // 2, question.prompt_length - 1)
        ]
        unperturbed: list[Tensor] = list(expected)
        try:
            finished = list(
                run_packed(self.model, questions, base, factors, variants, self._perturbation, budget, work)
            )
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
            if variant.prefix == questions[variant.question].prompt_length - 1:
                unperturbed[variant.question] = logprobs.cpu()
        return unperturbed

    def _fall_back(self, reason: str) -> None:
        self._unpackable = reason
        warnings.warn(
            f"{type(self.model).__name__} cannot be packed ({reason}): full rows are recomputed in batches, which "
            "is exact but slower",
            stacklevel=2,
        )

    def _full_row_baseline(
        self, questions: list[Question], factors: list[Tensor], budget: int, work: Work
    ) -> list[Tensor]:
        """Unsuppressed log-probs by the same way that the variants will go."""
        unperturbed = []
        for question in questions:
            ones = torch.ones(1, len(question.inputs), device=self.model.device)
            logprobs = full_row_logprobs(
                self.model,
                question.inputs,
                ones,
                question.rows,
                question.targets,
                mode=self._perturbation.mode,
            )[0]
            work.add(len(question.inputs), 1)
            self._check_attention(question, logprobs, work)
            unperturbed.append(logprobs.cpu())
        return unperturbed

    def _explanation(
        self, question: Question, scores: Tensor, logprobs: Tensor, units: str, stats: dict[str, Any]
    ) -> Explanation:
        name = getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
        layers = self._perturbation.layers
        return Explanation(
            prompt=question.prompt,
            target=question.target,
            units=question.units,
            scores=scores,
            target_tokens=question.target_tokens,
            base_logprobs=logprobs.float(),
            settings={
                "model": name,
                "mode": self._perturbation.mode,
                "factor": self.factor,
                "similarity_threshold": self.similarity_threshold,
                "layers": None if layers is None else list(layers),
                "units": units,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "device": str(self.model.device),
                "path": "packed" if self._unpackable is None else "batched",
                "versions": {
                    "atman_kernels": atman_kernels.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            },
            stats=stats,
        )


def _rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())
