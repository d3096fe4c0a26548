from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from palf_dist.config import Columns
from palf_dist.errors import DataError
from palf_dist.tasks.images import MAX_SIDE
from tests.tasks.cases import encode_table, png


def nested(pixels: np.ndarray) -> pa.Array:
    array = pa.array(pixels.reshape(-1))
    for width in pixels.shape[:0:-1]:
        array = pa.FixedSizeListArray.from_arrays(array, width)
    return array


def decode(column: Any, name: str = "image") -> np.ndarray:
    table = pa.table({name: column, "label": np.arange(len(column)) % 2})
    images = encode_table(table, Columns(image=name)).images
    assert images is not None and images.dtype == np.uint8
    return images


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (49,), (48,)])
def test_fixed_size_lists_of_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    expected = {(49,): (7, 7, 1), (48,): (4, 4, 3), (5, 7): (5, 7, 1)}.get(shape, shape)
    np.testing.assert_array_equal(decode(nested(pixels)), pixels.reshape(6, *expected))


def test_grey_files_have_one_channel_and_mixed_ones_three() -> None:
    grey, colour = np.full((4, 4), 7, np.uint8), np.full((4, 4, 3), 9, np.uint8)
    assert decode([png(grey)] * 2).shape == (2, 4, 4, 1)
    mixed = decode([png(grey), png(colour)])
    assert mixed.shape == (2, 4, 4, 3)
    assert (mixed[0] == 7).all() and (mixed[1] == 9).all()


@pytest.mark.parametrize("sizes", [[(4, 4), (6, 4)], [(100, 80), (100, 80)], [(100, 80), (4, 4)]])
def test_large_or_differing_sizes_are_resized(sizes: list[tuple[int, int]]) -> None:
    images = decode([png(np.full(size, 50, np.uint8)) for size in sizes])
    assert images.shape == (2, MAX_SIDE, MAX_SIDE, 1)
    assert (images == 50).all()


BAD_IMAGES = {
    "null": (pa.array([b"x", None]), "1 images of column image are null"),
    "unreadable": (pa.array([b"not an image", b"x"]), "row 0 of column image is not a readable image"),
    "path alone": (
        pa.array([{"bytes": None, "path": "a.png"}] * 2, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "2 images of column image have no bytes",
    ),
    "floats": (nested(np.zeros((2, 4, 4), np.float32)), "must hold uint8 pixels"),
    "no square": (nested(np.zeros((2, 7), np.uint8)), "flat square image"),
    "two channels": (nested(np.zeros((2, 4, 4, 2), np.uint8)), "must hold uint8 pixels"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_one_clear_error(case: str) -> None:
    column, message = BAD_IMAGES[case]
    with pytest.raises(DataError, match=f"^toy: .*{message}"):
        decode(column)
