"""Image columns: encoded files (Hugging Face's struct<bytes, path>, or plain binary) and fixed-size lists of pixels."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from PIL import Image, UnidentifiedImageError

from palf_dist.errors import DataError

MAX_SIDE = 64
"""Images with a longer side, or of differing sizes, are resized to MAX_SIDE x MAX_SIDE."""

_GREY_MODES = {"1", "L", "LA", "I", "I;16", "F"}


def is_image_type(kind: pa.DataType) -> bool:
    """True for types that hold nothing but images: struct with bytes, and nested fixed-size lists of uint8."""
    if pt.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    shape, values = _list_shape(kind)
    return len(shape) in (2, 3) and pt.is_uint8(values)


def decode_images(column: pa.ChunkedArray, column_name: str, name: str) -> np.ndarray:
    """Pixels [N, H, W, channels] uint8, channels 1 or 3. DataError when an image is null or unreadable."""
    if column.null_count:
        raise DataError(f"{name}: {column.null_count} images of column {column_name} are null")
    if pt.is_fixed_size_list(column.type):
        return _pixels(column.combine_chunks(), column_name, name)
    data = pc.struct_field(column, "bytes") if pt.is_struct(column.type) else column
    if not (pt.is_binary(data.type) or pt.is_large_binary(data.type) or pt.is_binary_view(data.type)):
        raise DataError(f"{name}: the image column {column_name} has type {column.type}, which is not understood")
    if data.null_count:
        raise DataError(f"{name}: {data.null_count} images of column {column_name} have no bytes, only a path")
    images = [_decode(content.as_py(), row, column_name, name) for row, content in enumerate(data)]
    if len({image.size for image in images}) > 1:
        images = [image.resize((MAX_SIDE, MAX_SIDE), Image.Resampling.BILINEAR) for image in images]
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    pixels = np.stack([np.asarray(image.convert(mode)) for image in images])
    return pixels[..., None] if mode == "L" else pixels


def _decode(content: bytes, row: int, column_name: str, name: str) -> Image.Image:
    try:
        file = Image.open(io.BytesIO(content))
        image = file.convert("L" if file.mode in _GREY_MODES else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{name}: row {row} of column {column_name} is not a readable image ({error})") from error
    if max(image.size) > MAX_SIDE:
        image = image.resize((MAX_SIDE, MAX_SIDE), Image.Resampling.BILINEAR)
    return image


def _pixels(array: pa.FixedSizeListArray, column_name: str, name: str) -> np.ndarray:
    shape, values = _list_shape(array.type)
    if len(shape) == 1:
        channels = 1 if math.isqrt(shape[0]) ** 2 == shape[0] else 3
        side = math.isqrt(shape[0] // channels)
        shape = [side, side, channels] if side * side * channels == shape[0] else shape
    elif len(shape) == 2:
        shape = [*shape, 1]
    if len(shape) != 3 or shape[2] not in (1, 3) or not pt.is_uint8(values):
        raise DataError(
            f"{name}: the image column {column_name} has type {array.type}; a fixed-size list must hold uint8 pixels "
            "as H x W, H x W x 1, H x W x 3, or a flat square image"
        )
    flat: pa.Array = array
    while pt.is_fixed_size_list(flat.type):
        flat = flat.flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(len(array), *shape)


def _list_shape(kind: pa.DataType) -> tuple[list[int], pa.DataType]:
    shape = []
    while pt.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return shape, kind
