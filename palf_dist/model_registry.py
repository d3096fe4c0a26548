"""Files in MLflow's model registry: published as a version of a registered model, and read by its address
(``models:/NAME@ALIAS``, ``models:/NAME/3``, ``models:/NAME/latest``). mlflow is imported when one is used.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palf_dist.errors import RegistryError
from palf_dist.mlflow_client import CLIENT_SETTINGS, DEFAULT_URI, absolute, make_client, sqlite_file
from palf_dist.redaction import has_credentials
from palf_dist.storage import first_line

PREFIX = "models:/"
FOLDER = "policy"
"""Where the files lie among the artifacts of the run that a version belongs to."""
DIGEST_TAG = "palf_dist.sha256"
"""The tag of a version with the digest of what was registered."""

_NAME = re.compile(r"(?!\.)[\w. -]*\w")
_ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]+", re.IGNORECASE)  # what MLflow takes
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[1-9][0-9]*|latest))")


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    version: str
    source: str  # address of the folder with its files
    digest: str | None  # of what was registered; None where somebody else's program did

    @property
    def address(self) -> str:
        return f"{PREFIX}{self.name}/{self.version}"


def is_registered(path: str | Path) -> bool:
    """Whether this is, or was meant as, the address of a registered model, and no path."""
    return str(path).startswith(PREFIX.removesuffix("/"))


def fetch(address: str, names: Sequence[str], tracking_uri: str | None = None) -> tuple[Version, dict[str, bytes]]:
    """The version that an address names, and the contents of these files of it.

    ``tracking_uri``: of the MLflow server; else the one that MLflow was given (MLFLOW_TRACKING_URI), else mlflow.db in
    the working folder. Raises RegistryError.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise RegistryError(
            f"{address}: not an address of a registered model; write models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    with _registry(address, tracking_uri, makes=False) as (client, uri):
        version = _version(_named(client, **match.groupdict()))
        return version, {name: _read(version, name, uri) for name in names}


def publish(
    name: str,
    files: Mapping[str, bytes],
    digest: str,
    *,
    alias: str | None = None,
    tracking_uri: str | None = None,
    experiment: str,
    metrics: Mapping[str, float],
    description: str,
) -> tuple[Version, bool]:
    """Register ``files`` as a new version of the model ``name``, or find the version that has the same ``digest`` and
    still holds them; the alias then names it, and no other. The version, and whether it is new. Raises RegistryError.
    """
    if not _NAME.fullmatch(name):
        raise RegistryError(f"--name {name}: a name of letters, digits, _ - and . is needed, for instance palf")
    if alias is not None and not _ALIAS.fullmatch(alias):
        raise RegistryError(
            f"--alias {alias}: an alias of letters, digits, _ and - is needed, for instance champion; latest, v1, v2 "
            "and so on are MLflow's own"
        )
    with _registry(f"{PREFIX}{name}", tracking_uri, makes=True) as (client, uri):
        found = [_version(item) for item in client.search_model_versions(f"name='{name}'")]
        same = (item for item in found if item.digest == digest)
        version = next((item for item in same if _holds(item, files, uri)), None)
        new = version is None
        if version is None:
            if not found:
                _make_model(client, name)
            run_id = _log(client, experiment, name, files, metrics)
            made = client.create_model_version(
                name, f"runs:/{run_id}/{FOLDER}", run_id, tags={DIGEST_TAG: digest}, description=description
            )
            version = _version(made)
        if alias is not None:
            client.set_registered_model_alias(name, alias, version.version)
        return version, new


def _version(item: Any) -> Version:
    return Version(item.name, str(item.version), item.source.rstrip("/"), item.tags.get(DIGEST_TAG))


def _read(version: Version, name: str, uri: str) -> bytes:
    """A file of a version. Raises RegistryError."""
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        try:
            file = download_artifacts(f"{version.source}/{name}", dst_path=folder, tracking_uri=uri)
            return Path(file).read_bytes()
        except Exception as error:
            raise RegistryError(
                f"{version.address}: {name} cannot be had ({first_line(error)}); register a policy with palf-dist "
                "policy register"
            ) from error


def _holds(version: Version, files: Mapping[str, bytes], uri: str) -> bool:
    """Whether a version still holds these files: what was damaged or removed is registered again."""
    try:
        return all(_read(version, name, uri) == content for name, content in files.items())
    except RegistryError:
        return False


def _named(client: Any, name: str, alias: str | None, version: str | None) -> Any:
    if alias is not None:
        return client.get_model_version_by_alias(name, alias)
    if version != "latest":
        return client.get_model_version(name, version)
    found = client.search_model_versions(f"name='{name}'")
    if not found:
        raise RegistryError(f"{PREFIX}{name}/latest: there is no version of {name}; register one first")
    return max(found, key=lambda item: int(item.version))


def _make_model(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":  # without a version so far
            raise


def _log(client: Any, experiment: str, name: str, files: Mapping[str, bytes], metrics: Mapping[str, float]) -> str:
    """A finished run that holds the files; its id."""
    known = client.get_experiment_by_name(experiment)
    place = known.experiment_id if known else client.create_experiment(experiment)
    run_id = client.create_run(place, run_name=f"register {name}").info.run_id
    try:
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                path = Path(folder, file)
                path.write_bytes(content)
                client.log_artifact(run_id, str(path), FOLDER)
        for metric, value in metrics.items():
            client.log_metric(run_id, metric, value)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id)
    return str(run_id)


@contextlib.contextmanager
def _registry(asked: str, tracking_uri: str | None, makes: bool) -> Iterator[tuple[Any, str]]:
    """A client and its address. What goes wrong within becomes one RegistryError about ``asked``."""
    if tracking_uri is not None and has_credentials(tracking_uri):
        raise RegistryError(
            "--tracking-uri: holds credentials; give them as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    with _short_waits():
        try:
            import mlflow
        except ImportError as error:
            raise RegistryError(f"{asked}: mlflow cannot be imported ({first_line(error)}); install mlflow") from error
        own = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else DEFAULT_URI  # as for a run's tracking
        uri = absolute(tracking_uri or own)
        file = sqlite_file(uri)
        if file is not None and not makes and not file.exists():
            raise RegistryError(
                f"{asked}: there is no registry, as {file} does not exist; name the MLflow server or database, by "
                "MLFLOW_TRACKING_URI or --tracking-uri"
            )
        try:
            yield make_client(uri), uri
        except RegistryError:
            raise
        except Exception as error:  # of mlflow, its database or the network: each has classes of its own
            raise RegistryError(
                f"{asked}: the registry at {uri} says: {first_line(error)}; check the name, MLFLOW_TRACKING_URI and "
                "the credentials (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)"
            ) from error


@contextlib.contextmanager
def _short_waits() -> Iterator[None]:
    """MLflow's variables as in ``CLIENT_SETTINGS`` for a while, where the user has not set them."""
    own = {name: value for name, value in CLIENT_SETTINGS.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
