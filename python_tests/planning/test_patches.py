"""Units of images: every patch in exactly one tile, and boxes that cover the picture."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atman_kernels import InputError
from atman_kernels.planning.image_units import patch_units, query_units


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(9, 80), st.integers(9, 80), st.integers(0, 50)
)
def test_tiles_share_out_patches_and_pixels(rows, columns, tile, width, height, first):
    units = patch_units(rows, columns, (width, height), tile, image=2, first_position=first)
    tokens = sorted(token for unit in units for token in unit.token_indices)
    assert tokens == list(range(first, first + rows * columns))
    covered = torch.zeros(height, width)
    for unit in units:
        left, top, right, bottom = unit.box
        covered[top:bottom, left:right] += 1
        assert (unit.source, unit.image) == ("image", 2)
    assert bool((covered == 1).all()), "with at least a pixel per patch, boxes neither overlap nor leave gaps"
    assert len(units) == -(-rows // tile) * -(-columns // tile)


def test_a_patch_owns_the_pixels_below_it():
    units = patch_units(3, 4, (400, 300), first_position=7)
    assert units[6].text == "row 2, column 3"
    assert units[6].token_indices == (13,)
    assert units[6].box == (200, 100, 300, 200)
    tiles = patch_units(3, 4, (400, 300), tile=2, first_position=7)
    assert [unit.text for unit in tiles] == [
        "rows 1-2, columns 1-2", "rows 1-2, columns 3-4", "row 3, columns 1-2", "row 3, columns 3-4",
    ]  # fmt: skip
    assert tiles[1].token_indices == (9, 10, 13, 14)
    assert tiles[3].box == (200, 200, 400, 300)


def test_a_region_is_where_the_grid_lies_in_the_picture():
    """A processor that crops the middle, and one that pads to a square."""
    cropped = patch_units(2, 2, (40, 30), region=(5.0, 0.0, 35.0, 30.0))
    assert [unit.box for unit in cropped] == [(5, 0, 20, 15), (20, 0, 35, 15), (5, 15, 20, 30), (20, 15, 35, 30)]
    padded = patch_units(4, 4, (40, 20), region=(0.0, -10.0, 40.0, 30.0))
    assert [unit.box for unit in padded[:4]] == [None] * 4
    assert padded[5].box == (10, 0, 20, 10)
    assert [unit.box for unit in padded[12:]] == [None] * 4


def test_pictures_smaller_than_their_grid_still_have_boxes():
    for unit in patch_units(8, 8, (3, 2)):
        left, top, right, bottom = unit.box
        assert 0 <= left < right <= 3
        assert 0 <= top < bottom <= 2


def test_queries_have_no_place():
    units = query_units(3, image=1, first_position=4)
    assert [(unit.text, unit.token_indices, unit.box) for unit in units] == [
        ("query 1", (4,), None), ("query 2", (5,), None), ("query 3", (6,), None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid_rows": 0}, "grid_rows must be an integer >= 1, got 0"),
        ({"grid_cols": 2.0}, "grid_cols must be an integer >= 1, got 2.0"),
        ({"image_size": (0, 5)}, "width must be an integer >= 1, got 0"),
        ({"tile": True}, "tile must be an integer >= 1, got True"),
        ({"image": -1}, "image must be an integer >= 0, got -1"),
        ({"first_position": -1}, "first_position must be an integer >= 0"),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(InputError, match=message):
        patch_units(**{"grid_rows": 2, "grid_cols": 2, "image_size": (8, 8)} | arguments)


def test_tokens_between_the_rows_belong_to_no_unit() -> None:
    """Pixtral's processor writes one after each row of patches."""
    units = patch_units(2, 3, (300, 200), first_position=5, step=4)
    assert [unit.token_indices for unit in units] == [(5,), (6,), (7,), (9,), (10,), (11,)]
    (whole,) = patch_units(2, 3, (300, 200), tile=3, step=5)
    assert whole.token_indices == (0, 1, 2, 5, 6, 7)
