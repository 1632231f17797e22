"""Causal language models: prompt and answer are one sequence of tokens, whose variants can be packed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels.arguments import of_entry
from atman_kernels.hf.forward.base import own_logprobs
from atman_kernels.hf.forward.full_rows import full_row_logprobs
from atman_kernels.hf.models.model_input import Embedded, ModelInput, WithPixels
from atman_kernels.hf.models.parts import text_stack
from atman_kernels.hf.models.placement import input_device
from atman_kernels.hf.models.ranks import ranks_of
from atman_kernels.inputs.limits import check_length, language_positions, room_for_answer
from atman_kernels.inputs.objective import Objective
from atman_kernels.inputs.own_answer import check_said, end_ids, generated, without_ends
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.inputs.tokenization import Prompt, PromptTokens, UnitChoice, read_prompt, target_ids
from atman_kernels.planning.levels import Levels
from atman_kernels.planning.units import Unit, target_units


@dataclass(frozen=True, eq=False, kw_only=True)
class CausalObjective(Objective):
    """One prompt with one answer, as one sequence of n + m tokens. Its values are the answer's log-probabilities.

    Attributes:
        ids: (n + m,) token ids of prompt and answer.
        prompt_length: n.
        finer: of nested units, see `PromptTokens`.
        embedded: (n + m - 1,) what the model's decoder reads where images are among the tokens.
        with_pixels: the same with images still to be seen, where they are suppressed in the vision encoder, too.
    """

    ids: Tensor
    prompt_length: int
    finer: tuple[tuple[Unit, ...], ...] = ()
    embedded: Embedded | None = None
    with_pixels: WithPixels | None = None

    @property
    def inputs(self) -> ModelInput:
        """(n + m - 1,) what the model reads: the last answer token is only predicted."""
        return self.ids[:-1] if self.embedded is None else self.embedded

    @property
    def rows(self) -> Tensor:
        """(m,) rows whose next token is an answer token."""
        return torch.arange(self.prompt_length - 1, len(self.ids) - 1, device=self.ids.device)

    @property
    def targets(self) -> Tensor:
        """(m,) the answer's token ids."""
        return self.ids[self.prompt_length :]

    @property
    def positions(self) -> int:
        return len(self.inputs)

    @property
    def cost(self) -> int:
        """Tokens of a full row through the layers of the model, patches through those of its vision encoder."""
        return self.positions + (0 if self.with_pixels is None else self.with_pixels.owners.numel())

    @property
    def sequence(self) -> "CausalObjective | None":
        return self if self.with_pixels is None else None

    def values_as_it_is(self, model: PreTrainedModel) -> Tensor:
        return own_logprobs(model, self.inputs, self.rows, self.targets)

    def values(
        self, model: PreTrainedModel, factors: Tensor | None, *, mode: str, layers: tuple[int, ...] | None
    ) -> Tensor:
        if factors is None:
            factors = torch.ones(1, self.positions, device=input_device(model), dtype=torch.float32)
        sequence = self.inputs if self.with_pixels is None else self.with_pixels
        return full_row_logprobs(model, sequence, factors, self.rows, self.targets, mode=mode, layers=layers)

    def embeddings(self, model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            inputs = self.inputs
            if isinstance(inputs, Embedded):
                return inputs.embeddings.float().cpu()
            ranks = ranks_of(model)
            with ranks.forward():
                found = model.get_input_embeddings()(inputs)
            if ranks.stage is not None and not ranks.stage.pp_is_first_stage:  # the others have none
                found = torch.empty(
                    len(inputs), text_stack(model).config.hidden_size, dtype=torch.float32, device="cpu"
                )
            return ranks.shared(found.float().cpu(), of_the_first=True)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    target: str | None,
    units: UnitChoice | Levels | None,
    **options: Any,
) -> CausalObjective:
    """One objective; see `ask_all`."""
    return ask_all(model, tokenizer, [(prompt, target, units)], **options)[0]


def ask_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    entries: Iterable[tuple[Prompt, str | None, UnitChoice | Levels | None]],
    *,
    include_target: bool,
    chat: bool,
    max_new_tokens: int,
    language: str,
    names: Sequence[str | None] | None = None,
) -> list[CausalObjective]:
    """Tokenize, let the model answer where no target is given, and find the units.

    Args:
        entries: (prompt, target, units) of each objective. All of them are read, and refused if they do not fit,
            before the model answers any.
        names: of the entries, for errors; by default they are numbered where there are several.

    Raises:
        InputError: an empty prompt or target, units that do not fit, a sequence longer than the model's positions,
            tokens that the model does not know, a tokenizer without character offsets. Of several entries it says
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
        _objective(
            model,
            tokenizer,
            tokens,
            _own_answer(model, tokenizer, tokens.ids, most, max_new_tokens) if answer is None else answer,
            target,
            include_target,
        )
        for tokens, answer, target in read
    ]


def _objective(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptTokens,
    answer: list[int],
    target: str | None,
    include_target: bool,
) -> CausalObjective:
    pieces, offsets = token_texts_of(tokenizer, answer)
    target = tokenizer.decode(answer) if target is None else target
    units = prompt.units
    if include_target and len(answer) > 1:
        units += target_units("".join(pieces), offsets, len(prompt.ids), token_texts=pieces)
        target = "".join(pieces)
    return CausalObjective(
        prompt=prompt.text,
        target=target,
        units=units,
        target_tokens=tuple(pieces),
        ids=torch.tensor(prompt.ids + answer, device=input_device(model)),
        prompt_length=len(prompt.ids),
        finer=prompt.finer,
        levels=prompt.levels,
    )


def _own_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    most: int | None,
    max_new_tokens: int,
) -> list[int]:
    ids = torch.tensor([prompt_ids], device=input_device(model))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = len(prompt_ids)
    answer = generated(model, tokenizer, inputs, length, room_for_answer(length, most, max_new_tokens))
    return check_said(without_ends(answer, end_ids(model, tokenizer)))
