"""Captions and answers of BLIP, which cross-attends to an image: which patches and which words they rest on.

Factors are over the states of the image, its class token first, and then over the tokens of the prompt. The target is
teacher-forced in the decoder.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atman_kernels.errors import InputError
from atman_kernels.hf.images.blip import BlipRun, answer_logprobs, answers_questions, image_states, source_states
from atman_kernels.hf.images.embedding import refusals_named
from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.encoder_inputs import EncoderInputs, read_image
from atman_kernels.inputs.limits import check_ids, check_length, positions_of, room_for_answer
from atman_kernels.inputs.objective import ForwardObjective
from atman_kernels.inputs.own_answer import check_said, generated, without_ends
from atman_kernels.inputs.request import Request
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.inputs.tokenization import checked_target_ids, checked_text, encode, special_flags
from atman_kernels.planning.units import Unit, split_units


@dataclass(frozen=True, eq=False)
class _Source:
    """What the model is given before it answers.

    Attributes:
        image: the pixels and their units.
        states: (1, S, E) what the vision encoder makes of the image.
        text: the question; how a caption begins.
        ids: token ids of the text.
        units: of image and text, over the states and then the text's tokens.
        asks: the text is a question, read by an encoder of its own.
        begun: what the decoder is given before the answer.
    """

    image: EncoderInputs
    states: Tensor
    text: str
    ids: list[int]
    units: tuple[Unit, ...]
    asks: bool
    begun: list[int]

    @property
    def question(self) -> Tensor | None:
        """(1, L) the question's ids; None where there is none."""
        return torch.tensor([self.ids], device=self.states.device) if self.asks else None

    @property
    def positions(self) -> int:
        """States of the image, and tokens that are keys: a caption's first token comes before its text, is no unit."""
        return self.image.positions + (0 if self.asks else 1) + len(self.ids)


def objective(model: Any, processor: Any, asked: Request) -> ForwardObjective:
    """What is asked of a BLIP model, with its own greedy answer if no target is given.

    Args:
        asked: whose prompt is the question, or how a caption begins, or None.

    Raises:
        InputError: an argument does not fit.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer must be the model's processor, got {type(processor).__name__}")
    source = _source(model, processor, tokenizer, asked)
    answer = _answer(model, tokenizer, source, asked)
    vision, pixels, begun = asked.common.vision, source.image.inputs["pixel_values"], source.begun
    written = torch.tensor([begun + answer[:-1]], device=input_device(model))
    rows = torch.arange(len(answer), device=input_device(model)) + len(begun) - 1
    targets = torch.tensor([answer], device=input_device(model))
    question, seen = source.question, source.states

    def values(count: int) -> Tensor:
        image = image_states(model, pixels.expand(count, -1, -1, -1)) if vision else seen.expand(count, -1, -1)
        read = None if question is None else question.expand(count, -1)
        return answer_logprobs(model, image, read, written.expand(count, -1), rows, targets.expand(count, -1))

    def embeddings() -> Tensor:
        """States of patches and embeddings of words, which have nothing in common."""
        ids = begun if question is None else source.ids
        words = model.get_input_embeddings()(torch.tensor(ids, device=input_device(model)))
        both: Tensor = torch.block_diag(seen[0].float().cpu(), words.float().cpu())
        return both

    pieces, _ = token_texts_of(tokenizer, answer)
    states = source.image.positions
    return ForwardObjective(
        prompt=source.text,
        target="".join(pieces) if asked.target is None else asked.target,
        units=source.units,
        target_tokens=tuple(pieces),
        keys=source.positions,
        row_cost=(states if vision else 0) + (len(source.ids) if source.asks else 0) + written.shape[1],
        suppressed=model,
        forward=values,
        read_embeddings=embeddings,
        run=lambda factor, **options: BlipRun(model, factor, states=states, vision=vision, **options),
        facts={"image_units": asked.common.image_units, **({"vision": True} if vision else {}), **source.image.facts},
    )


def _source(model: Any, processor: Any, tokenizer: PreTrainedTokenizerBase, asked: Request) -> _Source:
    """Reads image and text, and has the image seen."""
    asks, image_units = answers_questions(model), asked.common.image_units
    if asked.prompt is None and asks:
        raise InputError(f"prompt is missing; {type(model).__name__} answers questions about images")
    with refusals_named(model):
        image = read_image(model, model.vision_model, processor, asked.images, image_units or "image")
    units = list(image.units) if image_units is not None else []
    text = "" if asked.prompt is None else checked_text(asked.prompt)
    ids, text_units = _read(tokenizer, text, asked.units, asked.common.language, asks)
    first = image.positions + (0 if asks else 1)
    units += [replace(unit, token_indices=tuple(first + i for i in unit.token_indices)) for unit in text_units]
    if not units:
        raise InputError("units and image_units: there is no text beside the image, or neither gets a score")
    # both of its text models, decoder and reader of questions, go by one config
    check_length(len(ids), positions_of(model.text_decoder), "prompt has")
    check_ids(model.text_decoder, tokenizer, ids, "prompt")
    begun = [int(model.config.text_config.bos_token_id), *([] if asks else ids)]
    with torch.no_grad():
        states = image_states(model, image.inputs["pixel_values"])
    return _Source(image, states, text, ids, tuple(units), asks, begun)


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, source: _Source, asked: Request) -> list[int]:
    """Token ids of the target, or of the model's own greedy answer."""
    most, before = positions_of(model.text_decoder), len(source.begun)
    given = None if asked.target is None else _target(model, tokenizer, asked.target)
    check_length(before + len(given or [0]) - 1, most)
    if given is not None:
        return given
    room = room_for_answer(before, most, asked.common.max_new_tokens)
    return _own_answer(model, tokenizer, source.states, source.question, source.begun, room)


def _read(
    tokenizer: PreTrainedTokenizerBase, text: str, units: Any, language: str, asks: bool
) -> tuple[list[int], tuple[Unit, ...]]:
    """Token ids of the text, with special tokens if it is a question, and its units by their places among these."""
    if not text:
        return [], ()
    encoded = encode(tokenizer, text, add_special_tokens=asks)
    ids = encoded["input_ids"]
    if units is None:
        return ids, ()
    names = tokenizer.convert_ids_to_tokens(ids)
    special = special_flags(tokenizer, ids)
    return ids, split_units(
        text, encoded["offset_mapping"], units, special=special, token_texts=names, language=language
    )


def _target(model: Any, tokenizer: PreTrainedTokenizerBase, target: Any) -> list[int]:
    ids: list[int] = encode(tokenizer, checked_text(target, "target"), add_special_tokens=False)["input_ids"]
    return checked_target_ids(model.text_decoder, tokenizer, ids)


def _own_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    image: Tensor,
    question: Tensor | None,
    begun: list[int],
    max_new_tokens: int,
) -> list[int]:
    """Token ids of the model's own greedy answer, without its end."""
    config = model.config.text_config
    with torch.no_grad():
        answer = generated(
            model.text_decoder,
            tokenizer,
            {"input_ids": torch.tensor([begun], device=input_device(model))},
            len(begun),
            max_new_tokens,
            encoder_hidden_states=source_states(model, image, question),
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
        )
    return check_said(without_ends(answer, {config.sep_token_id, config.pad_token_id}))
