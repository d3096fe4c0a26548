"""results.parquet: the rows of a held-out comparison and, as metadata, the configuration and the policy's card that
they belong to. So the file alone says what was judged, and can be joined with others wherever its run went."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from palf_dist.config import RunConfig
from palf_dist.config_loading import dump_config, parse_config
from palf_dist.errors import RunDirectoryError
from palf_dist.storage import first_line, read_file

ABOUT = b"palf_dist"


@dataclass(frozen=True)
class ResultsFile:
    """A results.parquet."""

    table: pa.Table
    config: RunConfig | None  # None in files of versions that did not say it
    card: Mapping[str, Any] | None


class _About(BaseModel):
    config: str  # as YAML
    card: dict[str, Any]


def results_bytes(rows: Sequence[Mapping[str, Any]], config: RunConfig, card: Mapping[str, Any]) -> bytes:
    """The contents of the file."""
    about = _About(config=dump_config(config), card=dict(card)).model_dump()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)).replace_schema_metadata({ABOUT: json.dumps(about)}), sink)
    return sink.getvalue().to_pybytes()


def read_results(path: str) -> ResultsFile:
    """The file at a path or a URI. Raises RunDirectoryError where it cannot be read, ConfigError where its
    configuration is not one that this version knows."""
    try:
        table = pq.read_table(io.BytesIO(read_file(path)))
    except (pa.ArrowException, OSError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({first_line(error)}); restore that file") from error
    found = (table.schema.metadata or {}).get(ABOUT)
    if found is None:
        return ResultsFile(table, None, None)
    try:
        about = _About.model_validate(json.loads(found))
    except ValueError as error:
        raise RunDirectoryError(
            f"{path}: its metadata {ABOUT.decode()} are not what this program writes; restore that file"
        ) from error
    return ResultsFile(table, parse_config(about.config, f"{path}, its metadata"), about.card)
