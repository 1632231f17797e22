"""Where the image tokens of a prompt lie in its pictures, and the units that they make."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from atman_kernels.errors import InputError
from atman_kernels.hf.images import ImageTokens
from atman_kernels.planning.patches import Region, patch_units, query_units
from atman_kernels.planning.units import Span, Unit

ImageUnitChoice = str | int  # "patch" | "image" | patches per side of a tile
_CROP = re.compile(r"<row_(\d+)_col_(\d+)>")  # Idefics3 and SmolVLM write where a crop was cut before its tokens


@dataclass(frozen=True)
class Place:
    """What a block of image tokens shows.

    Attributes:
        image: which of the prompt's images.
        size: (width, height) of that image.
        region: what the block covers of it.
        name: of the crop; "" if the image was not cut into crops.
    """

    image: int
    size: tuple[int, int]
    region: Region
    name: str = ""


def check_image_units(choice: ImageUnitChoice | None) -> None:
    is_tile = isinstance(choice, int) and not isinstance(choice, bool) and choice >= 1
    if not (choice is None or is_tile or choice in ("patch", "image")):
        raise InputError(f'image_units must be "patch", "image", an integer >= 1 or None, got {choice!r}')


def places_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    blocks: list[ImageTokens],
    pictures: Sequence[Any] | None,
    processor: Any,
) -> list[Place]:
    """The place of every block of image tokens.

    Args:
        pictures: the PIL images; None measures in the pixels that the vision tower saw.
        processor: knows what it cropped and padded; needed with pictures.

    Raises:
        InputError: there are more or fewer pictures than images in the prompt, or no processor.
    """
    before = [tokenizer.convert_ids_to_tokens(prompt_ids[max(0, block.first - 1)]) for block in blocks]
    crops = [(int(match[1]), int(match[2])) if (match := _CROP.fullmatch(token)) else None for token in before]
    groups: list[list[int]] = [[]]  # per image its crops, then its only block or that of the whole image
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
    places = []
    for image, group in enumerate(groups):
        cells = [crop for index in group if (crop := crops[index])]
        rows, columns = (max((cell[side] for cell in cells), default=1) for side in (0, 1))
        width, height = blocks[group[0]].pixels if pictures is None else pictures[image].size
        if pictures is None:
            width, height = width * columns, height * rows
        for row, column in cells:
            left, top = (column - 1) * width / columns, (row - 1) * height / rows
            region = (left, top, left + width / columns, top + height / rows)
            places.append(Place(image, (width, height), region, f"crop {row}·{column}"))
        if len(cells) < len(group):
            as_it_is = pictures is None or bool(cells)
            region = (0.0, 0.0, float(width), float(height)) if as_it_is else seen_region(processor, width, height)
            places.append(Place(image, (width, height), region, "whole" if cells else ""))
    return places


def seen_region(processor: Any, width: int, height: int) -> Region:
    """What the vision tower sees of a picture, in its pixels; more than all of it where the processor pads.

    `processor` is an image processor, or has one.
    """
    made_by = getattr(processor, "image_processor", processor)
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


def image_units_of(
    blocks: list[ImageTokens], places: list[Place], characters: dict[int, Span], choice: ImageUnitChoice | None
) -> list[Unit]:
    """The units of all images.

    Args:
        characters: by position in the sequence, where a block's placeholder stands in the shown prompt.
        choice: what `check_image_units` lets pass.

    Raises:
        InputError: tiles of what is no grid.
    """
    several = places[-1].image > 0
    found: list[Unit] = []
    for block, place in zip(blocks, places, strict=True):
        span, tile = characters[block.first], 1 if isinstance(choice, str) else choice
        if tile is None:
            return []
        if choice == "image":
            found = _with_block(found, block, place, span)
            continue
        if block.grid is None and tile > 1:
            raise InputError(
                f"image_units: tiles of {tile} need patches, and this model has queries; give 'patch' or 'image'"
            )
        if block.grid is None:
            units = query_units(block.count, place.image, block.first, characters=span)
        else:
            units = patch_units(
                *block.grid, place.size, tile, place.image, block.first, region=place.region, characters=span
            )
        names = [f"image {place.image + 1}"] * several + [place.name] * bool(place.name)
        found += [replace(unit, text=", ".join([*names, unit.text])) for unit in units]
    return found


def _with_block(found: list[Unit], block: ImageTokens, place: Place, span: Span) -> list[Unit]:
    """One unit per image, to which each of its blocks adds its tokens; the last block shows all that was seen."""
    tokens = tuple(range(block.first, block.first + block.count))
    if found and found[-1].image == place.image:
        *found, unit = found
        tokens, span = unit.token_indices + tokens, (unit.start, unit.end)
    (seen,) = patch_units(1, 1, place.size, region=place.region)
    box = None if block.grid is None else seen.box
    return [*found, Unit(f"image {place.image + 1}", *span, tokens, "image", box, place.image)]


def sizes_of(places: list[Place]) -> list[dict[str, int]]:
    """Width and height of every image, for an explanation's settings."""
    sizes = {place.image: place.size for place in places}
    return [{"width": width, "height": height} for width, height in sizes.values()]
