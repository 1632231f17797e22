"""Pictures as they come in: only of known formats, and of a size that fits into memory once it is unpacked."""

import io

from PIL import Image

from atman_kernels.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 32 << 20


def opened(data: bytes, number: int) -> Image.Image:
    """A picture.

    Raises:
        InputError: it is none, of another format, broken or too large.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise InputError(f"images[{number}] has {width} × {height} pixels; {MOST_PIXELS >> 20} million are taken")
        return picture.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # of every kind, for what is no picture may be anything
        raise InputError(f"images[{number}] is no {', '.join(FORMATS)} that can be read: {error}") from error
