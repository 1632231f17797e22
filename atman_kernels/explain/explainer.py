"""`Explainer`: which parts of a prompt made a model answer as it did."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from atman_kernels.arguments import choice, count_or_none, described, flag, of_entry
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.explain import methods
from atman_kernels.explain.assembly import errors_of, explanation_of, origin_of, settings_of, stats_of
from atman_kernels.explain.contrast import check_answers, check_versus, contrast
from atman_kernels.explain.depth import Depth
from atman_kernels.explain.levels import run_levels
from atman_kernels.formula import MODES
from atman_kernels.hf.attention.layers import checked_layers
from atman_kernels.hf.images.embedding import check_vision
from atman_kernels.hf.models.eval_mode import evaluating
from atman_kernels.hf.models.ranks import in_step
from atman_kernels.hf.models.sharding import check_sharding
from atman_kernels.hf.models.tasks import Task, part_of, task_of
from atman_kernels.hf.models.wrapped import unwrapped
from atman_kernels.inputs.image_units import PATCHES, ImageUnitChoice
from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.request import Common, Request, batch_of, contents
from atman_kernels.inputs.tasks import CAUSAL, ROWS, Reader, causal_objectives, check_request, units_named
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.inputs.tokenization import NestedChoice, Prompt, UnitChoice
from atman_kernels.planning.factors import checked_factor, checked_threshold
from atman_kernels.progress import Progress, checked_progress
from atman_kernels.result.ablation import Ablation
from atman_kernels.result.explanation import Explanation
from atman_kernels.run.perturbation import Perturbation
from atman_kernels.run.runner import Runner
from atman_kernels.run.subsets import Masks, checked_masks, run_subsets


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
            of its layers. Every variant then sees the image anew, as a full row: see docs/images.md.
        token_budget: tokens per forward; None takes what memory allows. It is halved when memory runs out.
        progress: show a progress bar for what takes longer than a second, of processes that share the model in the
            first one only; or a function, called with (done, total) in tokens before the first forward and after every
            other. `atman_kernels.Cancelled`, raised from it, ends the call there, with the model as it was.

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
        self.task = task_of(model)
        part = part_of(model, self.task)  # refuses what cannot be reached
        check_sharding(model, part)
        self.vision = flag(vision, "vision")
        if self.vision:
            _check_vision(model, self.task)
        token_budget = count_or_none(token_budget, "token_budget")
        self.model: PreTrainedModel = model
        self._reader = Reader(model, tokenizer, self.task)
        self.processor = self._reader.image_processor
        self.tokenizer = self._reader.tokenizer
        if self.task == CAUSAL and not hasattr(self.tokenizer, "is_fast"):
            raise InputError(f"tokenizer must be a tokenizer or processor of transformers, got {described(tokenizer)}")
        factor = checked_factor(factor)
        threshold = None if similarity_threshold is None else checked_threshold(similarity_threshold)
        how = Perturbation(choice(mode, "mode", MODES), factor, threshold, checked_layers(part, layers))
        self.runner = Runner(model, how, token_budget, checked_progress(progress))
        self.ranks = self.runner.ranks

    @in_step
    def explain(
        self,
        prompt: Prompt | tuple[str, str] | Mapping[str, Any] | None = None,
        target: str | int | None = None,
        units: UnitChoice | NestedChoice | float | None = "token",
        *,
        versus: str | None = None,
        images: Any = None,
        text: Prompt | None = None,
        image_units: ImageUnitChoice | None = PATCHES,
        audio: Any = None,
        labels: Sequence[str] | None = None,
        pooling: str = "mean",
        include_target: bool = False,
        chat: bool = False,
        max_new_tokens: int = 32,
        language: str = "en",
        recompute: int | None = None,
        exact: int | None = None,
        refine: int | None = None,
        method: str = "atman",
        **options: Any,
    ) -> Explanation:
        """Score every unit of a prompt for every token of an answer.

        Args:
            prompt: a text, or a list of chat messages (for which the tokenizer's chat template is used); for an
                image-text model also what its processor made of one prompt with images.
            target: the answer, tokenized apart from the prompt and appended to it (so it usually starts with a
                space); None lets the model answer first, greedily.
            units: "token" | "word" | "sentence" | "paragraph", or (start, end) or (start, end, name) character spans
                of the prompt, which may overlap and leave text out. Several of them from coarse to fine, such as
                ("paragraph", "sentence", "word") or (spans, "sentence"), are nested units: the strongest of each level
                are cut into the next one's, see docs/long-prompts.md. None, with images: only they are explained.
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
            recompute: how many of the last prompt tokens feel a suppression, beside the answer: 1 for what the answer
                reads directly from a unit (its direct effect), more for what later tokens pass on as well; None for
                all that it changes (its total effect). It costs n · (recompute + m) tokens instead of n²/2: see
                docs/search.md.
            exact: find this many of the strongest units and run them exactly, beside those at the end of the prompt,
                which cost little; the others keep an estimate, and `Explanation.exact` says which is which. About
                three times as many as will be looked at find these nearly always. None: all are exact.
            refine: of nested units, how many of each level are cut into the next one's; None: those that make up
                four fifths of the level's effects, at least 3 and at most 5.
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
        common = Common.checked(
            image_units=image_units,
            include_target=include_target,
            chat=chat,
            max_new_tokens=max_new_tokens,
            language=language,
            vision=self.vision,
        )
        request = Request(common, asked, target, units, versus, images, audio, labels, pooling)
        request = self._fitting(request, method)
        depth = Depth.checked(recompute, exact, chosen, self.task, refine=refine, nested=request.is_nested)
        return self._explained(chosen, [request], depth)[0]

    def _fitting(self, request: Request, method: str) -> Request:
        """The request as the model's task takes it. Raises InputError for what is of other tasks."""
        common, units = request.common, request.units
        name = type(self.model).__name__
        if self.task == CAUSAL:
            plain = isinstance(request.pooling, str) and request.pooling == "mean"
            if request.audio is not None or request.labels is not None or not plain:
                raise InputError(f"audio, labels and pooling are not for language models such as {name}")
            if request.prompt is None:
                raise InputError("give the prompt once, as prompt or as text; got none")
            return request.checked()
        if isinstance(units, list | tuple) and any(isinstance(level, str) for level in units):
            raise InputError(f"nested units are for causal language models; {name} is none")
        if common.include_target or common.chat or request.versus is not None or method != "atman":
            raise InputError(f"include_target, chat, versus and other methods are for language models; {name} is none")
        return request

    @in_step
    def explain_batch(
        self,
        prompts: Sequence[Prompt | Mapping[str, Any]],
        targets: Sequence[str | None] | None = None,
        units: str | Sequence[UnitChoice | NestedChoice | None] | None = "token",
        *,
        versus: Sequence[str | None] | None = None,
        images: Sequence[Any] | None = None,
        image_units: ImageUnitChoice | None = PATCHES,
        include_target: bool = False,
        chat: bool = False,
        max_new_tokens: int = 32,
        language: str = "en",
        recompute: int | None = None,
        exact: int | None = None,
        refine: int | None = None,
        method: str = "atman",
        **options: Any,
    ) -> list[Explanation]:
        """Explain several prompts at once: variants of those without images share forwards.

        What prompts that begin alike begin with is run once for all of them. Prompts with images follow one by one:
        the patches of each fill forwards by themselves.

        Args:
            prompts: as in `explain`, one or more.
            targets: one per prompt; None, whole or in places, lets the model answer.
            units: one granularity for all prompts, or one choice per prompt, as in
                [("paragraph", "sentence", "word")] * len(prompts); None, with images: these alone.
            versus: one other answer per prompt, or None, whole or in places.
            images: per prompt its image, a list of its images, or None; None: no prompt has images.
            image_units: of all images.
            include_target, chat, max_new_tokens, language, recompute, exact, refine, method, options: as in `explain`.

        Returns:
            One `Explanation` per prompt. `stats` are those of what shared forwards.

        Raises:
            InputError, UnsupportedModelError: as in `explain`.
        """
        chosen = methods.method(method, options)
        common = Common.checked(
            image_units=image_units,
            include_target=include_target,
            chat=chat,
            max_new_tokens=max_new_tokens,
            language=language,
            vision=self.vision,
        )
        listed = batch_of(common, prompts, targets, units, versus, images)
        if self.task != CAUSAL:
            raise InputError(f"prompts: {type(self.model).__name__} is explained one prompt at a time, by explain")
        nested = any(request.is_nested for request in listed)
        depth = Depth.checked(recompute, exact, chosen, self.task, refine=refine, nested=nested)
        return self._explained(chosen, listed, depth)

    def _explained(self, method: methods.Method, requests: list[Request], depth: Depth) -> list[Explanation]:
        """Requests that have no images together, the others one by one."""
        if self.task == CAUSAL:
            method.check(self.model)
        for number, request in enumerate(requests):
            with of_entry(None if len(requests) == 1 else f"prompt {number}"):
                self._check(request, method)
        self._agree(requests, method=(method.name, method.options), depth=depth)
        together = [request for request in requests if not request.has_images]
        with evaluating(self.model):
            found = iter(self._explained_together(method, together, depth) if together else [])
            return [
                self._explained_together(method, [request], depth)[0] if request.has_images else next(found)
                for request in requests
            ]

    def _agree(self, requests: list[Request], **asked: Any) -> None:
        """Raises InputError where other processes that share the model were given something else."""
        if self.ranks.size > 1:
            self.ranks.agree("what is asked", settings=(self.suppression, self.vision), **contents(requests), **asked)

    def _check(self, request: Request, method: methods.Method) -> None:
        """Raises InputError if something of a request does not go with the rest, or with the model."""
        check_versus(request.target, request.versus, request.common.include_target)
        check_request(self._reader, request)
        if self.task == CAUSAL and request.has_images and method.name not in methods.WITH_IMAGES:
            raise InputError(f"method with images must be one of {', '.join(methods.WITH_IMAGES)}, got {method.name!r}")

    def _explained_together(self, method: methods.Method, requests: list[Request], depth: Depth) -> list[Explanation]:
        """Requests whose variants share forwards; each other answer is asked about, too, and taken off."""
        started = time.perf_counter()
        contrasted = [index for index, request in enumerate(requests) if request.versus is not None]
        pairs = list(zip(contrasted, range(len(requests), len(requests) + len(contrasted)), strict=True))
        asked = requests + [requests[index].of_versus() for index in contrasted]
        objectives = ROWS[self.task].build(self._reader, asked, _names(len(requests), contrasted))
        for first, second in pairs:
            check_answers(objectives[first], objectives[second])
        answered = time.perf_counter()
        context = methods.MethodContext(self.model, self.runner, depth.recompute, depth.exact, pairs)
        if any(request.is_nested for request in asked):
            objectives, outcome = run_levels(method, context, objectives, pairs, depth.refine)
        else:
            outcome = method.run(context, objectives)
        stats = stats_of(outcome, started, answered)
        explanations = []
        for index, (objective, request) in enumerate(zip(objectives, asked, strict=True)):
            settings = settings_of(self.model, method, outcome, units_named(self.task, request))
            explanations.append(explanation_of(objective, method, outcome, index, settings, stats, depth.recompute))
        for first, second in pairs:
            errors = None if outcome.draws is None else errors_of(outcome.draws[first] - outcome.draws[second])
            explanations[first] = contrast(explanations[first], explanations[second], errors)
        return explanations[: len(requests)]

    @in_step
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
        recompute: int | None = None,
    ) -> Ablation:
        """The answer's log-probabilities with any sets of units suppressed: as many sets as wanted, in one go.

        Units are suppressed as in `explain`, by this explainer's mode, factor, similarity threshold and layers; with
        the default ones they are gone. Equal masks run once.

        Args:
            masks: bool (n_variants, n_units), True = suppressed: a tensor, an array or nested lists; or a function
                that makes them from the tuple of units.
            prompt, target, units, include_target, chat, max_new_tokens, language, recompute: as in `explain`.

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
        depth = Depth.checked(recompute, None, methods.method("atman", {}), self.task)
        self.ranks.agree("an ablation", recompute=depth.recompute)
        started = time.perf_counter()
        objective = self.objective_of(
            prompt,
            target,
            units,
            include_target=include_target,
            chat=chat,
            max_new_tokens=max_new_tokens,
            language=language,
        )
        with evaluating(self.model):
            rows = checked_masks(masks, objective.units)
            answered = time.perf_counter()
            outcome = run_subsets(self.runner, [objective], [rows], "ablating", depth.recompute)
        how = self.suppression | {"path": outcome.path}
        how |= {} if depth.recompute is None else {"recompute": depth.recompute}
        settings = how | origin_of(self.model, units if isinstance(units, str) else "spans")
        seconds = {"seconds": time.perf_counter() - started, "answering_seconds": answered - started}
        return Ablation(
            prompt=objective.prompt,
            target=objective.target,
            units=objective.units,
            masks=rows,
            logprobs=outcome.perturbed[0].float(),
            target_tokens=objective.target_tokens,
            base_logprobs=outcome.unperturbed[0].float(),
            settings=settings,
            stats=seconds | outcome.work.stats,
        )

    @in_step
    def objective_of(
        self, prompt: Prompt, target: str | None = None, units: UnitChoice = "token", **common: Any
    ) -> CausalObjective:
        """What is asked about a text, for whoever decides which variants run: its tokens, units and answer.

        Args:
            prompt, target, units: as in `explain`.
            common: include_target, chat, max_new_tokens and language, as in `explain`.

        Raises:
            InputError, UnsupportedModelError: as in `ablate`.
        """
        if self.task != CAUSAL:
            name = type(self.model).__name__
            raise UnsupportedModelError(f"{name} is no language model, in which prompt and answer are one sequence")
        request = Request(Common.checked(**common), prompt, target, units).checked()
        if request.is_nested:
            raise InputError("units of an ablation are of one level: a mask has a column for each of them")
        check_request(self._reader, request)
        self._agree([request])
        with evaluating(self.model):
            (objective,) = causal_objectives(self._reader, [request])
        return objective

    @property
    def factor(self) -> float:
        """What is kept of the attention to a suppressed unit."""
        return self.runner.perturbation.factor

    @property
    def similarity_threshold(self) -> float | None:
        """The cosine from which tokens are suppressed along with a unit; None: the unit alone."""
        return self.runner.perturbation.similarity_threshold

    @property
    def suppression(self) -> dict[str, Any]:
        """Mode, factor, similarity threshold and layers, defaults written out, as JSON types."""
        return self.runner.perturbation.settings

    def factors_of(self, objective: Objective) -> Tensor:
        """(n_units, positions) on the CPU, one row of factors per unit."""
        return self.runner.perturbation.factors(self.model, objective)


def _check_vision(model: PreTrainedModel, task: Task) -> None:
    """Raises InputError or UnsupportedModelError if a model has no vision encoder beside what is suppressed anyway."""
    name = type(model).__name__
    if task in ("visual-question-answering", "image-to-text"):
        return
    if task not in (CAUSAL, "image-text-to-text"):
        raise InputError(f"vision is for models that read images beside text; {name} is none")
    if getattr(model.config, "vision_config", None) is None:
        raise InputError(f"vision is for models that read images beside text; {name} has no vision encoder")
    check_vision(model)


def _names(count: int, contrasted: list[int]) -> list[str | None]:
    """How errors call the requests of a call, those about the other answers last."""
    names: list[str | None] = [None] if count == 1 else [f"prompt {number}" for number in range(count)]
    return names + [f"{names[i]}: versus, as the target" if names[i] else "versus, as the target" for i in contrasted]
