"""What a search tunes: the Target protocol, and what a trial is given and reports. Knows nothing of Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from palf_dist.learnloss.space import WeightSpace
from palf_dist.search.domains import Domain

Parameters = Mapping[str, Any]
"""Values of what is searched, by name."""

ON_THE_FLY = "on_the_fly"
"""True in the parameters of a trial that is to re-learn its loss weights while it trains (targets that can)."""


@dataclass(frozen=True)
class Report:
    """The state of one trial after some of its work."""

    step: int  # counted by the trial from 1 on; a trial that resumes goes on counting
    error: float  # to be minimised; NaN or infinite when the trial failed
    phi: list[float] | None = None  # features [K] of the weight space, the reference first (METHODS part 2)
    gradient: list[float] | None = None  # [k] d error / d weights, once the training has converged
    curvature: list[list[float]] | None = None  # [k, k], as in Sensitivity
    weights: list[float] | None = None  # [k] trained with, where they are not those of the parameters (on the fly)
    waypoints: list[dict[str, Any]] | None = None  # states of what such a training had settled down to on its way
    metrics: dict[str, float] = field(default_factory=dict)  # more for curves; "cost": gradient evaluations so far
    artefact: Path | None = None  # folder whose content becomes best/ where this is the best so far
    checkpoint: Path | None = None  # folder from which another trial can start (PBT)
    done: bool = False  # the last report of a trial that ran to its end


@dataclass(frozen=True)
class TrialContext:
    """What a trial is given besides its parameters."""

    folder: Path  # the trial's own; survives restarts, so that the trial can go on from it
    start_from: Path | None = None  # checkpoint folder of another trial to start from (PBT), instead of the own one
    stop: threading.Event = field(default_factory=threading.Event)  # set: save and return


class Target(Protocol):
    """What is tuned. Sent to every trial's process, so it is small and picklable."""

    @property
    def error_name(self) -> str:
        """What its error is; "minus_" and a name where that is to be maximised."""
        ...

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """What each dataset that it reads holds, in short: a search goes on only with what it began with."""
        ...

    def space(self) -> dict[str, Domain]:
        """What is searched, by name."""
        ...

    def weight_space(self) -> WeightSpace | None:
        """The space where the training loss is linear in what is searched (its weights named as in ``space``), which
        TuneLoss needs; None elsewhere."""
        ...

    def reports(self) -> int:
        """How many reports a whole trial gives: what the schedulers need to know."""
        ...

    def bundles(self) -> list[dict[str, float]]:
        """Resources of one trial: the first bundle is the trial's own process, the others are its workers'."""
        ...

    def run(self, parameters: Parameters, context: TrialContext) -> Iterator[Report]:
        """Work on one trial, in its process, resuming from ``context.folder``; raises PalfError for what is wrong with
        the target rather than with the parameters or the folder (it ends the search; a CheckpointError, a
        PolicyFileError or any other error only fails this trial, and after a RunInUseError it is begun again).

        The process may be killed at any moment, and the iterator closed between two reports. A trial that resumes first
        gives the last report again that its folder knows of (``done`` included), as it may not have been heard: reports
        are told apart by their step. It computes nothing between a report and the next call, so that the report's
        folders stay as they are meanwhile.
        """
        ...

    def finish(self, best: Path) -> dict[str, Any]:
        """What is to be said about ``best`` (a folder with the content of the best artefact) at the end of the search,
        as plain data: its test error ("test_error"), a held-out table."""
        ...
