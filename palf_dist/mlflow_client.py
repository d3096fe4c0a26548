"""A client of MLflow that does not wait for minutes, and that makes a new sqlite database once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from palf_dist.atomic import exclusive

DEFAULT_URI = "sqlite:///mlflow.db"

CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Variables of MLflow's with which a call lasts about 20 s at most and prints nothing. A user's own values win."""


def sqlite_file(uri: str) -> Path | None:
    """The absolute path of the database; None for an address of another kind."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def absolute(uri: str) -> str:
    """The address, also of the same database from another working folder."""
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file}"


def make_client(uri: str) -> Any:
    """An ``MlflowClient`` of the tracking server, or sqlite database, at ``uri``."""
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is None:
        return MlflowClient(tracking_uri=uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that create the tables of a new database at once both fail: one at a time. Artifacts go to mlruns/
    # in the folder of the moment, which must be the database's, wherever the run was started.
    with exclusive(file.parent, wait=True), contextlib.chdir(file.parent):
        client = MlflowClient(tracking_uri=absolute(uri))
        client.search_experiments(max_results=1)
    return client
