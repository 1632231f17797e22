"""Units of images: patches, image tiles (squares of patches), whole images; which tokens and pixels each owns."""

from __future__ import annotations

from atman_kernels.arguments import integer
from atman_kernels.planning.units import Unit

Region = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def patch_units(
    grid_rows: int,
    grid_cols: int,
    image_size: tuple[int, int],
    tile: int = 1,
    image: int = 0,
    first_position: int = 0,
    *,
    step: int | None = None,
    region: Region | None = None,
    characters: tuple[int, int] = (0, 0),
) -> tuple[Unit, ...]:
    """Cut a grid of image patches into units.

    Args:
        grid_rows, grid_cols: the grid; its tokens run row by row.
        image_size: (width, height) of the image in pixels.
        tile: patches per side of an image tile, which is a unit; those at the right and at the bottom may be smaller.
        image: which of the prompt's images it is, from 0.
        first_position: position of the first patch's token in the sequence.
        step: from a token to that below it; None: grid_cols. More where something separates the rows.
        region: what the grid covers, (left, top, right, bottom) in pixels of the image; it may reach beyond it,
            where a processor padded. None: all of it.
        characters: where the image's placeholder stands in the prompt, [start, end).

    Returns:
        Units with source "image", row by row. A unit's box is None if it lies outside the image.

    Raises:
        InputError: a size that is no integer >= 1, a position or image below 0, or a step below grid_cols.

    Example:
        >>> units = patch_units(2, 3, (300, 200), first_position=5)
        >>> units[5].text, units[5].token_indices, units[5].box
        ('row 2, column 3', (10,), (200, 100, 300, 200))
        >>> [(unit.text, unit.token_indices) for unit in patch_units(2, 3, (300, 200), tile=2)]
        [('rows 1-2, columns 1-2', (0, 1, 3, 4)), ('rows 1-2, column 3', (2, 5))]
    """
    width, height = image_size
    for name, value, least in (
        ("grid_rows", grid_rows, 1),
        ("grid_cols", grid_cols, 1),
        ("width", width, 1),
        ("height", height, 1),
        ("tile", tile, 1),
        ("image", image, 0),
        ("first_position", first_position, 0),
        ("step", grid_cols if step is None else step, grid_cols),
    ):
        integer(value, name, least=least)
    below = grid_cols if step is None else step
    left, top, right, bottom = (0.0, 0.0, float(width), float(height)) if region is None else region
    step_x, step_y = (right - left) / grid_cols, (bottom - top) / grid_rows
    units = []
    for row in range(0, grid_rows, tile):
        for column in range(0, grid_cols, tile):
            rows = range(row, min(row + tile, grid_rows))
            columns = range(column, min(column + tile, grid_cols))
            units.append(
                Unit(
                    f"{_counted('row', rows)}, {_counted('column', columns)}",
                    *characters,
                    tuple(first_position + r * below + c for r in rows for c in columns),
                    source="image",
                    box=_box(
                        (left + columns.start * step_x, top + rows.start * step_y),
                        (left + columns.stop * step_x, top + rows.stop * step_y),
                        (width, height),
                    ),
                    image=image,
                )
            )
    return tuple(units)


def query_units(
    count: int, image: int = 0, first_position: int = 0, *, characters: tuple[int, int] = (0, 0)
) -> tuple[Unit, ...]:
    """Units of image tokens that stand for no place of the image, such as a Q-Former's queries: one each.

    Args:
        count: how many tokens.
        image, first_position, characters: as in `patch_units`.

    Example:
        >>> [(unit.text, unit.token_indices, unit.box) for unit in query_units(2, first_position=4)]
        [('query 1', (4,), None), ('query 2', (5,), None)]
    """
    return tuple(Unit(f"query {i + 1}", *characters, (first_position + i,), "image", None, image) for i in range(count))


def _counted(name: str, members: range) -> str:
    """ "row 3" or "rows 3-5", counted from 1."""
    few = len(members) == 1
    return f"{name} {members.start + 1}" if few else f"{name}s {members.start + 1}-{members.stop}"


def _box(
    corner: tuple[float, float], opposite: tuple[float, float], size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Whole pixels inside the image; at least one where a patch is smaller than that."""
    spans = []
    for low, high, length in zip(corner, opposite, size, strict=True):
        if high <= 0 or low >= length:
            return None
        start = min(max(0, round(low)), length - 1)
        spans.append((start, max(start + 1, min(round(high), length))))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom
