"""Scores laid over images; the only module of the results that imports pillow."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atman_kernels.arguments import integer, real
from atman_kernels.errors import InputError
from atman_kernels.result import NEGATIVE, POSITIVE
from atman_kernels.result.data import ExplanationData
from atman_kernels.result.labels import label
from atman_kernels.result.places import boxes_of, explained_size, reach

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("pictures need pillow: pip install atman-kernels[images]") from error

MOST_PIXELS_EMBEDDED = 1024  # per side of an image inside a page
GAP = 8  # pixels between panels
CAPTION = 22  # height of a panel's caption


def overlay(
    explanation: ExplanationData, image: Image.Image, index: int, target_tokens: Sequence[int] | None, opacity: float
) -> Image.Image:
    """The image in grey at its own resolution, orange where a unit speaks for the answer and blue where against it.

    See `Explanation.overlay`.
    """
    opacity = real(opacity, "opacity", "in (0, 1]", lambda x: 0 < x <= 1)
    index = integer(index, "index", least=0)
    check_image(explanation, image, index)
    if target_tokens is None:
        field = relevance(explanation, image.size, index, explanation.total)
        return _tinted(image, field, float(field.abs().max()) or 1.0, opacity)
    count = len(explanation.target_tokens)
    expected = f"indices in [0, {count})"
    target_tokens = [integer(x, "target_token", least=0, most=count - 1, expected=expected) for x in target_tokens]
    if not target_tokens:
        raise InputError(f"target_token must be {expected}, got []")
    fields = [relevance(explanation, image.size, index, explanation.scores[:, token]) for token in target_tokens]
    scale = max(float(field.abs().max()) for field in fields) or 1.0  # one for all: panels are to be compared
    panels = [_tinted(image, field, scale, opacity) for field in fields]
    if len(panels) == 1:
        return panels[0]
    return _side_by_side(panels, [label(explanation.target_tokens[token], 16) for token in target_tokens])


def relevance(explanation: ExplanationData, size: tuple[int, int], index: int, scores: Tensor) -> Tensor:
    """(height, width) float32: for every pixel the sum of the scores of the units that hold it.

    Args:
        size: (width, height) of the image; boxes are scaled to it.
        index: which of the prompt's images.
        scores: (n_units,).
    """
    width, height = size
    own_width, own_height = explained_size(explanation, index) or size
    field = torch.zeros(height, width, dtype=torch.float32, device="cpu")
    for unit, score in zip(explanation.units, scores.tolist(), strict=True):
        if unit.source == "image" and unit.image == index and unit.box is not None:
            left, top, right, bottom = unit.box
            columns = slice(round(left * width / own_width), round(right * width / own_width))
            rows = slice(round(top * height / own_height), round(bottom * height / own_height))
            field[rows, columns] += score
    return field


def check_image(explanation: ExplanationData, image: Any, index: int) -> None:
    """Raises InputError if this is no image, or of another shape than the explained one."""
    if not isinstance(image, Image.Image):
        raise InputError(f"image must be a PIL image, got {type(image).__name__}")
    boxes = boxes_of(explanation, index)
    if not boxes:
        raise InputError(f"image {index} has no unit with a place in it; the explanation cannot be laid over it")
    size = explained_size(explanation, index)
    if size is None:
        fits = image.width >= reach(boxes)[0] and image.height >= reach(boxes)[1]
        size = image.size if fits else reach(boxes)
    # a copy in another resolution is as good: sides may be off by the rounding of one pixel
    if abs(image.width * size[1] - image.height * size[0]) > max(*image.size, *size):
        raise InputError(
            f"image is {image.width} × {image.height} pixels, but image {index} of the explanation was "
            f"{size[0]} × {size[1]}"
        )


def data_uri(image: Image.Image) -> str:
    """The image as a PNG inside a URI, made smaller if it is large."""
    small = image.convert("RGB")
    small.thumbnail((MOST_PIXELS_EMBEDDED, MOST_PIXELS_EMBEDDED))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tinted(image: Image.Image, field: Tensor, scale: float, opacity: float) -> Image.Image:
    """The image in grey, so that none of its own colours is taken for a score, mixed with the hues."""
    pixels = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).float()
    pixels = pixels.reshape(image.height, image.width, 1).expand(-1, -1, 3)
    hues = torch.tensor([list(bytes.fromhex(hue[1:])) for hue in (NEGATIVE, POSITIVE)], device="cpu").float()
    strength = (opacity * field.abs() / scale)[..., None]
    mixed = pixels + strength * (hues[(field > 0).long()] - pixels)
    return Image.frombytes("RGB", image.size, mixed.round().to(torch.uint8).numpy().tobytes())


def _side_by_side(panels: list[Image.Image], captions: list[str]) -> Image.Image:
    width, height = panels[0].size
    whole = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + CAPTION), "white")
    font, pen = ImageFont.load_default(), ImageDraw.Draw(whole)
    for place, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = place * (width + GAP)
        drawn = caption.encode("latin-1", "backslashreplace").decode("latin-1")  # what the font has
        pen.text((left + 2, 4), drawn, fill="black", font=font)
        whole.paste(panel, (left, CAPTION))
    return whole
