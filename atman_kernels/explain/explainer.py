"""`Explainer`: which parts of a prompt made a model answer as it did."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import atman_kernels
from atman_kernels.arguments import choice, described, entries, flag, integer, of_entry, text, text_or_empty
from atman_kernels.errors import InputError
from atman_kernels.explain import methods
from atman_kernels.explain.contrast import check_answers, check_versus, contrast
from atman_kernels.explain.methods.perturbation import cost, suppression
from atman_kernels.formula import MODES
from atman_kernels.hf.attention.layers import checked_layers
from atman_kernels.hf.images.embedding import check_vision
from atman_kernels.hf.models import tasks
from atman_kernels.hf.models.eval_mode import evaluating
from atman_kernels.hf.models.model_input import Embedded
from atman_kernels.hf.models.wrapped import unwrapped
from atman_kernels.inputs.encoders import Asked, task_of
from atman_kernels.inputs.image_places import ImageUnitChoice, checked_image_units
from atman_kernels.inputs.image_text import ask_about_images, check_without_images, checked_images
from atman_kernels.inputs.text_generation import Prompt, Question, UnitChoice, ask, ask_all, checked_prompt
from atman_kernels.planning.factors import checked_factor, checked_threshold, factor_rows
from atman_kernels.planning.units import check_language, checked_choice
from atman_kernels.progress import Progress, checked_progress
from atman_kernels.result.ablation import Ablation
from atman_kernels.result.data import RISE
from atman_kernels.result.explanation import Explanation
from atman_kernels.run.full_rows import Task, run_task
from atman_kernels.run.packed import Perturbation
from atman_kernels.run.runner import VariantRunner
from atman_kernels.run.subsets import Masks, checked_masks, run_subsets


@dataclass(frozen=True)
class _Entry:
    """One of several prompts with what belongs to it, checked; see `Explainer.explain_batch`."""

    prompt: Any
    target: str | None
    units: str | list[tuple[int, int]] | None
    versus: str | None
    images: list[Any] | None

    @property
    def is_pictured(self) -> bool:
        return self.images is not None or isinstance(self.prompt, Mapping)


def _entry(prompt: Any, target: Any, units: Any, versus: Any, images: Any) -> _Entry:
    """Raises InputError if one of them is of another form."""
    images = checked_images(images)
    is_made = isinstance(prompt, Mapping) and "input_ids" in prompt  # by a processor
    if not is_made:
        prompt = text_or_empty(prompt, "prompt") if images and isinstance(prompt, str) else checked_prompt(prompt)
    return _Entry(
        prompt,
        None if target is None else text_or_empty(target, "target", expected="a text or None"),
        None if units is None else checked_choice(units),
        None if versus is None else text(versus, "versus", expected="a text with at least one character, or None"),
        images,
    )


def _entries(prompts: Any, targets: Any, units: Any, versus: Any, images: Any) -> list[_Entry]:
    """One entry per prompt.

    Raises:
        InputError: an argument is no list, has more or fewer entries than there are prompts, or one that does not fit.
    """
    listed = entries(prompts, "prompts", "at least one prompt")
    if not listed:
        raise InputError("prompts must be a list with at least one prompt, got none")
    count = len(listed)
    given = {
        "targets": [None] * count if targets is None else entries(targets, "targets", "texts and None"),
        "units": [units] * count if units is None or isinstance(units, str) else entries(units, "units", "choices"),
        "versus": [None] * count if versus is None else entries(versus, "versus", "texts and None"),
        "images": [None] * count if images is None else entries(images, "images", "one entry per prompt"),
    }
    for name, values in given.items():
        if len(values) != count:
            raise InputError(f"{name} has {len(values)} entries for {count} prompts")
    found = []
    for number, parts in enumerate(zip(listed, *given.values(), strict=True)):
        with of_entry(f"prompt {number}"):
            found.append(_entry(*parts))
    return found


@dataclass(frozen=True)
class _Asking:
    """How all prompts of a call are put, checked; see `Explainer.explain`."""

    include_target: bool
    chat: bool
    max_new_tokens: int
    language: str

    @classmethod
    def of(cls, include_target: Any, chat: Any, max_new_tokens: Any, language: Any) -> "_Asking":
        check_language(language)
        return cls(
            flag(include_target, "include_target"),
            flag(chat, "chat"),
            integer(max_new_tokens, "max_new_tokens", least=1),
            language,
        )


class Explainer:
    """Explains answers of one model by suppressing the attention to parts of the prompt (AtMan).

    A unit's score for an answer token is the loss of that token with the unit suppressed in every layer, minus its
    loss without: positive means that the answer rests on the unit. Scores are exact; the work is shared.

    Args:
        model: a transformers language model, or one of those in docs/images.md and docs/encoders.md; it is used as it
            is, in eval mode, and left as it was. Of what `torch.compile` or peft made of one, its layers are run, with
            the adapters that are active in them.
        tokenizer: its (fast) tokenizer, or the processor of a model that reads images or audio.
        mode: "log_additive" | "multiplicative" | "shifted", see `atman_kernels.suppressed_attention`.
        factor: what is kept of the attention to a suppressed unit, >= 0; with 0 and "log_additive" the unit is gone, as
            if the model had never seen it. The paper's f is 1 - factor.
        similarity_threshold: also suppress tokens whose input embedding has at least this cosine with the unit's,
            in proportion; in (0, 1]. None: the unit alone.
        layers: attention layers to act on, by index; None for all.
        vision: of a model that reads images beside text, suppress a unit's patches in its vision encoder, too, in all
            of its layers. Every variant then sees the image anew, as a whole row: see docs/images.md.
        token_budget: tokens per forward; None takes what memory allows. It is halved when memory runs out.
        progress: show a progress bar for what takes longer than a second; or a function, called with (done, total) in
            tokens before the first forward and after every other. `atman_kernels.Cancelled`, raised from it, ends the
            call there, with the model as it was.

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
        factor: float = 0.0,
        similarity_threshold: float | None = None,
        layers: Iterable[int] | None = None,
        vision: bool = False,
        token_budget: int | None = None,
        progress: Progress = True,
    ) -> None:
        model = unwrapped(model)
        self.task = tasks.task_of(model)
        part = tasks.part_of(model, self.task)  # refuses what cannot be reached
        self.vision = flag(vision, "vision")
        if self.vision:
            _check_vision(model, self.task)
        if token_budget is not None:
            token_budget = integer(token_budget, "token_budget", least=1, expected="an integer >= 1 or None")
        self.model: PreTrainedModel = model
        self._given = tokenizer
        self.processor = tokenizer if hasattr(tokenizer, "image_processor") else None
        self.tokenizer = tokenizer if self.processor is None else self.processor.tokenizer
        if self.task == "text-generation" and not hasattr(self.tokenizer, "is_fast"):
            raise InputError(f"tokenizer must be a tokenizer or processor of transformers, got {described(tokenizer)}")
        self.factor = checked_factor(factor)
        self.similarity_threshold = None if similarity_threshold is None else checked_threshold(similarity_threshold)
        how = Perturbation(choice(mode, "mode", MODES), checked_layers(part, layers))
        self.runner = VariantRunner(model, how, token_budget, checked_progress(progress))

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
        asking = _Asking.of(include_target, chat, max_new_tokens, language)
        image_units = checked_image_units(image_units)
        if self.task != "text-generation":
            if asking.include_target or asking.chat or versus is not None or method != "atman":
                name = type(self.model).__name__
                raise InputError(
                    f"include_target, chat, versus and other methods are for language models; {name} is none"
                )
            whole = Asked(
                prompt=asked,
                images=images,
                audio=audio,
                target=target,
                units=units,
                image_units=image_units,
                labels=labels,
                pooling=pooling,
                max_new_tokens=asking.max_new_tokens,
                language=language,
                vision=self.vision,
            )
            return self._explained_whole(chosen, whole)
        if audio is not None or labels is not None or not (isinstance(pooling, str) and pooling == "mean"):
            raise InputError(
                f"audio, labels and pooling are not for language models such as {type(self.model).__name__}"
            )
        if asked is None:
            raise InputError("give the prompt once, as prompt or as text; got none")
        return self._explained_entries(chosen, [_entry(asked, target, units, versus, images)], image_units, asking)[0]

    def explain_batch(
        self,
        prompts: Sequence[Prompt | Mapping[str, Any]],
        targets: Sequence[str | None] | None = None,
        units: str | Sequence[UnitChoice | None] | None = "token",
        *,
        versus: Sequence[str | None] | None = None,
        images: Sequence[Any] | None = None,
        image_units: ImageUnitChoice | None = "patch",
        include_target: bool = False,
        chat: bool = False,
        max_new_tokens: int = 32,
        language: str = "en",
        method: str = "atman",
        **options: Any,
    ) -> list[Explanation]:
        """Explain several prompts at once: variants of those without images share forwards.

        What prompts that begin alike begin with is run once for all of them. Prompts with images follow one by one:
        the patches of each fill forwards by themselves.

        Args:
            prompts: as in `explain`, one or more.
            targets: one per prompt; None, whole or in places, lets the model answer.
            units: one granularity for all prompts, or one choice per prompt; None, with images: these alone.
            versus: one other answer per prompt, or None, whole or in places.
            images: per prompt its image, a list of its images, or None; None: no prompt has images.
            image_units: of all images.
            include_target, chat, max_new_tokens, language, method, options: as in `explain`.

        Returns:
            One `Explanation` per prompt. `stats` are those of what shared forwards.

        Raises:
            InputError, UnsupportedModelError: as in `explain`.
        """
        chosen = methods.method(method, options)
        asking = _Asking.of(include_target, chat, max_new_tokens, language)
        image_units = checked_image_units(image_units)
        listed = _entries(prompts, targets, units, versus, images)
        if self.task != "text-generation":
            raise InputError(f"prompts: {type(self.model).__name__} is explained one prompt at a time, by explain")
        return self._explained_entries(chosen, listed, image_units, asking)

    def _explained_entries(
        self, method: methods.Method, listed: list[_Entry], image_units: ImageUnitChoice | None, asking: _Asking
    ) -> list[Explanation]:
        """Prompts of a language model: those without images together, the others one by one."""
        method.check(self.model)
        for number, entry in enumerate(listed):
            with of_entry(None if len(listed) == 1 else f"prompt {number}"):
                self._check_entry(entry, method, asking.include_target)
        texts = [entry for entry in listed if not entry.is_pictured]
        with evaluating(self.model):
            of_texts = iter(self._explained_texts(method, texts, asking) if texts else [])
            return [
                self._explained_picture(method, entry, image_units, asking) if entry.is_pictured else next(of_texts)
                for entry in listed
            ]

    def _check_entry(self, entry: _Entry, method: methods.Method, include_target: bool) -> None:
        """Raises InputError if something of an entry does not go with the rest."""
        check_versus(entry.target, entry.versus, include_target)
        if not entry.is_pictured:
            if entry.units is None:
                raise InputError("units is None, which needs images; without them nothing would get a score")
            check_without_images(self.model, self.processor, entry.prompt)
        elif entry.versus is not None:
            raise InputError("versus does not go with images; explain either answer by itself")
        elif method.name not in methods.WITH_IMAGES:
            raise InputError(f"method with images must be one of {', '.join(methods.WITH_IMAGES)}, got {method.name!r}")

    def _explained_texts(self, method: methods.Method, listed: list[_Entry], asking: _Asking) -> list[Explanation]:
        """Prompts without images, together."""
        contrasted = [index for index, entry in enumerate(listed) if entry.versus is not None]
        asked = [(entry.prompt, entry.target, entry.units) for entry in listed]
        asked += [(listed[i].prompt, listed[i].versus, listed[i].units) for i in contrasted]  # the other answers
        names: list[str | None] = [None] if len(listed) == 1 else [f"prompt {number}" for number in range(len(listed))]
        names += [f"{names[i]}: versus, as the target" if names[i] else "versus, as the target" for i in contrasted]
        started = time.perf_counter()
        questions = ask_all(self.model, self.tokenizer, asked, **vars(asking), names=names)
        return self._explained(method, questions, [_name(units) for *_, units in asked], started, contrasted)

    def _explained_picture(
        self, method: methods.Method, entry: _Entry, image_units: ImageUnitChoice | None, asking: _Asking
    ) -> Explanation:
        """A prompt with images, by itself."""
        started = time.perf_counter()
        question = ask_about_images(
            self.model,
            self.processor,
            self.tokenizer,
            entry.prompt,
            entry.images,
            entry.target,
            entry.units,
            image_units,
            **vars(asking),
            vision=self.vision,
        )
        return self._explained(method, [question], [_name(entry.units)], started)[0]

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
            _explanation(
                question, method, outcome, index, self._settings(method, outcome, name) | question.facts, stats
            )
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
        the default ones they are gone. Equal masks run once.

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
            >>> explainer = Explainer(model, tokenizer)                                     # doctest: +SKIP
            >>> halves = lambda units: torch.rand(1000, len(units)) < 0.5                   # doctest: +SKIP
            >>> explainer.ablate("The capital of France is", " Paris", masks=halves).logprobs.shape  # doctest: +SKIP
            torch.Size([1000, 1])
        """
        asking = _Asking.of(include_target, chat, max_new_tokens, language)
        entry = _entry(prompt, target, units, None, None)
        check_without_images(self.model, self.processor, entry.prompt)
        started = time.perf_counter()
        with evaluating(self.model):
            question = ask(self.model, self.tokenizer, entry.prompt, entry.target, entry.units, **vars(asking))
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
            settings=suppression(context) | self._origin(_name(entry.units)),
            stats={"seconds": time.perf_counter() - started, "answering_seconds": answered - started}
            | cost(outcome.work),
        )

    def _explained_whole(self, method: methods.Method, asked: Asked) -> Explanation:
        """Of a model that reads both ways: every variant is a whole row."""
        started = time.perf_counter()
        with evaluating(self.model):
            task = task_of(self.model, self._given, self.task, asked)
            answered = time.perf_counter()
            outcome = run_task(self._context(), task)
        units = (
            asked.picture_units
            if self.task in ("image-classification", "zero-shot-image-classification")
            else asked.units
        )
        name = units if units is None or isinstance(units, str | int | float) else "spans"
        settings = self._settings(method, outcome, name) | task.facts
        return _explanation(task, method, outcome, 0, settings, _stats(outcome, started, answered))

    @property
    def suppression(self) -> dict[str, Any]:
        """Mode, factor, similarity threshold and layers, defaults written out, as JSON types."""
        return self._context().suppression

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
        own = {} if method.measure is None else {"options": method.options}
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


def _check_vision(model: PreTrainedModel, task: tasks.Task) -> None:
    """Raises InputError or UnsupportedModelError if a model has no vision encoder beside what is suppressed anyway."""
    name = type(model).__name__
    if task in ("visual-question-answering", "image-to-text"):
        return
    if task not in ("text-generation", "image-text-to-text"):
        raise InputError(f"vision is for models that read images beside text; {name} is none")
    if getattr(model.config, "vision_config", None) is None:
        raise InputError(f"vision is for models that read images beside text; {name} has no vision encoder")
    check_vision(model)


def _explanation(
    question: Question | Task,
    method: methods.Method,
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
        measure=method.measure or RISE,
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
