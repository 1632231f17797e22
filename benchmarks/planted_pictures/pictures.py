"""Pictures of coloured shapes, and questions whose answer stands in the tiles of one shape only.

A picture is a 4×4 grid of cells, five of which hold a shape of its own kind and colour; the others are empty. "what
colour is the ring" asks for one of them, and since no kind and no colour occurs twice, the answer can come from
nowhere but the tiles under that ring. Shapes differ in size, place within their cell and shade, and everything is
under noise, so that no two tiles are alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from atman_kernels.errors import InputError

SIDE = 64  # pixels
PATCH = 8  # pixels; what the vision model sees as one tile
TILES = SIDE // PATCH  # per side
CELL = 16  # pixels: two tiles
CELLS = SIDE // CELL  # per side
OBJECTS = 5  # per picture
NOISE = 0.03  # standard deviation, of values from 0 to 1

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.9, 0.85, 0.1),
    "purple": (0.65, 0.1, 0.75),
    "cyan": (0.1, 0.8, 0.85),
}
QUESTION = "what colour is the {shape}"


@dataclass(frozen=True)
class Pictures:
    """Some pictures with what is in them.

    Attributes:
        pixels: (count, 3, 64, 64), about 0 to 1.
        shapes: (count, objects) indices into `SHAPES`.
        colours: (count, objects) indices into `COLOURS`.
        objects: (count, objects, 64, 64) bool, the pixels of each object.
    """

    pixels: Tensor
    shapes: Tensor
    colours: Tensor
    objects: Tensor

    def tiles(self) -> Tensor:
        """(count, objects, 8, 8) bool: the tiles that each object reaches into."""
        count, objects = self.objects.shape[:2]
        return self.objects.view(count, objects, TILES, PATCH, TILES, PATCH).any(5).any(3)


def draw(count: int, generator: torch.Generator, objects: int = OBJECTS) -> Pictures:
    """Pictures at random; equal states of the generator give equal pictures.

    Raises:
        InputError: more objects than there are kinds and colours, or none.
    """
    if not 1 <= objects <= min(len(SHAPES), len(COLOURS)):
        raise InputError(f"objects: got {objects}, expected 1 to {min(len(SHAPES), len(COLOURS))}")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def different(of: int) -> Tensor:
        return torch.rand(count, of, generator=generator).argsort(dim=1)[:, :objects]

    shapes, colours, cells = different(len(SHAPES)), different(len(COLOURS)), different(CELLS**2)
    radius = uniform(5.0, 7.0, count, objects)
    centre = torch.stack([cells // CELLS, cells % CELLS], dim=2) * CELL + CELL / 2
    centre = centre + (CELL / 2 - 1 - radius)[..., None] * uniform(-1, 1, count, objects, 2)
    covered = _covered(shapes, centre, radius)  # [count, objects, y, x]
    palette = torch.tensor(list(COLOURS.values()))[colours] * uniform(0.85, 1.1, count, objects, 1)
    pixels = uniform(0.1, 0.4, count, 1, 1, 1).expand(count, 3, SIDE, SIDE)
    pixels = torch.where(covered.any(1)[:, None], torch.einsum("noyx,noc->ncyx", covered.float(), palette), pixels)
    noise = NOISE * torch.randn(pixels.shape, generator=generator)
    return Pictures(pixels + noise, shapes, colours, covered)


def _covered(shapes: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """(count, objects, 64, 64) bool: which pixels lie within which object."""
    line = torch.arange(SIDE) + 0.5
    r = radius[..., None, None]
    y = (line[:, None] - centre[..., 0, None, None]) / r  # -1 to 1 over the object
    x = (line[None, :] - centre[..., 1, None, None]) / r
    far, square = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs())
    inside = {
        "circle": far <= 1,
        "square": square <= 0.9,
        "triangle": (y <= 0.9) & (x.abs() <= (y + 1) / 2),
        "diamond": x.abs() + y.abs() <= 1,
        "cross": (square <= 1) & (torch.minimum(x.abs(), y.abs()) <= 0.33),
        "ring": (far <= 1) & (far >= 0.55),
    }
    every = torch.stack([inside[name] for name in SHAPES], dim=2)  # [count, objects, shape, y, x]
    chosen = shapes[..., None, None, None].expand(-1, -1, 1, SIDE, SIDE)
    return every.gather(2, chosen)[:, :, 0]
