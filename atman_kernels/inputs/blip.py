"""Captions and answers of BLIP, which attends across to an image: which patches and which words they rest on.

Factors are over the states of the image, its class token first, and then over the tokens of the prompt. The target is
teacher-forced in the decoder.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atman_kernels.errors import InputError
from atman_kernels.hf.images.blip import BlipRun, answer_logprobs, answers_questions, image_states, source_states
from atman_kernels.hf.images.embedding import refusals_named
from atman_kernels.inputs.encoder_inputs import read_image
from atman_kernels.inputs.image_places import ImageUnitChoice
from atman_kernels.inputs.limits import check_ids, check_length, positions_of, room_for_answer
from atman_kernels.inputs.objective import ForwardObjective
from atman_kernels.inputs.own_answer import generated, without_ends
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.inputs.tokenization import checked_target_ids, checked_text, encode, special_flags
from atman_kernels.planning.units import Unit, split_units


def objective(
    model: Any,
    processor: Any,
    prompt: Any,
    images: Any,
    target: Any,
    units: Any,
    image_units: ImageUnitChoice | None,
    *,
    vision: bool,
    max_new_tokens: int,
    language: str,
) -> ForwardObjective:
    """What is asked of a BLIP model, with its own greedy answer if no target is given.

    Args:
        prompt: the question; how a caption begins, or None.
        units, image_units: of text and image, as in `Explainer.explain`.
        vision: patches are suppressed in the vision encoder, too.

    Raises:
        InputError: an argument does not fit.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer must be the model's processor, got {type(processor).__name__}")
    asks = answers_questions(model)
    if prompt is None and asks:
        raise InputError(f"prompt is missing; {type(model).__name__} answers questions about images")
    with refusals_named(model):
        read = read_image(model, model.vision_model, processor, images, image_units or "image")
    found = list(read.units) if image_units is not None else []
    text = "" if prompt is None else checked_text(prompt)
    ids, text_units = _read(tokenizer, text, units, language, asks)
    start = [int(model.config.text_config.bos_token_id)]
    question = torch.tensor([ids], device=model.device) if asks else None
    begun = start if asks else start + ids
    # a caption's first token comes before its text, and is no unit
    first = read.positions + (0 if asks else 1)
    found += [replace(unit, token_indices=tuple(first + i for i in unit.token_indices)) for unit in text_units]
    if not found:
        raise InputError("units and image_units: there is no text beside the image, or neither gets a score")
    # both of its text models, decoder and reader of questions, go by one config
    most = positions_of(model.text_decoder)
    check_length(len(ids), most, "prompt has")
    check_ids(model.text_decoder, tokenizer, ids, "prompt")
    given = None
    if target is not None:
        given = _target(model, tokenizer, target)
    check_length(len(begun) + len(given or [0]) - 1, most)
    pixels = read.inputs["pixel_values"]
    with torch.inference_mode():
        seen = image_states(model, pixels)
    if given is None:
        room = room_for_answer(len(begun), most, max_new_tokens)
        answer = _own_answer(model, tokenizer, seen, question, begun, room)
    else:
        answer = given
    written = torch.tensor([begun + answer[:-1]], device=model.device)
    rows = torch.arange(len(answer), device=model.device) + len(begun) - 1
    targets = torch.tensor([answer], device=model.device)

    def values(count: int) -> Tensor:
        image = image_states(model, pixels.expand(count, -1, -1, -1)) if vision else seen.expand(count, -1, -1)
        asked = None if question is None else question.expand(count, -1)
        return answer_logprobs(model, image, asked, written.expand(count, -1), rows, targets.expand(count, -1))

    def embeddings() -> Tensor:
        """States of patches and embeddings of words, which have nothing in common."""
        words = model.get_input_embeddings()(torch.tensor(begun if question is None else ids, device=model.device))
        return torch.block_diag(seen[0].float().cpu(), words.float().cpu())

    pieces, _ = token_texts_of(tokenizer, answer)
    return ForwardObjective(
        prompt=text,
        target="".join(pieces) if target is None else target,
        units=tuple(found),
        target_tokens=tuple(pieces),
        keys=first + len(ids),
        row_cost=(read.positions if vision else 0) + (len(ids) if asks else 0) + written.shape[1],
        suppressed=model,
        forward=values,
        read_embeddings=embeddings,
        run=lambda factor, **options: BlipRun(model, factor, states=read.positions, vision=vision, **options),
        facts={"image_units": image_units, **({"vision": True} if vision else {}), **read.facts},
    )


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
    with torch.inference_mode():
        answer = generated(
            model.text_decoder,
            tokenizer,
            {"input_ids": torch.tensor([begun], device=model.device)},
            len(begun),
            max_new_tokens,
            encoder_hidden_states=source_states(model, image, question),
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
        )
    return without_ends(answer, {config.sep_token_id, config.pad_token_id})
