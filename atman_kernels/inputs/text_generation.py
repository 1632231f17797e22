"""A question: prompt and answer as tokens, units and factors. Everything that is known before the model runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels import arguments
from atman_kernels.arguments import described, of_entry, shown, text_or_empty
from atman_kernels.errors import InputError
from atman_kernels.hf.models.model_input import Embedded, ModelInput, WithPixels
from atman_kernels.inputs.chat import as_texts, checked_messages, templated
from atman_kernels.inputs.limits import check_ids, check_length, language_positions, room_for_answer
from atman_kernels.inputs.own_answer import end_ids, generated, without_ends
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.planning.units import Unit, split_units, target_units

Prompt = str | Sequence[dict[str, Any]]  # a text, or chat messages
UnitChoice = str | Sequence[tuple[int, int]]  # a granularity, or character spans


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt with one answer.

    Attributes:
        prompt: the text that was tokenized.
        target: the answer's text.
        ids: (n + m,) token ids of prompt and answer.
        prompt_length: n.
        units: what gets a score; token positions refer to `ids`.
        target_tokens: (m,) texts to show.
        embedded: (n + m - 1,) what the model's decoder reads where images are among the tokens.
        pictured: the same with images that are still to be seen, where they are suppressed in the vision encoder, too.
        own_logprobs: (m,) the whole model's log-probs of the answer, where they are known already.
        facts: what else a reader should know about the question, for the explanation's settings.
    """

    prompt: str
    target: str
    ids: Tensor
    prompt_length: int
    units: tuple[Unit, ...]
    target_tokens: tuple[str, ...]
    embedded: Embedded | None = None
    pictured: WithPixels | None = None
    own_logprobs: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> ModelInput:
        """(n + m - 1,) what the model reads: the last answer token is only predicted."""
        return self.ids[:-1] if self.embedded is None else self.embedded

    @property
    def whole(self) -> ModelInput | WithPixels:
        """What the model reads where whole rows are recomputed."""
        return self.inputs if self.pictured is None else self.pictured

    @property
    def cost(self) -> int:
        """Tokens of a whole row through the layers of the model, patches through those of its vision encoder."""
        return len(self.inputs) + (0 if self.pictured is None else self.pictured.owners.numel())

    @property
    def rows(self) -> Tensor:
        """(m,) rows whose next token is an answer token."""
        return torch.arange(self.prompt_length - 1, len(self.ids) - 1, device=self.ids.device)

    @property
    def targets(self) -> Tensor:
        """(m,) the answer's token ids."""
        return self.ids[self.prompt_length :]


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the model reads it, before there is an answer: the text, its n token ids and its units."""

    text: str
    ids: list[int]
    units: tuple[Unit, ...]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    target: str | None,
    units: UnitChoice | None,
    **options: Any,
) -> Question:
    """One question; see `ask_all`."""
    return ask_all(model, tokenizer, [(prompt, target, units)], **options)[0]


def ask_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entries: Iterable[tuple[Prompt, str | None, UnitChoice | None]],
    *,
    include_target: bool,
    chat: bool,
    max_new_tokens: int,
    language: str,
    names: Sequence[str | None] | None = None,
) -> list[Question]:
    """Tokenize, let the model answer where no target is given, and find the units.

    Args:
        entries: (prompt, target, units) of each question. All of them are read, and refused if they do not fit, before
            the model answers any.
        names: of the questions, for errors; by default they are numbered where there are several.

    Raises:
        InputError: an empty prompt or target, units that do not fit, a sequence longer than the model's positions,
            tokens that the model does not know, a tokenizer without character offsets. Of several questions it says
            which.
    """
    entries = list(entries)
    if names is None:
        names = [None] if len(entries) == 1 else [f"prompt {number}" for number in range(len(entries))]
    read, most = [], language_positions(model)
    for number, (prompt, target, units) in enumerate(entries):
        with of_entry(names[number]):
            tokens = read_prompt(model, tokenizer, prompt, units, chat=chat, language=language)
            answer = None if target is None else target_ids(model, tokenizer, target)
            check_length(len(tokens.ids) + len(answer or [0]) - 1, most)
            read.append((tokens, answer, target))
    return [
        _question(
            model,
            tokenizer,
            tokens,
            _own_answer(model, tokenizer, tokens.ids, most, max_new_tokens) if answer is None else answer,
            target,
            include_target,
        )
        for tokens, answer, target in read
    ]


def _question(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptTokens,
    answer: list[int],
    target: str | None,
    include_target: bool,
) -> Question:
    pieces, offsets = token_texts_of(tokenizer, answer)
    target = tokenizer.decode(answer) if target is None else target
    found = prompt.units
    if include_target and len(answer) > 1:
        found += target_units("".join(pieces), offsets, len(prompt.ids), token_texts=pieces)
        target = "".join(pieces)
    ids = torch.tensor(prompt.ids + answer, device=model.device)
    return Question(prompt.text, target, ids, len(prompt.ids), found, tuple(pieces))


def read_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    units: UnitChoice | None,
    *,
    chat: bool,
    language: str,
) -> PromptTokens:
    """A prompt's tokens and units; errors as of `ask_all`."""
    text, encoded = encode_prompt(model, tokenizer, prompt, chat)
    ids = encoded["input_ids"]
    found = split_units(
        text,
        encoded["offset_mapping"],
        units,
        special=special_flags(tokenizer, ids),
        token_texts=tokenizer.convert_ids_to_tokens(ids),
        language=language,
    )
    return PromptTokens(text, ids, found)


def encode_prompt(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool
) -> tuple[str, dict[str, Any]]:
    """The text that is tokenized, and what the tokenizer makes of it, with offsets; errors as of `ask_all`."""
    text, is_template = prompt_text(tokenizer, prompt, chat)
    encoded = encode(tokenizer, text, add_special_tokens=not is_template)
    if not encoded["input_ids"]:
        raise InputError(f"prompt has no tokens; {type(tokenizer).__name__} makes none of {shown(text)}")
    check_ids(model, tokenizer, encoded["input_ids"], "prompt")
    return text, encoded


def target_ids(model: Any, tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Token ids of an answer that continues a prompt; errors as of `ask_all`."""
    text = text_or_empty(target, "target", expected="a text or None")
    ids = encode(tokenizer, text, add_special_tokens=False)["input_ids"] if text else []
    return checked_target_ids(model, tokenizer, ids)


def checked_target_ids(model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Raises InputError if an answer has no tokens, or such as the model does not know."""
    if not ids:
        raise InputError("target is empty; give the answer to explain, or None to let the model answer")
    check_ids(model, tokenizer, ids, "target")
    return ids


def _own_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    most: int | None,
    max_new_tokens: int,
) -> list[int]:
    ids = torch.tensor([prompt_ids], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = len(prompt_ids)
    answer = generated(model, tokenizer, inputs, length, room_for_answer(length, most, max_new_tokens))
    return without_ends(answer, end_ids(model, tokenizer))


def checked_prompt(prompt: Any) -> Prompt:
    """A prompt as a text or a list of chat messages.

    Raises:
        InputError: it is neither, is empty, or a message is of another form.
    """
    if isinstance(prompt, str):
        return arguments.text(prompt, "prompt")
    expected = "a text or a list of chat messages"
    if isinstance(prompt, Mapping):
        hint = "; a message goes into a list" if "content" in prompt else ""
        raise InputError(f"prompt must be {expected}, got {described(prompt)}{hint}")
    try:
        listed = arguments.entries(prompt, "prompt", "chat messages")
    except InputError:
        raise InputError(f"prompt must be {expected}, got {described(prompt)}") from None
    if listed and all(isinstance(entry, str) for entry in listed):
        raise InputError(f"prompt must be {expected}, got {described(listed)}; several prompts go to explain_batch")
    return checked_messages(listed)


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool) -> tuple[str, bool]:
    """The text to tokenize, and whether a chat template made it (its special tokens are written out then)."""
    prompt = checked_prompt(prompt)
    if isinstance(prompt, str):
        if not chat:
            return prompt, False
        prompt = [{"role": "user", "content": prompt}]
    text = templated(tokenizer, as_texts(list(prompt)))
    if not text:
        raise InputError("prompt is empty: the tokenizer's chat template makes no text of it")
    return text, True


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> dict[str, Any]:
    check_fast(tokenizer)
    return dict(tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens))


def check_fast(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer must be a fast one, which knows character offsets; got {type(tokenizer).__name__}")


def special_flags(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[bool]:
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i in special for i in ids]
