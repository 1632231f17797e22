"""`Explainer`: which parts of a prompt made a model answer as it did."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import atman_kernels
from atman_kernels.errors import InputError
from atman_kernels.explain import methods
from atman_kernels.explain.contrast import check_answers, check_versus, contrast
from atman_kernels.explain.execution import Perturbation
from atman_kernels.explain.explanation import Explanation
from atman_kernels.explain.image_question import ImageUnitChoice, ask_about_images, check_without_images
from atman_kernels.explain.methods.perturbation import cost, suppression
from atman_kernels.explain.objectives import Asked, task_of
from atman_kernels.explain.question import Prompt, Question, UnitChoice, ask
from atman_kernels.explain.runner import VariantRunner
from atman_kernels.explain.subsets import Ablation, Masks, checked_masks, run_subsets
from atman_kernels.explain.whole_rows import Task, run_task
from atman_kernels.formula import MODES
from atman_kernels.hf.forward import evaluating
from atman_kernels.hf.kinds import kind_of, part_of
from atman_kernels.hf.sequence import Embedded
from atman_kernels.hf.suppression import checked_layers
from atman_kernels.planning.factors import factor_rows


class Explainer:
    """Explains answers of one model by suppressing the attention to parts of the prompt (AtMan).

    A unit's score for an answer token is the loss of that token with the unit suppressed in every layer, minus its
    loss without: positive means that the answer rests on the unit. Scores are exact; the work is shared.

    Args:
        model: a transformers language model, or one of those in docs/encoders.md; it is used as it is, in eval mode,
            and left as it was.
        tokenizer: its (fast) tokenizer, or the processor of a model that reads images or audio.
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
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        *,
        mode: str = "log_additive",
        factor: float = 0.1,
        similarity_threshold: float | None = None,
        layers: Iterable[int] | None = None,
        token_budget: int | None = None,
        progress: bool = True,
    ) -> None:
        self.kind = kind_of(model)
        part = part_of(model, self.kind)  # refuses what cannot be reached
        if mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if not (isinstance(factor, int | float) and 0 <= factor < float("inf")):
            raise InputError(f"factor must be a finite number >= 0, got {factor!r}")
        if similarity_threshold is not None and not 0 < similarity_threshold <= 1:
            raise InputError(f"similarity_threshold must be in (0, 1] or None, got {similarity_threshold!r}")
        if token_budget is not None and token_budget < 1:
            raise InputError(f"token_budget must be >= 1 or None, got {token_budget!r}")
        self.model = model
        self._given = tokenizer
        self.processor = tokenizer if hasattr(tokenizer, "image_processor") else None
        self.tokenizer = tokenizer if self.processor is None else self.processor.tokenizer
        self.factor = float(factor)
        self.similarity_threshold = similarity_threshold
        self.runner = VariantRunner(model, Perturbation(mode, checked_layers(part, layers)), token_budget, progress)

    def explain(
        self,
        prompt: Prompt | tuple[str, str] | Mapping[str, Any] | None = None,
        target: str | int | None = None,
        units: UnitChoice | float | None = "token",
        *,
        versus: str | None = None,
        images: Any = None,
        text: Prompt | None = None,
        image_units: ImageUnitChoice | None = "patch",
        audio: Any = None,
        labels: Sequence[str] | None = None,
        pooling: str = "mean",
        include_target: bool = False,
        chat: bool = False,
        max_new_tokens: int = 32,
        language: str = "en",
        method: str = "atman",
        **options: Any,
    ) -> Explanation:
        """Score every unit of a prompt for every token of an answer.

        Args:
            prompt: a text, or a list of chat messages (for which the tokenizer's chat template is used); for an
                image-text model also what its processor made of one prompt with images.
            target: the answer, tokenized apart from the prompt and appended to it (so it usually starts with a
                space); None lets the model answer first, greedily.
            units: "token" | "word" | "sentence" | "paragraph", or (start, end) character spans of the prompt,
                which may overlap and leave text out. None, with images: only they are explained.
            versus: another answer: the scores then say why the model gives the target rather than this one. They
                are those of the target minus those of this answer, summed up, on the one target token "A rather
                than B". Not with images.
            images: one PIL image or several, in the order of the placeholders in the text. Needs an explainer that
                was given the model's processor.
            text: another name for prompt, the processor's own.
            image_units: "patch"; n for tiles of n × n patches; "image"; None: images get no units.
            audio, labels, pooling: of models that hear, compare images with texts, or embed; see docs/encoders.md,
                as for what prompt, target and units mean to models other than language models.
            include_target: earlier answer tokens become units too, and explain the later ones.
            chat: put a text prompt into the tokenizer's chat template as the user's message.
            max_new_tokens: length of the model's own answer at most.
            language: of the text, for sentence splitting.
            method: "atman", or another of `atman_kernels.explain.methods.names()`, whose scores mean something else
                and need not be in nats: see docs/methods.md and `Explanation.measure`.
            options: of that method, by name.

        Returns:
            An `Explanation`; scores are (n_units, n_target_tokens), or (n_units, 1) for the whole answer with versus
            and with methods that explain no single tokens.

        Raises:
            InputError: an argument does not fit.
            UnsupportedModelError: the model cannot be explained, with the reason.
        """
        asked: Any = text if prompt is None else prompt
        if not (prompt is None or text is None):
            raise InputError("give the prompt once, as prompt or as text")
        chosen = methods.method(method, options)
        if self.kind != "language":
            if include_target or chat or versus is not None or method != "atman":
                name = type(self.model).__name__
                raise InputError(
                    f"include_target, chat, versus and other methods are for language models; {name} is none"
                )
            choice = image_units if images is not None and image_units != "patch" else units
            return self._explained_whole(
                chosen, Asked(asked, images, audio, target, choice, labels, pooling, max_new_tokens, language)
            )
        if audio is not None or labels is not None or pooling != "mean":
            raise InputError(
                f"audio, labels and pooling are not for language models such as {type(self.model).__name__}"
            )
        if asked is None:
            raise InputError("give the prompt once, as prompt or as text; got none")
        if isinstance(target, int) or isinstance(units, int | float):
            raise InputError(f"target and units of a language model are texts or spans, got {target!r} and {units!r}")
        settings: dict[str, Any] = {
            "include_target": include_target,
            "chat": chat,
            "max_new_tokens": max_new_tokens,
            "language": language,
        }
        if images is None and not isinstance(asked, Mapping):
            if units is None:
                raise InputError("units is None, which needs images; without them nothing would get a score")
            return self.explain_batch(
                [asked], [target], [units], versus=[versus], **settings, method=method, **options
            )[0]
        if versus is not None:
            raise InputError("versus does not go with images; explain either answer by itself")
        if chosen.name not in methods.WITH_IMAGES:
            raise InputError(f"method with images must be one of {', '.join(methods.WITH_IMAGES)}, got {method!r}")
        started = time.perf_counter()
        with evaluating(self.model):
            question = ask_about_images(
                self.model, self.processor, self.tokenizer, asked, images, target, units, image_units, **settings
            )
            return self._explained(chosen, [question], [_name(units)], started)[0]

    def explain_batch(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[str | None] | None = None,
        units: str | Sequence[UnitChoice] = "token",
        *,
        versus: Sequence[str | None] | None = None,
        include_target: bool = False,
        chat: bool = False,
        max_new_tokens: int = 32,
        language: str = "en",
        method: str = "atman",
        **options: Any,
    ) -> list[Explanation]:
        """Explain several prompts at once: their variants share forwards.

        Args:
            prompts: as in `explain`, one or more.
            targets: one per prompt; None, whole or in places, lets the model answer.
            units: one granularity for all prompts, or one choice per prompt.
            versus: one other answer per prompt, or None, whole or in places.
            include_target, chat, max_new_tokens, language, method, options: as in `explain`.

        Returns:
            One `Explanation` per prompt. Their `stats` are those of the whole batch.

        Raises:
            InputError, UnsupportedModelError: as in `explain`.
        """
        chosen = methods.method(method, options)
        if isinstance(prompts, str) or not prompts:
            raise InputError("prompts must be a list with at least one prompt")
        if self.kind != "language":
            raise InputError(f"prompts: {type(self.model).__name__} is explained one prompt at a time, by explain")
        answers = [None] * len(prompts) if targets is None else list(targets)
        choices = [units] * len(prompts) if isinstance(units, str) else list(units)
        others = [None] * len(prompts) if versus is None else list(versus)
        for name, given in (("targets", answers), ("units", choices), ("versus", others)):
            if len(given) != len(prompts):
                raise InputError(f"{name} has {len(given)} entries for {len(prompts)} prompts")
        for answer, other in zip(answers, others, strict=True):
            check_versus(answer, other, include_target)
        for prompt in prompts:
            check_without_images(self.model, self.processor, prompt)
        contrasted = [index for index, other in enumerate(others) if other is not None]
        asked = [*range(len(prompts)), *contrasted]  # which prompt each question is about
        started = time.perf_counter()
        with evaluating(self.model):
            questions = [
                ask(
                    self.model,
                    self.tokenizer,
                    prompts[index],
                    answer,
                    choices[index],
                    include_target=include_target,
                    chat=chat,
                    max_new_tokens=max_new_tokens,
                    language=language,
                )
                for index, answer in zip(asked, [*answers, *(others[i] for i in contrasted)], strict=True)
            ]
            return self._explained(chosen, questions, [_name(choices[i]) for i in asked], started, contrasted)

    def _explained(
        self,
        method: methods.Method,
        questions: list[Question],
        names: list[str | None],
        started: float,
        contrasted: Sequence[int] = (),
    ) -> list[Explanation]:
        """What the method finds.

        Args:
            names: of the questions' units.
            started: when asking began.
            contrasted: questions whose other answers are the last ones, in this order.
        """
        pairs = list(zip(contrasted, range(len(questions) - len(contrasted), len(questions)), strict=True))
        for first, second in pairs:
            check_answers(questions[first], questions[second])
        answered = time.perf_counter()
        outcome = method.run(self._context(), questions)
        stats = _stats(outcome, started, answered)
        explanations = [
            _explanation(question, outcome, index, self._settings(method, outcome, name) | question.facts, stats)
            for index, (question, name) in enumerate(zip(questions, names, strict=True))
        ]
        for first, second in pairs:
            errors = None if outcome.draws is None else _errors(outcome.draws[first] - outcome.draws[second])
            explanations[first] = contrast(explanations[first], explanations[second], errors)
        return explanations[: len(questions) - len(pairs)]

    def ablate(
        self,
        prompt: Prompt,
        target: str | None = None,
        units: UnitChoice = "token",
        *,
        masks: Masks,
        include_target: bool = False,
        chat: bool = False,
        max_new_tokens: int = 32,
        language: str = "en",
    ) -> Ablation:
        """The answer's log-probabilities with any sets of units suppressed: as many sets as wanted, in one go.

        Units are suppressed as in `explain`, by this explainer's mode, factor, similarity threshold and layers; with
        `factor=0` and mode "log_additive" they are gone. Equal masks run once.

        Args:
            masks: bool (n_variants, n_units), True = suppressed: a tensor, an array or nested lists; or a function
                that makes them from the tuple of units.
            prompt, target, units, include_target, chat, max_new_tokens, language: as in `explain`.

        Returns:
            An `Ablation`. Beside it, memory holds one float32 factor per mask and token of the prompt and target.

        Raises:
            InputError: an argument does not fit.
            UnsupportedModelError: the model cannot be explained, with the reason.

        Example:
            >>> removing = Explainer(model, tokenizer, factor=0.0)                          # doctest: +SKIP
            >>> halves = lambda units: torch.rand(1000, len(units)) < 0.5                   # doctest: +SKIP
            >>> removing.ablate("The capital of France is", " Paris", masks=halves).logprobs.shape  # doctest: +SKIP
            torch.Size([1000, 1])
        """
        check_without_images(self.model, self.processor, prompt)
        started = time.perf_counter()
        with evaluating(self.model):
            question = ask(
                self.model,
                self.tokenizer,
                prompt,
                target,
                units,
                include_target=include_target,
                chat=chat,
                max_new_tokens=max_new_tokens,
                language=language,
            )
            rows = checked_masks(masks, question.units)
            answered = time.perf_counter()
            context = self._context()
            outcome = run_subsets(context, [question], [rows], "ablating")
        return Ablation(
            prompt=question.prompt,
            target=question.target,
            units=question.units,
            masks=rows,
            logprobs=outcome.perturbed[0].float(),
            target_tokens=question.target_tokens,
            base_logprobs=outcome.unperturbed[0].float(),
            settings=suppression(context) | self._origin(_name(units)),
            stats={"seconds": time.perf_counter() - started, "answering_seconds": answered - started}
            | cost(outcome.work),
        )

    def _explained_whole(self, method: methods.Method, asked: Asked) -> Explanation:
        """Of a model that reads both ways: every variant is a whole row."""
        started = time.perf_counter()
        with evaluating(self.model):
            task = task_of(self.model, self._given, self.kind, asked)
            answered = time.perf_counter()
            outcome = run_task(self._context(), task)
        name = asked.units if isinstance(asked.units, str | int | float) else "spans"
        settings = self._settings(method, outcome, name) | task.facts
        return _explanation(task, outcome, 0, settings, _stats(outcome, started, answered))

    def _context(self) -> methods.MethodContext:
        return methods.MethodContext(self.model, self.runner, self.factors_of, self.factor, self.similarity_threshold)

    def factors_of(self, question: Question) -> Tensor:
        """(n_units, L) on the CPU."""
        embeddings = None
        if self.similarity_threshold is not None:
            with torch.inference_mode():
                inputs = question.inputs
                table = self.model.get_input_embeddings()
                merged = inputs.embeddings if isinstance(inputs, Embedded) else table(inputs)
                embeddings = merged.float().cpu()
        rows = factor_rows(
            question.units,
            len(question.ids),
            self.factor,
            embeddings=None if embeddings is None else torch.nn.functional.pad(embeddings, (0, 0, 0, 1)),
            similarity_threshold=self.similarity_threshold,
        )
        return rows[:, :-1]  # the last answer token is no key

    def _settings(self, method: methods.Method, outcome: methods.MethodOutcome, units: Any) -> dict[str, Any]:
        own = {} if method.measure is None else {"measure": method.measure, "options": method.options}
        return {"method": method.name, **own, **outcome.settings, **self._origin(units)}

    def _origin(self, units: Any) -> dict[str, Any]:
        """What was explained with what."""
        return {
            "model": getattr(self.model.config, "name_or_path", "") or type(self.model).__name__,
            "units": units,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "versions": {
                "atman_kernels": atman_kernels.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def _explanation(
    question: Question | Task,
    outcome: methods.MethodOutcome,
    index: int,
    settings: dict[str, Any],
    stats: dict[str, Any],
) -> Explanation:
    """One question's share of what a method found."""
    scores, logprobs = outcome.scores[index].float(), outcome.logprobs[index]
    tokens = question.target_tokens
    if scores.shape[1] < len(tokens):  # one score for the whole answer
        tokens, logprobs = (question.target,), logprobs.sum(dim=0, keepdim=True)
    return Explanation(
        prompt=question.prompt,
        target=question.target,
        units=question.units,
        scores=scores,
        target_tokens=tokens,
        base_logprobs=logprobs.float(),
        settings=settings,
        stats=stats,
        standard_errors=None if outcome.draws is None else _errors(outcome.draws[index]),
    )


def _errors(draws: Tensor) -> Tensor:
    """(n_units,) standard errors of the means of (n_draws, n_units) independent draws."""
    return (draws.std(dim=0) / len(draws) ** 0.5).float()


def _stats(outcome: methods.MethodOutcome, started: float, answered: float) -> dict[str, Any]:
    return {
        "seconds": time.perf_counter() - started,
        "answering_seconds": answered - started,
        "questions": len(outcome.scores),
        **outcome.stats,
    }


def _name(units: UnitChoice | None) -> str | None:
    return units if units is None or isinstance(units, str) else "spans"
