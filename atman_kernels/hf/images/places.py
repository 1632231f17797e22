"""What the blocks of image tokens show of a prompt's images: crops, padding and whole images, by processor."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from atman_kernels.errors import InputError
from atman_kernels.hf.images.layouts import Crops, ImageTokens, Place
from atman_kernels.planning.image_units import Region

Cell = tuple[int, int]  # row and column of a crop, from 1

_CROP = re.compile(r"<row_(\d+)_col_(\d+)>")  # Idefics3 and SmolVLM write where a crop was cut before its tokens


def places_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    blocks: list[ImageTokens],
    images: Sequence[Any] | None,
    processor: Any,
    crops: Crops,
) -> list[Place]:
    """The place of every block of image tokens.

    Args:
        images: the PIL images; None measures in the pixels that the vision tower saw.
        processor: knows what it cropped and padded; needed with images.
        crops: how they are told, see `ImageFamily`.

    Raises:
        InputError: images are more or fewer than the prompt has, or others; or there is no processor, or no images
            where only their proportions tell how crops lie.
    """
    told = [block.place for block in blocks if block.place]
    if told:
        check_sizes(images, [place.size for place in told if place.name != "details"])
        return told
    names = tokenizer.convert_ids_to_tokens([prompt_ids[max(0, block.first - 1)] for block in blocks])
    cells = [(int(match[1]), int(match[2])) if (match := _CROP.fullmatch(name)) else None for name in names]
    groups = side_by_side(blocks) if crops == "canvas" else up_to_the_whole(cells)
    if images is not None and len(images) != len(groups):
        raise InputError(
            f"images has {len(images)}, but the processor made tokens of {len(groups)}; if it cuts images into "
            "crops, switch that off"
        )
    places = []
    for index, group in enumerate(groups):
        size = None if images is None else images[index].size
        pixels = blocks[group[0]].pixels
        own = canvas_cells(len(group), size, pixels) if crops == "canvas" else [cells[block] for block in group]
        places += _places(index, size, pixels, own, processor)
    return places


def check_sizes(images: Sequence[Any] | None, sizes: list[tuple[int, int]]) -> None:
    """Raises InputError if images are not those of which the processor says these sizes, (width, height)."""
    if images is None:
        return
    given = [image.size for image in images]
    if given != sizes:
        seen, found = (", ".join(f"{width} × {height}" for width, height in each) for each in (sizes, given))
        raise InputError(f"images must be those that the processor saw, of {seen} pixels; got {found}")


def up_to_the_whole(cells: Sequence[Cell | None]) -> list[list[int]]:
    """Blocks by image: its crops, then its only block or that of the whole image."""
    groups: list[list[int]] = [[]]
    for index, cell in enumerate(cells):
        groups[-1].append(index)
        if cell is None:
            groups.append([])
    return [group for group in groups if group]


def side_by_side(blocks: list[ImageTokens]) -> list[list[int]]:
    """Blocks by image: those of one have at most one token between them, those of two at least two, end and start."""
    groups = [[0]]
    for index in range(1, len(blocks)):
        before = blocks[index - 1]
        if blocks[index].first - before.first - before.count > 1:
            groups.append([])
        groups[-1].append(index)
    return groups


def canvas_cells(blocks: int, size: tuple[int, int] | None, crop: tuple[int, int]) -> list[Cell | None]:
    """Row and column of each crop of an image, row by row, and None for the whole image.

    Among all grids of so many crops the processors of these models take that whose proportions are nearest to the
    image's; of two as near ones the wider, unless the image has less than half of the pixels of all crops.

    Args:
        blocks: crops and the whole; or only the whole.
        size, crop: (width, height) of the image and of a crop.

    Raises:
        InputError: there are crops of an image of unknown size.

    Example:
        >>> canvas_cells(7, (900, 600), (400, 400))
        [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), None]
    """
    crops = blocks - 1
    if crops == 0:
        return [None]
    if size is None:
        raise InputError("inputs hold crops of an image, and only its proportions tell how they lie; pass images, too")
    width, height = size
    grids = [(columns, crops // columns) for columns in range(1, crops + 1) if crops % columns == 0]
    off = [abs(width / height - columns / rows) for columns, rows in grids]
    nearest = [grid for grid, by in zip(grids, off, strict=True) if by == min(off)]
    columns, rows = nearest[-1] if width * height > crop[0] * crop[1] * crops / 2 else nearest[0]
    return [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)] + [None]


def _places(
    image: int, size: tuple[int, int] | None, pixels: tuple[int, int], cells: Sequence[Cell | None], processor: Any
) -> list[Place]:
    """Those of an image's blocks; size None measures it in crops of these pixels."""
    crops = [cell for cell in cells if cell]
    rows, columns = (max((cell[side] for cell in crops), default=1) for side in (0, 1))
    width, height = (pixels[0] * columns, pixels[1] * rows) if size is None else size
    places = []
    for row, column in crops:
        left, top = (column - 1) * width / columns, (row - 1) * height / rows
        region = (left, top, left + width / columns, top + height / rows)
        places.append(Place(image, (width, height), region, f"crop {row}·{column}"))
    if len(crops) < len(cells):
        as_it_is = size is None or bool(crops)
        region = (0.0, 0.0, float(width), float(height)) if as_it_is else seen_region(processor, width, height)
        places.append(Place(image, (width, height), region, "whole" if crops else ""))
    return places


def seen_region(processor: Any, width: int, height: int) -> Region:
    """What the vision tower sees of an image, in the image's pixels; more than all of it where the processor pads.

    Args:
        processor: an image processor, or what has one.
        width, height: of the image.

    Returns:
        (left, top, right, bottom).

    Raises:
        InputError: there is no processor.
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
