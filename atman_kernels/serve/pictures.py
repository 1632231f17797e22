"""Pictures as they come in: only of known formats, and of a size that fits into memory once it is unpacked."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image

from atman_kernels.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 32 << 20


def opened(data: bytes, number: int) -> Image.Image:
    """A picture; `number` is its place among several, for errors.

    Raises:
        InputError: it is none, of another format, broken or too large.
    """
    with _named(number):
        return _checked(data, number).convert("RGB")


def size_of(data: bytes, number: int) -> tuple[int, int]:
    """Width and height in pixels; errors as of `opened`."""
    with _named(number):
        return _checked(data, number).size


def cropped(data: bytes, number: int, left: int, top: int, side: int) -> bytes:
    """The square part of a picture that begins at (left, top), as PNG; errors as of `opened`.

    Raises:
        InputError: that is outside of the picture.
    """
    with _named(number):
        picture = _checked(data, number)
        width, height = picture.size
        if side < 1 or left + side > width or top + side > height:
            raise InputError(
                f"images[{number}] has {width} × {height} pixels, in which there is no square of {side} at "
                f"({left}, {top})"
            )
        buffer = io.BytesIO()
        picture.convert("RGB").crop((left, top, left + side, top + side)).save(buffer, "PNG")
        return buffer.getvalue()


def check_together(pictures: Sequence[bytes]) -> None:
    """Raises InputError if one of a request's pictures is none, or they are too large together."""
    pixels = sum(math.prod(size_of(data, number)) for number, data in enumerate(pictures))
    if pixels > MOST_PIXELS:
        raise InputError(f"images have {pixels} pixels together; {MOST_PIXELS >> 20} million are taken")


def _checked(data: bytes, number: int) -> Image.Image:
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise InputError(f"images[{number}] has {width} × {height} pixels; {MOST_PIXELS >> 20} million are taken")
    return picture


@contextmanager
def _named(number: int) -> Iterator[None]:
    """What pillow finds wrong, which may be an exception of any kind, said of that picture."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"images[{number}] is no {', '.join(FORMATS)} that can be read: {error}") from error
