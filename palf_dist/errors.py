"""The error classes: what a user can mend. Needs nothing but the standard library."""

from __future__ import annotations

from palf_dist.redaction import redact


class PalfError(Exception):
    """A mistake the user can mend: one clear message that names field and remedy (exit code 2, no traceback), and no
    secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class ConfigError(PalfError):
    """The configuration is wrong."""


class DataError(PalfError):
    """A dataset is missing, unreadable or unfit for classification."""


class RunDirectoryError(PalfError):
    """The run directory cannot be used."""


class RunInUseError(RunDirectoryError):
    """Another driver has the run directory, which may be about to end."""


class StorageError(PalfError):
    """The run's folder or storage took no writes for so long that the run had to end; the message says what is safe."""


class CheckpointError(PalfError):
    """No valid checkpoint can be read."""


class PolicyFileError(PalfError):
    """A policy file is missing, newer than this version, or tampered with."""


class RegistryError(PalfError):
    """The model registry cannot be reached, does not have what is asked for, or takes no more."""


class ClusterError(PalfError):
    """The Ray cluster cannot be reached or can never give what is asked."""


class SearchError(PalfError):
    """No trial of a search came to anything."""


class UnsupportedModuleError(PalfError):
    """A user's nn.Module whose second derivatives are known to be wrong or missing."""
