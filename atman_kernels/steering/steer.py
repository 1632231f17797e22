"""`steer`: what a model answers when parts of its prompt count less, or more."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from atman_kernels.arguments import described, entries, flag, integer, of_entry
from atman_kernels.errors import InputError
from atman_kernels.hf.attention.suppression import suppressed
from atman_kernels.hf.models.eval_mode import check_loaded
from atman_kernels.hf.models.parts import is_encoder_decoder
from atman_kernels.hf.models.placement import input_device
from atman_kernels.hf.models.ranks import ranks_of
from atman_kernels.hf.models.wrapped import unwrapped
from atman_kernels.hf.scope import Scope
from atman_kernels.inputs.limits import check_ids, check_length, language_positions, room_for_answer
from atman_kernels.inputs.tokenization import Prompt, encode_prompt
from atman_kernels.steering.spans import Spans, SteeredSpan, TokenizedText, resolve, spans_by_prompt


@contextmanager
def steer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Sequence[Prompt] | Mapping[str, Any],
    spans: Spans | Sequence[Spans],
    *,
    mode: str = "log_additive",
    layers: Iterable[int] | None = None,
    chat: bool = False,
    backend: str | None = None,
) -> "Iterator[Steered]":
    """Suppress or amplify parts of a prompt in all that `model` computes inside the context.

    Args:
        model: a transformers model; it is used as it is, and is as before when the context ends.
        tokenizer: the model's, a fast one.
        prompt: a text, chat messages, or a list of such prompts, which are padded on the left; or inputs that are
            tokens already, such as a processor makes from images: {"input_ids": (B, L), …}.
        spans: the factor of each span: 0 removes it ("log_additive" mode), < 1 suppresses it, > 1 amplifies it. A
            span is a text or a compiled regular expression that occurs once, an `Occurrence` of one that occurs
            more often, characters (start, end) of `Steered.texts`, or a range of token positions (those of the
            prompt without padding; for ready inputs, of `input_ids`). A token belongs to every span with which it
            shares a character. For a list of prompts: one mapping for all, or a list with one for each.
        mode, layers, backend: see `atman_kernels.suppress`.
        chat: put text prompts into the tokenizer's chat template, each as the user's message. Spans are then looked
            for in the whole text that the template makes.

    Yields:
        a `Steered`: the inputs to call the model with, and `generate`, which gives texts.

    Raises:
        InputError: a prompt is empty, a span is missing, ambiguous, or holds no token; a factor is negative or not
            finite; overlapping spans have different factors; see also `atman_kernels.suppress`.
        UnsupportedModelError: see `atman_kernels.suppress`.

    Example:
        >>> with steer(model, tokenizer, "Anna met Bert. She saw", {"Bert": 0.0}) as steered:  # doctest: +SKIP
        ...     answers = steered.generate(max_new_tokens=8)
        ...     logits = model(**steered.inputs).logits
    """
    check_loaded(model)
    ranks = ranks_of(unwrapped(model))
    with ranks.in_step("steer"):
        steered = _prepare(model, tokenizer, prompt, spans, chat)
        ranks.agree("a steering", prompt=steered.inputs, spans=steered.factor)
    with suppressed(model, steered.factor, mode=mode, layers=layers, backend=backend) as scope, steered._inside(scope):
        yield steered


class Steered:
    """Prompts under a steering, ready for the model.

    Attributes:
        inputs: what to call the model with, on its device: `model(**inputs)`, `model.generate(**inputs)`.
        texts: the texts that were tokenized, with the chat template's additions; none for ready inputs.
        spans: for each prompt, its spans with their tokens, which count without padding.
        factor: (B, L) what the attention to each token of the padded prompts is scaled by.

    Example:
        >>> with steer(model, tokenizer, "Anna met Bert. She saw", {"Bert": 0.0}) as steered:  # doctest: +SKIP
        ...     steered.spans[0][0].unit.token_indices, steered.factor.tolist()
        ((2,), [[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: dict[str, Any],
        texts: tuple[str, ...],
        spans: tuple[tuple[SteeredSpan, ...], ...],
    ) -> None:
        self.inputs, self.texts, self.spans = inputs, texts, spans
        length = inputs["input_ids"].shape[1]
        self.factor = torch.ones(len(spans), length, dtype=torch.float32, device="cpu")
        for row, found in enumerate(spans):
            padding = int((inputs["attention_mask"][row] == 0).sum()) if texts else 0
            for span in found:
                self.factor[row, [padding + token for token in span.unit.token_indices]] = span.factor
        self._model, self._tokenizer = model, tokenizer
        self._scope: Scope | None = None  # while inside the context
        self._running, self._changed = 0, threading.Condition()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a Steered belongs to one model and one `with ak.steer(…)`: it cannot be copied or pickled")

    def generate(self, *, skip_special_tokens: bool = True, **options: Any) -> list[str]:
        """The model's answers, one text for each prompt and returned sequence, without the prompt.

        May be called in another thread, as streamers need it. Leaving the context ends such a generation after the
        token at hand, and waits for it.

        Args:
            skip_special_tokens: whether to leave marks like the end of the answer out of the texts.
            options: as of the model's `generate`: max_new_tokens, do_sample, num_beams, streamer, …. An answer ends
                with the model's positions, however many tokens are asked for.

        Raises:
            InputError: the `with ak.steer(…)` has been left, or the prompt is longer than the model's positions.
        """
        streamer = options.get("streamer")
        try:
            sequences = self._steered_sequences(options)
        except BaseException:
            if streamer is not None:
                streamer.end()  # or who reads it, in another thread, would wait for ever
            raise
        answers = sequences[:, self.inputs["input_ids"].shape[1] :]
        return list(self._tokenizer.batch_decode(answers, skip_special_tokens=skip_special_tokens))

    def _steered_sequences(self, options: dict[str, Any]) -> Tensor:
        with self._changed:
            scope = self._scope
            if scope is None:
                raise InputError("Steered.generate: the steering has ended; call it inside `with ak.steer(…)`")
            self._running += 1
        try:
            with scope.joined():
                return self._sequences(options)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _sequences(self, options: dict[str, Any]) -> Tensor:
        twice = sorted({*self.inputs, "inputs"} & options.keys())
        if twice:
            raise InputError(f"{twice[0]}: the prompts are those of the steering, {', '.join(self.inputs)} are given")
        config = self._model.generation_config
        if "pad_token_id" not in options and getattr(config, "pad_token_id", None) is None:
            options = {**options, "pad_token_id": _padding_id(self._tokenizer)}
        if options.get("stop_strings") or getattr(config, "stop_strings", None):
            options = {"tokenizer": self._tokenizer, **options}
        options = self._within_positions(options)
        if ranks_of(unwrapped(self._model)).stage is not None:  # as `suppress` asks for
            options = {"use_cache": False, **options}
        until = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), _WhenLeft(self)])
        output = self._model.generate(**self.inputs, **{**options, "stopping_criteria": until})
        return output if isinstance(output, Tensor) else output.sequences

    def _within_positions(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of `generate`, with answers that end where the model's positions do."""
        model = unwrapped(self._model)
        if is_encoder_decoder(model):
            return options
        before, most = self.inputs["input_ids"].shape[1], language_positions(model)
        check_length(before, most, "prompt has")
        wanted = options.get("max_new_tokens")
        if wanted is None:
            return options
        wanted = integer(wanted, "max_new_tokens", least=1)
        return {**options, "max_new_tokens": room_for_answer(before, most, wanted)}

    @contextmanager
    def _inside(self, scope: Scope) -> Iterator[None]:
        self._scope = scope
        try:
            yield
        finally:
            with self._changed:
                self._scope = None
                self._changed.wait_for(lambda: self._running == 0)


class _WhenLeft(StoppingCriteria):
    """Ends a generation in another thread once its `with` has been left: further tokens would be unsteered."""

    def __init__(self, steered: Steered) -> None:
        self._steered = steered

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        left = self._steered._scope is None
        return torch.full((input_ids.shape[0],), left, dtype=torch.bool, device=input_ids.device)


def _prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Any, spans: Spans | Sequence[Spans], chat: bool
) -> Steered:
    if isinstance(prompt, Mapping):
        return _prepare_inputs(model, tokenizer, prompt, spans)
    prompts, one = _listed(prompt)
    chat = flag(chat, "chat")
    tokenized = []
    for index, each in enumerate(prompts):
        with of_entry(None if one else f"prompt {index}"):
            tokenized.append(_tokenized(model, tokenizer, each, chat))
    found = []
    for index, (each, wanted) in enumerate(zip(tokenized, spans_by_prompt(spans, len(prompts)), strict=True)):
        with of_entry(None if one else f"prompt {index}"):
            found.append(resolve(wanted, each))
    inputs = _padded(tokenized, _padding_id(tokenizer))
    texts = tuple(each.text for each in tokenized)
    return Steered(model, tokenizer, {k: v.to(input_device(model)) for k, v in inputs.items()}, texts, tuple(found))


def _prepare_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Mapping[str, Any],
    spans: Spans | Sequence[Spans],
) -> Steered:
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        came = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"prompt: input_ids must be a tensor (B, L), got {came}")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"prompt: input_ids must be integers, got {ids.dtype}")
    if not any(name.startswith(("pixel", "image", "input_features")) for name in given):  # whose tokens may be any
        check_ids(model, tokenizer, ids.flatten().tolist(), "prompt")
    inputs = {k: v.to(input_device(model)) if isinstance(v, Tensor) else v for k, v in given.items()}
    mask = inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        came = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else described(mask)
        raise InputError(f"prompt: attention_mask must be a tensor of input_ids' shape {tuple(ids.shape)}, got {came}")
    found = tuple(resolve(wanted, ids.shape[1]) for wanted in spans_by_prompt(spans, ids.shape[0]))
    return Steered(model, tokenizer, inputs, (), found)


def _listed(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts, and whether a single one was given, as a text or chat messages."""
    if isinstance(prompt, str):
        return [prompt], True
    try:
        prompts = entries(prompt, "prompt", "prompts")
    except InputError:
        prompts = []
    if not prompts:
        expected = "a text, chat messages, or a list of prompts"
        raise InputError(f"prompt must be {expected}, got {described(prompt)}")
    return ([prompts], True) if isinstance(prompts[0], Mapping) else (prompts, False)


def _tokenized(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool) -> TokenizedText:
    text, encoded = encode_prompt(model, tokenizer, prompt, chat)
    return TokenizedText(text, tuple(encoded["input_ids"]), tuple(map(tuple, encoded["offset_mapping"])))


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, or any other: nothing attends to it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _padded(prompts: Sequence[TokenizedText], padding: int) -> dict[str, Tensor]:
    """Ids and mask (B, L), padded on the left, so that all answers begin at the same position."""
    length = max(len(prompt.ids) for prompt in prompts)
    rows = [length - len(prompt.ids) for prompt in prompts]
    ids = [[padding] * missing + list(prompt.ids) for missing, prompt in zip(rows, prompts, strict=True)]
    mask = [[0] * missing + [1] * (length - missing) for missing in rows]
    return {"input_ids": torch.tensor(ids, device="cpu"), "attention_mask": torch.tensor(mask, device="cpu")}
