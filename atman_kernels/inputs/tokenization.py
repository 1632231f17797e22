"""Prompts and answers as token ids: what the tokenizer, the chat template and the model make of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels import arguments
from atman_kernels.arguments import described, shown, text_or_empty
from atman_kernels.errors import InputError
from atman_kernels.inputs.chat import as_texts, checked_messages, templated
from atman_kernels.inputs.limits import check_ids
from atman_kernels.planning.levels import Levels, split_levels
from atman_kernels.planning.units import SpanChoice, Unit, split_units

Prompt = str | Sequence[dict[str, Any]]  # a text, or chat messages
UnitChoice = str | Sequence[SpanChoice]  # a granularity, or character spans
NestedChoice = Sequence[str | Sequence[SpanChoice]]  # several of them, from coarse to fine


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as the model reads it, before there is an answer: the text, its n token ids and its units.

    Attributes:
        units: of the coarsest level, where there are several.
        finer: the units of each further level, see `split_levels`.
        levels: what the levels are called; () where units are not nested.
    """

    text: str
    ids: list[int]
    units: tuple[Unit, ...]
    finer: tuple[tuple[Unit, ...], ...] = ()
    levels: tuple[str, ...] = ()


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, or that of a processor.

    Raises:
        InputError: there is none.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer must be the model's tokenizer or processor, got {type(processor).__name__}")
    return tokenizer


def checked_text(value: Any, name: str = "prompt") -> str:
    """Raises InputError if it is no text, or but white space, of which encoders would read their special tokens."""
    return arguments.text(value, name, blank=False)


def read_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    units: UnitChoice | Levels | None,
    *,
    chat: bool,
    language: str,
) -> PromptTokens:
    """A prompt's tokens and units; errors as of `ask_all`."""
    text, encoded = encode_prompt(model, tokenizer, prompt, chat)
    ids = encoded["input_ids"]
    options: dict[str, Any] = {
        "special": special_flags(tokenizer, ids),
        "token_texts": tokenizer.convert_ids_to_tokens(ids),
        "language": language,
    }
    if isinstance(units, Levels):
        first, *finer = split_levels(text, encoded["offset_mapping"], units, **options)
        return PromptTokens(text, ids, first, tuple(finer), units.names)
    return PromptTokens(text, ids, split_units(text, encoded["offset_mapping"], units, **options))


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
    """Ids and character offsets of a text.

    Raises:
        InputError: the tokenizer does not know offsets.
    """
    check_fast(tokenizer)
    return dict(tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens))


def check_fast(tokenizer: Any) -> None:
    """Raises InputError for a tokenizer that does not know character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer must be a fast one, which knows character offsets; got {type(tokenizer).__name__}")


def special_flags(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[bool]:
    """For each id, whether it is a special token."""
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i in special for i in ids]
