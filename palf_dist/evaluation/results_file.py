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


def results_bytes(rows: Sequence[Mapping[str, Any]], config: RunConfig, card: Mapping[str, Any]) -> bytes:
    """The contents of the file."""
    about = {"config": dump_config(config), "card": dict(card)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)).replace_schema_metadata({ABOUT: json.dumps(about)}), sink)
    return sink.getvalue().to_pybytes()


def read_results(path: str) -> ResultsFile:
    """The file at a path or a URI. Raises RunDirectoryError where it cannot be read, ConfigError where its
    configuration is not one that this version knows."""
    try:
        table = pq.read_table(io.BytesIO(read_file(path)))
        about = json.loads((table.schema.metadata or {}).get(ABOUT, "{}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({first_line(error)}); restore that file") from error
    config = parse_config(about["config"], f"{path}, its metadata") if about else None
    return ResultsFile(table, config, about.get("card"))
