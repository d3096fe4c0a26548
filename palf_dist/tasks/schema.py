"""From a table to an EncodedDataset: which column plays which role, and how its values become arrays."""

from __future__ import annotations

import difflib
import json
import re
import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.types as pt

from palf_dist.config import Columns
from palf_dist.errors import DataError
from palf_dist.randomness import random_generator
from palf_dist.tasks.encoded import WORDS, EncodedDataset
from palf_dist.tasks.images import decode_images, is_image_type

LABEL_NAMES = ("label", "fine_label")
TEXT_NAMES = ("text", "sentence")
IMAGE_NAMES = ("image", "img")
MAX_CATEGORIES = 256
"""Categories kept of a column, the most frequent ones; rarer ones count as missing (an identifier is no category)."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Roles:
    """Which column is what. An image or text column makes the family; other columns are then not read."""

    label: str
    image: str | None = None
    text: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()

    @property
    def features(self) -> list[str]:
        return [column for column in (self.image, self.text, *self.numeric, *self.categorical) if column]


def find_roles(schema: pa.Schema, columns: Columns, name: str) -> Roles:
    """Roles named in ``columns``; the rest is found from names and types. DataError when that cannot be done."""
    _check_names(schema, columns, name)
    label = columns.label or next((column for column in LABEL_NAMES if column in schema.names), None)
    if label is None:
        raise DataError(
            f"{name}: no label column; name one of {', '.join(schema.names)} in columns.label "
            f"(found by itself when it is called {' or '.join(LABEL_NAMES)})"
        )
    kind = _value_type(schema.field(label).type)
    if not (pt.is_integer(kind) or pt.is_boolean(kind) or _is_string(kind)):
        raise DataError(f"{name}: the label column {label} is {kind}; classes must be integers or strings")

    rest = [column for column in schema.names if column != label and column not in columns.drop]
    tabular = columns.numeric is not None or columns.categorical is not None
    image, text = columns.image, columns.text
    if not (image or text or tabular):
        image = next((column for column in rest if _looks_like_image(schema.field(column))), None)
        text = next((column for column in TEXT_NAMES if column in rest and _is_string(schema.field(column).type)), None)
    if image:
        return Roles(label, image=image)
    if text:
        if not _is_string(schema.field(text).type):
            raise DataError(f"{name}: the text column {text} is {schema.field(text).type}, not string")
        return Roles(label, text=text)
    return _tabular_roles(schema, columns, rest, label, name)


def encode(source: ds.Dataset, columns: Columns, name: str, origin: str, max_rows: int) -> EncodedDataset:
    """Encode the labelled rows of a table, a fixed random sample of ``max_rows`` when there are more.

    Rows whose label is null or -1 are dropped. Infinite numbers count as null. Raises DataError for an empty table,
    a table with one class, an all-null column, and whatever ``find_roles`` refuses.
    """
    roles = find_roles(source.schema, columns, name)
    label_column = _decode_dictionary(source.to_table(columns=[roles.label]).column(0))
    if not len(label_column):
        raise DataError(f"{name}: the table has no rows")
    labelled = label_column.is_valid()
    if pt.is_integer(label_column.type):
        labelled = pc.and_(labelled, pc.fill_null(pc.not_equal(label_column, -1), False))
    rows = np.flatnonzero(labelled.to_numpy())
    if len(rows) > max_rows:
        rows = np.sort(random_generator("max_rows").choice(rows, max_rows, replace=False))
    labels, class_names = _encode_labels(label_column.take(pa.array(rows)), source.schema, roles.label)
    if len(class_names) < 2:
        raise DataError(
            f"{name}: the label column {roles.label} has {len(class_names)} class(es) in {len(rows)} labelled rows; "
            "classification needs at least 2"
        )
    table = source.take(pa.array(rows), columns=roles.features)
    for column in roles.features:
        if table.column(column).null_count == len(rows):
            raise DataError(f"{name}: every value of column {column} is null; list it in columns.drop")

    numeric = [_encode_numeric(table.column(column), column, name) for column in roles.numeric]
    categorical = [_encode_categorical(table.column(column)) for column in roles.categorical]
    return EncodedDataset(
        name=name,
        family="image" if roles.image else "text" if roles.text else "tabular",
        origin=origin,
        class_names=class_names,
        numeric=np.concatenate(numeric, axis=1) if numeric else np.zeros((len(rows), 0), np.float32),
        categorical=np.stack([codes for codes, _ in categorical], axis=1)
        if categorical
        else np.zeros((len(rows), 0), np.int32),
        categorical_sizes=tuple(size for _, size in categorical),
        images=decode_images(table.column(roles.image), roles.image, name) if roles.image else None,
        words=_encode_text(table.column(roles.text)) if roles.text else None,
        labels=labels,
    )


def _check_names(schema: pa.Schema, columns: Columns, name: str) -> None:
    given: list[tuple[str, str]] = []  # (role, column)
    for role, value in columns:
        given += [(role, column) for column in ([value] if isinstance(value, str) else value or ())]
    roles: dict[str, str] = {}
    for role, column in given:
        if column not in schema.names:
            near = difflib.get_close_matches(column, schema.names, 1)
            hint = f"did you mean {near[0]}?" if near else f"the table has {', '.join(schema.names)}"
            raise DataError(f"{name}: columns.{role} names {column}, which the table does not have; {hint}")
        if column in roles:
            raise DataError(f"{name}: column {column} is named in columns.{roles[column]} and in columns.{role}")
        roles[column] = role


def _tabular_roles(schema: pa.Schema, columns: Columns, rest: list[str], label: str, name: str) -> Roles:
    named = {*(columns.numeric or ()), *(columns.categorical or ())}
    numeric, categorical = list(columns.numeric or ()), list(columns.categorical or ())
    for column in rest:
        kind = _value_type(schema.field(column).type)
        if column in named:
            continue
        if _is_number(kind) or (pt.is_fixed_size_list(kind) and _is_number(kind.value_type)):
            if columns.numeric is None:
                numeric.append(column)
        elif _is_string(kind) or pt.is_boolean(kind):
            if columns.categorical is None:
                categorical.append(column)
        elif pt.is_null(kind):
            raise DataError(f"{name}: every value of column {column} is null; list it in columns.drop")
        else:
            raise DataError(f"{name}: column {column} has type {kind}, which has no role; list it in columns.drop")
    if not numeric and not categorical:
        raise DataError(f"{name}: no column is left to predict {label} from")
    return Roles(label, numeric=tuple(numeric), categorical=tuple(categorical))


def _looks_like_image(field: pa.Field) -> bool:
    if field.name in IMAGE_NAMES:
        return is_image_type(field.type) or pt.is_fixed_size_list(field.type) or _is_binary(field.type)
    return is_image_type(field.type)


def _encode_labels(column: pa.ChunkedArray, schema: pa.Schema, label: str) -> tuple[np.ndarray, tuple[str, ...]]:
    encoded = column.combine_chunks().dictionary_encode()
    values = np.array(encoded.dictionary.to_pylist())
    order = np.argsort(values)
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values))
    names = _class_label_names(schema, label) if pt.is_integer(column.type) else []
    in_range = len(names) > 0 and values.min() >= 0 and values.max() < len(names)
    class_names = tuple(names[value] if in_range else str(value) for value in values[order])
    return rank[encoded.indices.to_numpy()], class_names


def _class_label_names(schema: pa.Schema, label: str) -> list[str]:
    """Class names that the Hugging Face library writes into the Parquet footer."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return metadata.get("info", {}).get("features", {}).get(label, {}).get("names", [])


def _encode_numeric(column: pa.ChunkedArray, column_name: str, name: str) -> np.ndarray:
    array = column.combine_chunks()
    width = 1
    if pt.is_fixed_size_list(array.type):
        width = array.type.list_size
        missing = array.is_null().to_numpy(zero_copy_only=False)
        array = array.values
    try:
        cast = pc.cast(array, pa.float32(), safe=False)
    except pa.ArrowException as error:
        raise DataError(f"{name}: column {column_name} ({array.type}) is not numeric: {error}") from error
    values = cast.to_numpy(zero_copy_only=False).reshape(-1, width)
    values = np.where(np.isfinite(values), values, np.float32(np.nan))
    if width > 1:
        values[missing] = np.nan
    if np.isnan(values).all():
        raise DataError(f"{name}: no value of column {column_name} is a finite number; list it in columns.drop")
    return values


def _encode_categorical(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    strings = pc.cast(_decode_dictionary(column), pa.string())
    encoded = strings.combine_chunks().dictionary_encode()
    values = np.array(encoded.dictionary.to_pylist())
    indices = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
    counts = np.bincount(indices, minlength=len(values) + 1)[: len(values)]
    kept = np.sort(np.lexsort((values, -counts))[:MAX_CATEGORIES])
    kept = kept[np.argsort(values[kept])]
    codes = np.zeros(len(values) + 1, np.int32)
    codes[kept] = np.arange(1, len(kept) + 1)
    return codes[indices], len(kept)


def _encode_text(column: pa.ChunkedArray) -> np.ndarray:
    words = np.zeros((len(column), WORDS), np.uint32)
    codes: dict[str, int] = {}
    for row, text in enumerate(column.to_pylist()):
        for position, match in enumerate(_WORD.finditer((text or "").lower())):
            if position == WORDS:
                break
            word = match.group()
            code = codes.get(word)
            if code is None:
                code = codes[word] = zlib.crc32(word.encode()) or 1  # 0 is padding
            words[row, position] = code
    return words


def _decode_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.cast(column, column.type.value_type) if pt.is_dictionary(column.type) else column


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pt.is_dictionary(kind) else kind


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)


def _is_string(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind)
