"""Units of the image tokens of a prompt."""

from dataclasses import replace
from typing import Any

from atman_kernels.arguments import integer
from atman_kernels.errors import InputError
from atman_kernels.hf.images.layouts import ImageTokens, Place
from atman_kernels.planning.image_units import patch_units, query_units
from atman_kernels.planning.units import Span, Unit


class Unsaid(str):
    """A choice that nobody made: equal to the text, and known as the default."""


ImageUnitChoice = str | int  # "patch" | "image" | patches per side of an image tile
PATCHES = Unsaid("patch")


def checked_image_units(choice: Any) -> ImageUnitChoice | None:
    """Raises InputError if it is neither "patch", "image", patches per side of an image tile, nor None."""
    if choice is None or (isinstance(choice, str) and choice in ("patch", "image")):
        return choice
    return integer(choice, "image_units", least=1, expected='"patch", "image", an integer >= 1 or None')


def image_units_of(
    blocks: list[ImageTokens], places: list[Place], characters: dict[int, Span], choice: ImageUnitChoice | None
) -> list[Unit]:
    """The units of all images.

    Args:
        characters: by position in the sequence, where a block's placeholder stands in the shown prompt.
        choice: what `checked_image_units` lets pass.

    Raises:
        InputError: image tiles of what is no grid.
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
                *block.grid, place.size, tile, place.image, block.first,
                step=block.step, region=place.region, characters=span,
            )  # fmt: skip
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
