"""A question: prompt and answer as tokens, units and factors. Everything that is known before the model runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels.errors import InputError
from atman_kernels.explain.token_texts import token_texts_of
from atman_kernels.hf.interface import decoder_of
from atman_kernels.hf.packability import grows_with_length
from atman_kernels.hf.sequence import Embedded, Pictured
from atman_kernels.hf.sequence import Sequence as TokenSequence
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
    pictured: Pictured | None = None
    own_logprobs: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> TokenSequence:
        """(n + m - 1,) what the model reads: the last answer token is only predicted."""
        return self.ids[:-1] if self.embedded is None else self.embedded

    @property
    def whole(self) -> TokenSequence | Pictured:
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


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    target: str | None,
    units: UnitChoice,
    *,
    include_target: bool,
    chat: bool,
    max_new_tokens: int,
    language: str,
) -> Question:
    """Tokenize, let the model answer if no target is given, and find the units.

    Raises:
        InputError: an empty prompt or target, units that do not fit, a sequence longer than the model's positions,
            a tokenizer without character offsets.
    """
    text, is_template = prompt_text(tokenizer, prompt, chat)
    if not text:
        raise InputError("prompt is empty; expected a text with at least one character")
    encoded = encode(tokenizer, text, add_special_tokens=not is_template)
    prompt_ids = encoded["input_ids"]
    check_length(model, len(prompt_ids) + 1)
    if target is None:
        ids = torch.tensor([prompt_ids], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        target_ids = greedy_answer(model, tokenizer, inputs, max_new_tokens)
        target = tokenizer.decode(target_ids)
    else:
        target_ids = encode(tokenizer, target, add_special_tokens=False)["input_ids"] if target else []
        if not target_ids:
            raise InputError("target is empty; give the answer to explain, or None to let the model answer")
    check_length(model, len(prompt_ids) + len(target_ids) - 1)
    pieces, offsets = token_texts_of(tokenizer, target_ids)
    found = split_units(
        text,
        encoded["offset_mapping"],
        units,
        special=special_flags(tokenizer, prompt_ids),
        token_texts=tokenizer.convert_ids_to_tokens(prompt_ids),
        language=language,
    )
    if include_target and len(target_ids) > 1:
        found += target_units("".join(pieces), offsets, len(prompt_ids), token_texts=pieces)
        target = "".join(pieces)
    ids = torch.tensor(prompt_ids + list(target_ids), device=model.device)
    return Question(text, target, ids, len(prompt_ids), found, tuple(pieces))


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool) -> tuple[str, bool]:
    """The text to tokenize, and whether a chat template made it (its special tokens are written out then)."""
    if isinstance(prompt, str) and not chat:
        return prompt, False
    if not isinstance(prompt, str) and not (isinstance(prompt, Sequence) and all(isinstance(m, dict) for m in prompt)):
        raise InputError(f"prompt must be a text or a list of chat messages, got {type(prompt).__name__}")
    if not prompt:
        raise InputError("prompt is empty; expected a text with at least one character")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("chat: this tokenizer has no chat template; pass the prompt as one text, without chat")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text), True


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> dict[str, Any]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer must be a fast one, which knows character offsets; got {type(tokenizer).__name__}")
    return dict(tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens))


def special_flags(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[bool]:
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i in special for i in ids]


def greedy_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Tensor], max_new_tokens: int
) -> list[int]:
    """The model's own greedy answer to one prompt, without the end marks."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    ends = {tokenizer.eos_token_id, *_as_list(getattr(model.generation_config, "eos_token_id", None))} - {None}
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0),
    )
    answer = output[0, inputs["input_ids"].shape[1] :].tolist()
    while answer and answer[-1] in ends:
        answer.pop()
    if not answer:
        raise InputError("target: the model answers this prompt with nothing; give the target to explain")
    return answer


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def check_length(model: PreTrainedModel, length: int) -> None:
    most = getattr(decoder_of(model).config, "max_position_embeddings", None)
    if most is not None and length > most and not grows_with_length(model):
        raise InputError(f"prompt and target have {length} tokens, but the model has {most} positions")
