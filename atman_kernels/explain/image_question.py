"""A question about images: what a processor made of pictures and text, and the units of both."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atman_kernels.errors import InputError
from atman_kernels.explain.question import (
    Prompt,
    Question,
    UnitChoice,
    check_length,
    greedy_answer,
    prompt_text,
    special_flags,
    token_texts_of,
)
from atman_kernels.hf.images import ImageTokens, checked_inputs, embed, image_tokens, vision_runs_once
from atman_kernels.planning.patches import Region, patch_units, query_units
from atman_kernels.planning.units import Unit, split_units, target_units

ImageUnitChoice = str | int  # "patch" | "image" | patches per side of a tile
_CROP = re.compile(r"<row_(\d+)_col_(\d+)>")  # Idefics3 and SmolVLM write where a crop was cut before its tokens


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
) -> Question:
    """Run the processor and the vision tower, let the model answer if no target is given, and find the units.

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
    _check_image_units(image_units)
    if units is None and image_units is None:
        raise InputError("units and image_units are both None; nothing would get a score")
    pictures = _checked_images(images)
    if isinstance(prompt, Mapping):
        text, made = None, prompt
    else:
        text, made = _processed(processor, prompt, pictures or [], chat)
    inputs = checked_inputs(model, made)
    blocks = image_tokens(model, inputs)
    prompt_ids = inputs["input_ids"][0].tolist()
    check_length(model, len(prompt_ids) + 1)
    with torch.inference_mode(), vision_runs_once(model):
        answer, target = _answered(model, tokenizer, inputs, target, max_new_tokens)
        check_length(model, len(prompt_ids) + len(answer) - 1)
        rows = torch.arange(len(answer), device=model.device) + len(prompt_ids) - 1
        embedded, own = embed(model, inputs, answer, rows)
    shown, kept, spans = _shown_prompt(tokenizer, prompt_ids, blocks)
    places = _places(tokenizer, prompt_ids, blocks, pictures, processor)
    found = _image_units(blocks, places, spans, image_units)
    if units is not None:
        found += _text_units(tokenizer, prompt_ids, shown, kept, blocks, text, units, language)
    found.sort(key=lambda unit: unit.token_indices[0])
    pieces, offsets = token_texts_of(tokenizer, answer.tolist())
    if include_target and len(answer) > 1:
        target = "".join(pieces)
        found += target_units(target, offsets, len(prompt_ids), token_texts=pieces)
    if not found:
        raise InputError("units: there is no text beside the images, and image_units is None")
    return Question(
        shown,
        target,
        torch.cat([inputs["input_ids"][0], answer]),
        len(prompt_ids),
        tuple(found),
        tuple(pieces),
        embedded,
        own,
        {"image_units": image_units, "images": _sizes(places)},
    )


# What came ----------------------------------------------------------------------------------------------------


def _check_image_units(choice: ImageUnitChoice | None) -> None:
    is_tile = isinstance(choice, int) and not isinstance(choice, bool) and choice >= 1
    if not (choice is None or is_tile or choice in ("patch", "image")):
        raise InputError(f'image_units must be "patch", "image", an integer >= 1 or None, got {choice!r}')


def _checked_images(images: Any) -> list[Any] | None:
    if images is None:
        return None
    listed = list(images) if isinstance(images, list | tuple) else [images]
    for index, image in enumerate(listed):
        size = getattr(image, "size", None)
        if not (isinstance(size, tuple) and len(size) == 2):
            raise InputError(f"images[{index}] must be a PIL image, got {type(image).__name__}")
    if not listed:
        raise InputError("images is empty; expected at least one")
    return listed


def check_without_images(processor: Any, prompt: Prompt) -> None:
    """Raises InputError if a prompt has a placeholder for an image that nobody gave."""
    placeholder = _placeholder(processor)
    if placeholder and isinstance(prompt, str) and placeholder in prompt:
        raise InputError(f"images is missing, but the text has the placeholder {placeholder!r}")


def _processed(processor: Any, prompt: Prompt, images: list[Any], chat: bool) -> tuple[str, Mapping[str, Any]]:
    """The text that went into the processor, and what came out."""
    if processor is None:
        raise InputError("images need the model's processor: Explainer(model, processor)")
    if chat and isinstance(prompt, str):
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content}]
    text, is_template = prompt_text(processor, prompt, False)
    placeholder = _placeholder(processor)
    count = text.count(placeholder) if placeholder else 0
    if count and count != len(images):  # without any, some processors put them in themselves
        raise InputError(f"text has {count} times the placeholder {placeholder!r}, but images has {len(images)}")
    options = {"add_special_tokens": False} if is_template else {}
    try:
        return text, processor(images=images, text=text, return_tensors="pt", **options)
    except (ValueError, TypeError, IndexError, StopIteration) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{type(processor).__name__} does not take these images and this text: {said[0]}") from error


def _placeholder(processor: Any) -> str | None:
    for name in ("boi_token", "image_token"):  # Gemma 3 writes the first where others write the second
        token = getattr(processor, name, None)
        if token is not None:
            return str(token)
    return None


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    target: str | None,
    max_new_tokens: int,
) -> tuple[Tensor, str]:
    """(m,) token ids of the answer, and its text."""
    if target is None:
        ids = greedy_answer(model, tokenizer, inputs, max_new_tokens)
        return torch.tensor(ids, device=model.device), str(tokenizer.decode(ids))
    ids = tokenizer(target, add_special_tokens=False)["input_ids"] if target else []
    if not ids:
        raise InputError("target is empty; give the answer to explain, or None to let the model answer")
    return torch.tensor(ids, device=model.device), target


# Units of the text --------------------------------------------------------------------------------------------


def _shown_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], blocks: list[ImageTokens]
) -> tuple[str, list[tuple[int, tuple[int, int]]], list[tuple[int, int]]]:
    """The prompt as a reader sees it, with one placeholder for every block of image tokens.

    Returns:
        the text, (position, characters) of every token of it, and the characters of every block's placeholder.
    """
    inside = {block.first + i for block in blocks for i in range(1, block.count)}
    positions = [position for position in range(len(prompt_ids)) if position not in inside]
    pieces, offsets = token_texts_of(tokenizer, [prompt_ids[position] for position in positions])
    kept = list(zip(positions, offsets, strict=True))
    characters = dict(kept)
    return "".join(pieces), kept, [characters[block.first] for block in blocks]


def _text_units(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    shown: str,
    kept: list[tuple[int, tuple[int, int]]],
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
    start = shown.index(text)
    try:
        return [(begin + start, end + start) for begin, end in spans]
    except (TypeError, ValueError):
        return spans  # whoever cuts the text says what is wrong with them


# Units of the images ------------------------------------------------------------------------------------------


def _places(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    blocks: list[ImageTokens],
    pictures: Sequence[Any] | None,
    processor: Any,
) -> list[tuple[int, tuple[int, int], Region, str]]:
    """Per block its image, the image's (width, height), what the block covers of it, and the name of its crop."""
    before = [tokenizer.convert_ids_to_tokens(prompt_ids[max(0, block.first - 1)]) for block in blocks]
    crops = [match and (int(match[1]), int(match[2])) for match in map(_CROP.fullmatch, before)]
    groups: list[list[int]] = [[]]  # an image's crops, then the whole image
    for index, crop in enumerate(crops):
        groups[-1].append(index)
        if crop is None:
            groups.append([])
    groups = [group for group in groups if group]
    if pictures is not None and len(pictures) != len(groups):
        raise InputError(
            f"images has {len(pictures)}, but the processor made tokens of {len(groups)}; if it cuts images into "
            "crops, switch that off"
        )
    found = []
    for image, group in enumerate(groups):
        rows, columns = (max([crops[i][side] for i in group if crops[i]], default=1) for side in (0, 1))  # type: ignore[index]
        for index in group:
            width, height = blocks[index].pixels if pictures is None else pictures[image].size
            if pictures is None:
                width, height = width * columns, height * rows
            crop = crops[index]
            if crop is None:
                region = (0.0, 0.0, float(width), float(height))
                if pictures is not None and len(group) == 1:
                    region = _seen(processor, width, height)
                found.append((image, (width, height), region, "whole" if len(group) > 1 else ""))
                continue
            left, top = (crop[1] - 1) * width / columns, (crop[0] - 1) * height / rows
            region = (left, top, left + width / columns, top + height / rows)
            found.append((image, (width, height), region, f"crop {crop[0]}·{crop[1]}"))
    return found


def _seen(processor: Any, width: int, height: int) -> Region:
    """What the vision tower sees of a picture, in its pixels; more than all of it where the processor pads."""
    made_by = getattr(processor, "image_processor", None)
    if made_by is None:
        raise InputError("images beside a processor's output need the processor too: Explainer(model, processor)")
    seen_width, seen_height = float(width), float(height)
    if getattr(made_by, "do_pad", False) and hasattr(made_by, "pad_to_square"):
        seen_width = seen_height = float(max(width, height))
    if getattr(made_by, "do_center_crop", False):
        scale_x = scale_y = 1.0
        if getattr(made_by, "do_resize", False):
            shortest = _length(made_by.size, "shortest_edge")
            if shortest is not None:
                scale_x = scale_y = shortest / min(seen_width, seen_height)
            else:
                scale_x = (_length(made_by.size, "width") or seen_width) / seen_width
                scale_y = (_length(made_by.size, "height") or seen_height) / seen_height
        seen_width = (_length(made_by.crop_size, "width") or seen_width * scale_x) / scale_x
        seen_height = (_length(made_by.crop_size, "height") or seen_height * scale_y) / scale_y
    left, top = (width - seen_width) / 2, (height - seen_height) / 2
    return left, top, left + seen_width, top + seen_height


def _length(size: Any, name: str) -> int | None:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _image_units(
    blocks: list[ImageTokens],
    places: list[tuple[int, tuple[int, int], Region, str]],
    characters: list[tuple[int, int]],
    choice: ImageUnitChoice | None,
) -> list[Unit]:
    if choice is None:
        return []
    several = places[-1][0] > 0
    found: list[Unit] = []
    for block, (image, size, region, crop), span in zip(blocks, places, characters, strict=True):
        if choice == "image":
            found = _with_block(found, block, image, size, span)
            continue
        tile = 1 if choice == "patch" else int(choice)
        if block.grid is None:
            if tile > 1:
                raise InputError(
                    f"image_units: tiles of {tile} need patches, and this model has queries; give 'patch' or 'image'"
                )
            units = query_units(block.count, image, block.first, characters=span)
        else:
            units = patch_units(*block.grid, size, tile, image, block.first, region=region, characters=span)
        names = [f"image {image + 1}"] * several + [crop] * bool(crop)
        found += [replace(unit, text=", ".join([*names, unit.text])) for unit in units]
    return found


def _with_block(
    found: list[Unit], block: ImageTokens, image: int, size: tuple[int, int], span: tuple[int, int]
) -> list[Unit]:
    """One unit per image, to which each of its blocks adds its tokens."""
    tokens = tuple(range(block.first, block.first + block.count))
    if found and found[-1].image == image:
        return [*found[:-1], replace(found[-1], token_indices=found[-1].token_indices + tokens)]
    box = None if block.grid is None else (0, 0, *size)
    return [*found, Unit(f"image {image + 1}", *span, tokens, "image", box, image)]


def _sizes(places: list[tuple[int, tuple[int, int], Region, str]]) -> list[dict[str, int]]:
    sizes = {image: size for image, size, _, _ in places}
    return [{"width": sizes[image][0], "height": sizes[image][1]} for image in sorted(sizes)]
