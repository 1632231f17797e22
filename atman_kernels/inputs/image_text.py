"""A question about images: what a processor made of images and text, and the units of both."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels.arguments import text_or_empty
from atman_kernels.errors import InputError
from atman_kernels.hf.images.embedding import (
    checked_inputs,
    embed,
    refusals_named,
    source_embeddings,
    vision_runs_once,
    with_pixels,
)
from atman_kernels.hf.images.layouts import ImageTokens, image_family_of, image_tokens
from atman_kernels.hf.images.places import places_of
from atman_kernels.hf.models.placement import input_device
from atman_kernels.inputs.chat import templated
from atman_kernels.inputs.encoder_inputs import EncoderInputs, one_or_several
from atman_kernels.inputs.image_units import ImageUnitChoice, image_units_of, sizes_of
from atman_kernels.inputs.limits import check_ids, check_length, language_positions, room_for_answer
from atman_kernels.inputs.own_answer import check_said, end_ids, generated, without_ends
from atman_kernels.inputs.text_generation import CausalObjective
from atman_kernels.inputs.token_texts import token_texts_of
from atman_kernels.inputs.tokenization import Prompt, UnitChoice, checked_prompt, special_flags, target_ids
from atman_kernels.planning.units import Span, Unit, split_units, target_units


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """What a processor made of images and text.

    Attributes:
        shown: the prompt as a reader sees it.
        inputs: the model's arguments, batch 1.
        blocks: the tokens of every image.
        units: of images and text, in the order of the sequence.
        facts: what an explanation's settings say of it.
    """

    shown: str
    inputs: dict[str, Tensor]
    blocks: list[ImageTokens]
    units: tuple[Unit, ...]
    facts: dict[str, Any]


def ask_about_images(
    model: PreTrainedModel,
    processor: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Mapping[str, Any],
    images: Any,
    target: str | None,
    units: UnitChoice | None,
    image_units: ImageUnitChoice | None,
    *,
    include_target: bool,
    chat: bool,
    max_new_tokens: int,
    language: str,
    vision: bool,
) -> CausalObjective:
    """Run the processor and the vision tower, let the model answer if no target is given, and find the units.

    Args:
        processor, tokenizer, prompt, images, units, image_units, chat, language: see `read_with_images`.
        vision: patches are to be suppressed in the vision encoder, too.

    Raises:
        InputError: images, text and model do not belong together, or an argument does not fit.
        UnsupportedModelError: the model's images cannot be explained, with the reason.
    """
    read = read_with_images(
        model, processor, tokenizer, prompt, images, units, image_units, chat=chat, language=language
    )
    prompt_ids = read.inputs["input_ids"][0]
    length, most = len(prompt_ids), language_positions(model)
    given = None if target is None else target_ids(model, tokenizer, target)
    check_length(length + len(given or [0]) - 1, most)
    with torch.no_grad(), vision_runs_once(model):
        if given is None:
            with refusals_named(model):
                room = room_for_answer(length, most, max_new_tokens)
                said = generated(model, tokenizer, read.inputs, length, room)
            given = check_said(without_ends(said, end_ids(model, tokenizer)))
            target = str(tokenizer.decode(given))
        answer = torch.tensor(given, device=input_device(model))
        rows = torch.arange(len(answer), device=input_device(model)) + length - 1
        embedded, own = embed(model, read.inputs, answer, rows)
    pieces, offsets = token_texts_of(tokenizer, given)
    found = read.units
    if include_target and len(answer) > 1:
        target = "".join(pieces)
        found += target_units(target, offsets, length, token_texts=pieces)
    return CausalObjective(
        prompt=read.shown,
        target=str(target),
        ids=torch.cat([prompt_ids, answer]),
        prompt_length=length,
        units=found,
        target_tokens=tuple(pieces),
        embedded=embedded,
        with_pixels=with_pixels(model, read.inputs, answer, read.blocks) if vision else None,
        own_values=own,
        facts=read.facts | ({"vision": True} if vision else {}),
    )


def read_source(
    model: PreTrainedModel,
    processor: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    images: Any,
    units: UnitChoice | None,
    image_units: ImageUnitChoice | None,
    language: str,
) -> EncoderInputs:
    """Images and text as the encoder of an encoder-decoder reads them; arguments as of `read_with_images`."""
    read = read_with_images(
        model, processor, tokenizer, prompt, images, units, image_units, chat=False, language=language
    )
    embeddings = source_embeddings(model, read.inputs)
    return EncoderInputs(read.shown, {"inputs_embeds": embeddings}, read.units, embeddings.shape[1], read.facts)


def read_with_images(
    model: PreTrainedModel,
    processor: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Mapping[str, Any],
    images: Any,
    units: UnitChoice | None,
    image_units: ImageUnitChoice | None,
    *,
    chat: bool,
    language: str,
) -> ImagePrompt:
    """Run the processor and find the units.

    Args:
        processor: None if prompt is a processor's output already.
        prompt: text with the model's image placeholder, chat messages, or a processor's output for one prompt.
        images: PIL images; None with a processor's output, whose units are then measured in the processor's pixels.
        units: of the text, as in `Explainer.explain`; None: the text gets no units.
        image_units: "patch", "image", or n for tiles of n × n patches; None: images get no units.

    Raises:
        InputError: images, text and model do not belong together, or an argument does not fit.
        UnsupportedModelError: the model's images cannot be explained, with the reason.
    """
    if units is None and image_units is None:
        raise InputError("units and image_units are both None; nothing would get a score")
    pictures = checked_images(images)
    if isinstance(prompt, Mapping):
        text, made = None, prompt
    else:
        text, made = _processed(processor, prompt, pictures or [], chat)
    inputs = checked_inputs(model, made)
    blocks = image_tokens(model, inputs)
    prompt_ids = inputs["input_ids"][0].tolist()
    shown_by_images = {block.first + i * block.step for block in blocks for i in range(block.count)}
    words = [token for position, token in enumerate(prompt_ids) if position not in shown_by_images]
    check_ids(model, tokenizer, words, "prompt")
    shown, kept = _shown_prompt(tokenizer, prompt_ids, blocks)
    crops = image_family_of(model).crops
    places = places_of(tokenizer, prompt_ids, blocks, pictures, processor, crops)
    found = image_units_of(blocks, places, dict(kept), image_units)
    if units is not None:
        found += _text_units(tokenizer, prompt_ids, shown, kept, blocks, text, units, language)
    if not found:
        raise InputError("units: there is no text beside the images, and image_units is None")
    found.sort(key=lambda unit: unit.token_indices[0])
    facts = {"image_units": image_units, "images": sizes_of(places)}
    return ImagePrompt(shown, inputs, blocks, tuple(found), facts)


# What came ----------------------------------------------------------------------------------------------------


def checked_images(images: Any) -> list[Any] | None:
    """The images of one prompt, which may be a single one; None for none.

    Raises:
        InputError: one of them is no image, or the list is empty.
    """
    if images is None:
        return None
    listed = one_or_several(images)
    for index, image in enumerate(listed):
        if not _is_image(image):
            raise InputError(f"images[{index}] must be a PIL image, got {type(image).__name__}")
    if not listed:
        raise InputError("images is empty; expected at least one")
    return listed


def _is_image(image: Any) -> bool:
    size = getattr(image, "size", None)
    return isinstance(size, tuple) and len(size) == 2


def check_without_images(model: PreTrainedModel, processor: Any, prompt: Prompt) -> None:
    """Raises InputError if a prompt or a model is nothing without the image that nobody gave."""
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    if pixels is not None and pixels.default is inspect.Parameter.empty:
        raise InputError(f"images is missing; {type(model).__name__} reads no text without them")
    placeholder = placeholder_of(processor)
    if placeholder and isinstance(prompt, str) and placeholder in prompt:
        raise InputError(f"images is missing, but the text has the placeholder {placeholder!r}")


def _processed(processor: Any, prompt: Any, images: list[Any], chat: bool) -> tuple[str, Mapping[str, Any]]:
    """The text that went into the processor, and what came out."""
    if processor is None:
        raise InputError("images need the model's processor: Explainer(model, processor)")
    if chat and isinstance(prompt, str):
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content}]
    is_template = not isinstance(prompt, str)
    text = templated(processor, checked_prompt(prompt)) if is_template else text_or_empty(prompt, "prompt")
    placeholder = placeholder_of(processor)
    count = text.count(placeholder) if placeholder else 0
    if count and count != len(images):  # without any, some processors put them in themselves
        raise InputError(f"text has {count} times the placeholder {placeholder!r}, but images has {len(images)}")
    options = {"add_special_tokens": False} if is_template else {}
    try:
        return text, processor(images=images, text=text, return_tensors="pt", **options)
    except (ValueError, TypeError, IndexError, StopIteration) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{type(processor).__name__} does not take these images and this text: {said[0]}") from error


def placeholder_of(processor: Any) -> str | None:
    """What stands for a picture in a text; None where the processor has nothing for that."""
    for name in ("boi_token", "image_token"):  # Gemma 3 writes the first where others write the second
        token = getattr(processor, name, None)
        if token is not None:
            return str(token)
    return None


# Units of the text --------------------------------------------------------------------------------------------


def _shown_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], blocks: list[ImageTokens]
) -> tuple[str, list[tuple[int, Span]]]:
    """The prompt as a reader sees it, with one placeholder for every block of image tokens.

    Returns:
        the text, and (position, characters) of every token of it.
    """
    inside = {block.first + i for block in blocks for i in range(1, block.count)}
    positions = [position for position in range(len(prompt_ids)) if position not in inside]
    pieces, offsets = token_texts_of(tokenizer, [prompt_ids[position] for position in positions])
    return "".join(pieces), list(zip(positions, offsets, strict=True))


def _text_units(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    shown: str,
    kept: list[tuple[int, Span]],
    blocks: list[ImageTokens],
    text: str | None,
    units: UnitChoice,
    language: str,
) -> list[Unit]:
    """Units of the shown prompt, without the placeholders, at the positions of the whole prompt."""
    if not isinstance(units, str):
        units = _moved(units, text, shown)
    ids = [prompt_ids[position] for position, _ in kept]
    placeholders = {index for index, (position, _) in enumerate(kept) if position in {b.first for b in blocks}}
    special = [flag or index in placeholders for index, flag in enumerate(special_flags(tokenizer, ids))]
    names = tokenizer.convert_ids_to_tokens(ids)
    found = []
    offsets = [characters for _, characters in kept]
    for unit in split_units(shown, offsets, units, special=special, token_texts=names, language=language):
        tokens = tuple(kept[index][0] for index in unit.token_indices if index not in placeholders)
        if tokens:
            found.append(Unit(unit.text, unit.start, unit.end, tokens))
        elif not isinstance(units, str):
            raise InputError(f"units: the span ({unit.start}, {unit.end}) holds an image only; image_units cut those")
    return found


def _moved(spans: Any, text: str | None, shown: str) -> Any:
    """Spans of the caller's text as spans of the shown prompt, which may begin with special tokens."""
    if text is None:
        return spans
    if shown.count(text) != 1:
        raise InputError(
            f"units: spans of the text have no place in what the processor made of it, {shown!r}; give a processor's "
            "output as the prompt, and spans of this text"
        )
    split_units(text, [(0, len(text))], spans)  # refuses spans outside the text
    start = shown.index(text)
    return [(begin + start, end + start) for begin, end in spans]
