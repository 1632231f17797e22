"""Where the units of an image lie in it; without pillow."""

from __future__ import annotations

from atman_kernels.result.data import ExplanationData

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def explained_size(explanation: ExplanationData, index: int) -> tuple[int, int] | None:
    """(width, height) to which the boxes of an image refer; None if that is not known, or too small for them."""
    if index >= len(explanation.images):
        return None
    width, height = explanation.images[index].width, explanation.images[index].height
    right, bottom = reach(boxes_of(explanation, index))
    return (width, height) if width >= right and height >= bottom else None


def boxes_of(explanation: ExplanationData, index: int) -> list[Box]:
    """The boxes of an image's units."""
    units = (unit for unit in explanation.units if unit.source == "image" and unit.image == index)
    return [unit.box for unit in units if unit.box is not None]


def reach(boxes: list[Box]) -> tuple[int, int]:
    """The furthest right and bottom of some boxes, at least 1."""
    return max((box[2] for box in boxes), default=1), max((box[3] for box in boxes), default=1)
