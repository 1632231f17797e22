"""captum's language model attributions on suppressed attention: its inputs, its methods, its results.

>>> from captum.attr import ShapleyValueSampling                                         # doctest: +SKIP
>>> attribution = AtManAttribution(model, tokenizer)                                     # doctest: +SKIP
>>> attribution.attribute("The capital of France is", " Paris").plot_token_attr()        # doctest: +SKIP
>>> inp = SuppressedTextInput("The capital of France is", attribution.explainer)         # doctest: +SKIP
>>> shapley = SuppressedLLMAttribution(ShapleyValueSampling(model), tokenizer)           # doctest: +SKIP
>>> shapley.attribute(inp, " Paris").seq_attr                                            # doctest: +SKIP
"""

import copy
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum.attr import (  # type: ignore[import-untyped, unused-ignore]
    FeatureAblation,
    LLMAttribution,
    LLMAttributionResult,
    TextTemplateInput,
    TextTokenInput,
)
from captum.attr._core.llm_attr import DEFAULT_GEN_ARGS  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels.adapters.captum_features import features_of
from atman_kernels.adapters.token_question import run_rows, suppressing, token_question, unit_factors
from atman_kernels.arguments import count_or_none, integer, text_or_empty
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.explain.explainer import Explainer
from atman_kernels.hf.models.eval_mode import evaluating
from atman_kernels.hf.models.parts import decoder_of
from atman_kernels.hf.models.placement import input_device
from atman_kernels.hf.models.wrapped import unwrapped
from atman_kernels.inputs.limits import check_ids, check_length, language_positions, room_for_answer
from atman_kernels.inputs.own_answer import generated
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.inputs.tokenization import UnitChoice

SUPPRESSION = "atman_suppression"  # the keyword under which a forward of the model carries its row of factors
# captum's performance options: accepted, ignored
IGNORED_OPTIONS = {"num_trials", "use_cached_outputs", "forward_in_tokens", "perturbations_per_eval", "show_progress"}
ROWS_PER_CALL = 1024  # perturbations that captum hands over at once; packs have their own limit, the token budget


class SuppressedTextInput(TextTokenInput):
    """A text whose features captum turns off by suppressing the attention to them; the tokens stay as they are.

    For captum's `LLMAttribution` with any of its methods, and for `SuppressedLLMAttribution`, which is faster. Where
    several features are off, a token has the factor of the strongest suppression among them.

    Args:
        source: a text; or a captum input whose features are pieces of its text: a `TextTokenInput` (`skip_tokens`
            included) or a `TextTemplateInput` (`mask` included), with captum's default baselines: no token is replaced.
        explainer: the model, its tokenizer, and how to suppress.
        units: of a text: "token" | "word" | "sentence" | "paragraph", or (start, end) character spans.
        language: of the text, for sentence splitting.
        recompute: how many of the last prompt tokens feel a suppression, see `Explainer.explain`; with
            `SuppressedLLMAttribution` and `AtManAttribution` only.

    Raises:
        InputError: another kind of input, other baselines, a feature that is no piece of the text or holds no token.

    Example:
        >>> inp = SuppressedTextInput("The capital of France is", Explainer(model, tokenizer))   # doctest: +SKIP
        >>> LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, " Paris").seq_attr  # doctest: +SKIP
    """

    def __init__(
        self,
        source: str | TextTokenInput | TextTemplateInput,
        explainer: Explainer,
        units: UnitChoice | None = None,
        *,
        language: str = "en",
        recompute: int | None = None,
    ) -> None:
        if explainer.task != "text-generation":
            name = type(explainer.model).__name__
            raise UnsupportedModelError(f"explainer: {name} is no causal language model, which captum's texts are for")
        self.explainer = explainer
        self.recompute = count_or_none(recompute, "recompute")
        self.tokenizer = explainer.tokenizer
        features = features_of(source, explainer.tokenizer, units, language)
        self.units, self.values, self._spread = features.units, features.values, features.spread
        self.inp_tensor = features.ids.to(input_device(explainer.model))
        self.n_itp_features = len(self.units)
        self.itp_tensor = torch.ones(1, self.n_itp_features, dtype=torch.float32, device="cpu")
        self.itp_mask = self.skip_tokens = None
        self.baselines = 0
        self.question: CausalObjective | None = None
        self.answers: _Answers | None = None
        self._hook: Any = None
        self._arriving: _Suppression | None = None

    def asking(self, target_ids: Tensor) -> "SuppressedTextInput":
        """The same input with its answer (m,): `question`, and `unit_factors` (n_units, n + m - 1) of its tokens."""
        ids = torch.cat([self.inp_tensor[0], target_ids.to(self.inp_tensor.device)])
        asked = copy.copy(self)
        asked.question = token_question(self.explainer, ids, self.inp_tensor.shape[1], self.units)
        asked.unit_factors = unit_factors(self.explainer, asked.question)
        return asked

    def checked(self, presence: Tensor) -> Tensor:
        """Presences (n_rows, n_features) as booleans on the CPU.

        Raises:
            InputError: one of them is neither 0 nor 1.
        """
        present = presence.cpu()
        if present.shape[1:] != (self.n_itp_features,) or not bool(((present == 0) | (present == 1)).all()):
            raise InputError("baselines must be 0, captum's default: a feature is there (1) or suppressed (0)")
        return present == 1

    def factors(self, presence: Tensor) -> Tensor:
        """(n_rows, n + m - 1) factors for presences (n_rows, n_features) of 0 and 1, once the answer is known."""
        present = self.checked(presence)
        strongest = torch.amin if self.explainer.factor <= 1 else torch.amax
        rows = torch.ones(len(present), self.unit_factors.shape[1], dtype=torch.float32, device="cpu")
        for row, absent in zip(rows, ~present, strict=True):
            if absent.any():
                row.copy_(strongest(self.unit_factors[absent], dim=0))
        return rows

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Any:
        """Token ids (1, n); with a presence (1, n_features) what the model's forward takes to suppress the rest."""
        if perturbed_tensor is None:
            return self.inp_tensor
        if len(perturbed_tensor) != 1:
            raise InputError("perturbations_per_eval must be 1 with LLMAttribution; SuppressedLLMAttribution batches")
        if self.recompute is not None:
            raise InputError(
                f"recompute must be None with LLMAttribution, which recomputes everything, got {self.recompute}; "
                "SuppressedLLMAttribution keeps what comes before"
            )
        model = self.explainer.model
        previous, self._arriving = self._arriving, None
        if previous is not None and not previous.arrived:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not hand keyword arguments on to its layers, so that nothing was "
                "suppressed; use SuppressedLLMAttribution"
            )
        if self._hook is None:
            self._hook = decoder_of(model).register_forward_pre_hook(_suppress_forward, with_kwargs=True)
            weakref.finalize(self, self._hook.remove)
        self._arriving = _Suppression(self, perturbed_tensor)
        return {"input_ids": self.inp_tensor, SUPPRESSION: self._arriving}

    def format_attr(self, itp_attr: Tensor) -> Tensor:
        """(…, n_units) as (…, n_values): values that share a feature of a template share its score."""
        return itp_attr if self._spread is None else itp_attr[..., self._spread]


class SuppressedLLMAttribution(LLMAttribution):
    """captum's `LLMAttribution` for a `SuppressedTextInput`, with all of a method's perturbations in one packed run.

    Takes what `LLMAttribution` takes and gives what it gives. Equal perturbations are computed once: exact
    `ShapleyValues` of n features take 2ⁿ of them. captum's performance options: accepted, ignored.

    Args:
        attr_method: captum's FeatureAblation, ShapleyValueSampling, ShapleyValues, KernelShap or Lime, of the model
            that the input's explainer has.
        tokenizer: its tokenizer.
        attr_target: "log_prob" | "prob".

    Example:
        >>> from captum.attr import ShapleyValueSampling                                    # doctest: +SKIP
        >>> inp = SuppressedTextInput("The capital of France is", explainer, "word")        # doctest: +SKIP
        >>> shapley = SuppressedLLMAttribution(ShapleyValueSampling(model), tokenizer)      # doctest: +SKIP
        >>> shapley.attribute(inp, " Paris").seq_attr                                       # doctest: +SKIP
    """

    def attribute(
        self,
        inp: SuppressedTextInput,
        target: str | Tensor | None = None,
        num_trials: int = 1,
        gen_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LLMAttributionResult:
        """As captum's. The method runs twice: first only to see what it asks for, then with the answers.

        Raises:
            InputError: another input, one of another model, or an empty target.
        """
        asked = self._asked(inp, target, gen_args)
        assert asked.question is not None
        asked.answers = answers = _Answers(asked)
        run = partial(super().attribute, asked, asked.question.targets, num_trials=num_trials)
        kwargs.setdefault("perturbations_per_eval", ROWS_PER_CALL)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # the same samples again
            run(**kwargs | {"show_progress": False})
        answers.collecting = False
        result = run(**kwargs)
        result.inp = inp
        return result

    def _asked(self, inp: Any, target: Any, gen_args: dict[str, Any] | None) -> SuppressedTextInput:
        if not isinstance(inp, SuppressedTextInput):
            raise InputError(f"inp must be a SuppressedTextInput, got {type(inp).__name__}")
        if inp.explainer.model is not unwrapped(self.model):
            raise InputError("inp belongs to an explainer of another model than the attribution method")
        if target is not None and not isinstance(target, str | Tensor):
            raise InputError(f"target must be a text, token ids or None, got {type(target).__name__}")
        if target is not None and gen_args is not None:
            raise InputError("gen_args must be None where a target is given")
        if target is None:
            ids = self._own_answer(inp, gen_args)
        else:
            if isinstance(target, str):
                target = text_or_empty(target, "target")
            ids = self._get_target_tokens(inp, target)
        if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point():
            raise InputError(f"target must have at least one token, in one dimension; got shape {tuple(ids.shape)}")
        return inp.asking(ids)

    def _own_answer(self, inp: SuppressedTextInput, gen_args: dict[str, Any] | None) -> Tensor:
        """(m,) ids of what the model answers, as captum asks for it, and within its positions."""
        options, model = dict(gen_args or DEFAULT_GEN_ARGS), inp.explainer.model
        given = self._format_model_input(inp.to_model_input())
        before, most = given["input_ids"].shape[1], language_positions(model)
        check_length(before, most, "inp has")
        check_ids(model, inp.tokenizer, given["input_ids"][0].tolist(), "inp")
        if "max_new_tokens" not in options:  # transformers' max_length counts the prompt, and is 20 by default
            options["max_new_tokens"] = integer(options.pop("max_length", 20), "gen_args['max_length']") - before
        wanted = integer(options.pop("max_new_tokens"), "gen_args['max_new_tokens']", least=1)
        with evaluating(model):
            room = room_for_answer(before, most, wanted)
            return torch.tensor(generated(model, inp.tokenizer, given, before, room, **options), device="cpu")

    def _forward_func(self, perturbed_tensor: Tensor, inp: SuppressedTextInput, *unused: Any, **options: Any) -> Tensor:
        """(n_rows, 1 + m), the whole answer's and each token's, or (n_rows,) for methods without token scores."""
        # captum repeats the target's ids for every row; the input has its own
        assert inp.answers is not None
        logprobs = inp.answers.of(perturbed_tensor)
        total = logprobs.sum(dim=1, keepdim=True)
        found = torch.cat([total, logprobs], dim=1) if self.include_per_token_attr else total[:, 0]
        return (found if self.attr_target == "log_prob" else found.exp()).to(perturbed_tensor.device)


class AtManAttribution(SuppressedLLMAttribution):
    """AtMan with captum's inputs and results: how much each feature is worth to each token of the answer.

    `AtManAttribution(model, tokenizer)` stands where `LLMAttribution(FeatureAblation(model), tokenizer)` stood. A
    score is the log-probability of a target token minus what is left of it with the feature suppressed, in nats:
    positive = important, as in captum.

    Args:
        model: a transformers causal language model.
        tokenizer: its (fast) tokenizer.
        **settings: mode, factor, similarity_threshold, layers, token_budget, progress: see `atman_kernels.Explainer`.

    Raises:
        InputError: an argument does not fit.
        UnsupportedModelError: the model's attention cannot be reached.

    Example:
        >>> found = AtManAttribution(model, tokenizer).attribute("The capital of France is", " Paris")  # doctest: +SKIP
        >>> found.plot_token_attr()                                                         # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        self.explainer = Explainer(model, tokenizer, **settings)
        super().__init__(FeatureAblation(self.explainer.model), tokenizer)

    def attribute(  # type: ignore[override]
        self,
        inp: str | TextTokenInput | TextTemplateInput | SuppressedTextInput,
        target: str | Tensor | None = None,
        *,
        units: UnitChoice | None = None,
        recompute: int | None = None,
        gen_args: dict[str, Any] | None = None,
        **ignored: Any,
    ) -> LLMAttributionResult:
        """Scores of every feature for every token of the answer.

        Args:
            inp: a text, or an input of captum's that `SuppressedTextInput` takes, or such an input of this explainer.
            target: the answer, its token ids (m,), or None to let the model answer first.
            units, recompute: of a text, as in `SuppressedTextInput`.
            gen_args: for the model's own answer, as in captum.
            ignored: captum's performance options (`forward_in_tokens`, …): accepted, ignored.

        Returns:
            `LLMAttributionResult`: seq_attr (n_features,), token_attr (m, n_features), output_probs (m,).

        Raises:
            InputError: an argument does not fit; UnsupportedModelError: the model cannot be explained.
        """
        unknown = sorted(set(ignored) - IGNORED_OPTIONS)
        if unknown:
            raise InputError(f"{unknown[0]} is no argument of AtManAttribution.attribute")
        if isinstance(inp, SuppressedTextInput):
            given = inp
            if units is not None or recompute is not None or given.explainer is not self.explainer:
                raise InputError(
                    "inp brings its own units, recompute and explainer; it must be this attribution's `explainer`"
                )
        else:
            given = SuppressedTextInput(inp, self.explainer, units, recompute=recompute)
        asked = self._asked(given, target, gen_args)
        assert asked.question is not None
        outcome = run_rows(self.explainer, [asked.question], [asked.unit_factors], asked.recompute)
        scores = given.format_attr((outcome.unperturbed[0] - outcome.perturbed[0]).T)  # (m, n_features)
        return LLMAttributionResult(
            input_tokens=given.values,
            output_tokens=_shown(self.tokenizer, asked.question.targets.tolist()),
            seq_attr=scores.sum(dim=0),
            token_attr=scores,
            output_probs=outcome.unperturbed[0].exp(),
            inp=given if isinstance(inp, str) else inp,
        )


class _Answers:
    """Log-probs of an input's answer for presences of its features; equal ones are computed once, all in one run.

    While `collecting`, presences are recorded only. A presence that was not recorded is computed when asked for.
    """

    def __init__(self, inp: SuppressedTextInput) -> None:
        self.inp = inp
        self.collecting = True
        self._presences: dict[bytes, Tensor] = {}
        self._logprobs: dict[bytes, Tensor] = {}

    def of(self, presence: Tensor) -> Tensor:
        """(n_rows, m) for presences (n_rows, n_features); zeros while collecting."""
        present = self.inp.checked(presence)
        keys = [row.numpy().tobytes() for row in present]
        self._presences |= dict(zip(keys, present, strict=True))
        if self.collecting:
            assert self.inp.question is not None
            return torch.zeros(len(keys), len(self.inp.question.targets), dtype=torch.float32, device="cpu")
        if any(key not in self._logprobs for key in keys):
            self._run([key for key in self._presences if key not in self._logprobs])
        return torch.stack([self._logprobs[key] for key in keys])

    def _run(self, keys: list[bytes]) -> None:
        assert self.inp.question is not None
        rows = self.inp.factors(torch.stack([self._presences[key] for key in keys]))
        outcome = run_rows(self.inp.explainer, [self.inp.question], [rows], self.inp.recompute)
        self._logprobs |= dict(zip(keys, outcome.perturbed[0], strict=True))


def _shown(tokenizer: Any, ids: list[int]) -> list[str]:
    """Tokens as captum shows them: each token of one character shows it, from the second on with "[OVERLAP]"."""
    texts, _ = token_texts_of(tokenizer, ids)
    shown = []
    for at, text in enumerate(texts):
        whole = next(filter(None, texts[at:]), text)  # the last token of a character has its text
        overlaps = at > 0 and not texts[at - 1]
        shown.append(whole.replace("\n", "\\n").strip() + (" [OVERLAP]" if overlaps else ""))
    return shown


# Suppression in the forwards of captum's own LLMAttribution ----------------------------------------------------------


@dataclass
class _Suppression:
    """A presence (1, n_features) on its way through captum to the model's layers."""

    inp: SuppressedTextInput
    presence: Tensor
    arrived: bool = False

    def factors(self, ids: Tensor) -> Tensor:
        """(1, L) for the ids (L,) of a forward, which begin with the prompt."""
        answer = ids[self.inp.inp_tensor.shape[1] :]
        return self.inp.asking(torch.cat([answer, ids[-1:]])).factors(self.presence)  # any next token will do


def _suppress_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: suppresses a forward that carries a `_Suppression`, and no other."""
    suppression = kwargs.get(SUPPRESSION)
    if suppression is None:
        return None
    suppression.arrived = True
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise InputError(
            "use_cached_outputs must be False, or forward_in_tokens: captum's cached path gives wrong log-probs with "
            "the transformers versions that this package needs"
        )
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    stack = ExitStack()
    stack.enter_context(suppressing(suppression.inp.explainer, suppression.factors(ids[0])))

    def leave(*_: Any) -> None:
        handle.remove()
        stack.close()

    handle = decoder.register_forward_hook(leave, always_call=True)
    return args, {name: value for name, value in kwargs.items() if name != SUPPRESSION}
