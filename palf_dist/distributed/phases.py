"""The phases around the outer steps: preparation before them, the held-out comparison after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from palf_dist import units
from palf_dist.distributed.pool import Broadcast
from palf_dist.distributed.session import Session
from palf_dist.types import Contribution, Unit


def tune(session: Session) -> dict[str, Any]:
    """Learning rate and L2 strength for every method, where the configuration leaves them to be tuned."""
    config = session.config
    broadcast = Broadcast(units.initial_policy(config), 0)
    tuned = units.reduce_tune(config, _phase(session, "tuning", units.tune_units(config), broadcast))
    for sentence in units.edges(config, tuned):
        session.progress.event(sentence)
    return tuned


def prepare(session: Session) -> dict[str, Any]:
    """All that the meta-training needs to know beforehand: tuned values and the state's normalisation, plain JSON."""
    config = session.config
    if config.policy.shield is not None:
        session.progress.event(
            "policy.shield: the finished policy is good for the held-out comparison alone, as AdaptiveLoss refuses one "
            "with a shield; leave it out for a policy to use"
        )
    prepared = tune(session)
    broadcast = Broadcast(units.initial_policy(config), 0, prepared)
    calibration = _phase(session, "calibrating", units.calibrate_units(config), broadcast)
    return {**prepared, **units.reduce_calibrate(config, calibration)}


def selection_score(session: Session, broadcast: Broadcast) -> float:
    """Mean accuracy of the policy above plain cross-entropy's on fresh tasks of the training datasets, a fraction."""
    contributions = session.gather(units.select_units(session.config, broadcast.version), broadcast)
    return float(np.mean([item.metrics["accuracy"] - item.metrics["reference"] for item in contributions]))


def evaluate(session: Session, broadcast: Broadcast) -> list[dict[str, Any]]:
    """The held-out comparison: one row per method and task, in key order."""
    evaluation = units.evaluate_units(session.config, session.datasets)
    return units.rows_of(_phase(session, "evaluating", evaluation, broadcast))


def _phase(session: Session, name: str, work: Sequence[Unit], broadcast: Broadcast) -> list[Contribution]:
    session.progress.begin(name, len(work))
    return session.gather(work, broadcast, show=True)
