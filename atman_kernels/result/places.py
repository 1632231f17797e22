"""Where the units of an image lie in it. Needs no pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atman_kernels.result.explanation import Explanation

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def explained_size(explanation: Explanation, index: int) -> tuple[int, int] | None:
    """(width, height) to which the boxes of an image refer, as the settings say; None if they do not."""
    sizes = explanation.settings.get("images")
    if not isinstance(sizes, list) or index >= len(sizes) or not isinstance(sizes[index], dict):
        return None
    width, height = (sizes[index].get(side) for side in ("width", "height"))
    right, bottom = reach(boxes_of(explanation, index))
    fits = isinstance(width, int) and isinstance(height, int) and width >= right and height >= bottom
    return (width, height) if fits else None


def boxes_of(explanation: Explanation, index: int) -> list[Box]:
    """The boxes of an image's units."""
    units = (unit for unit in explanation.units if unit.source == "image" and unit.image == index)
    return [unit.box for unit in units if unit.box is not None]


def reach(boxes: list[Box]) -> tuple[int, int]:
    """The furthest right and bottom of some boxes, at least 1."""
    return max((box[2] for box in boxes), default=1), max((box[3] for box in boxes), default=1)
