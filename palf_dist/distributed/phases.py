"""The phases around the outer steps: preparation before them, the held-out comparison after them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from palf_dist import preparation, units
from palf_dist.distributed.pool import Broadcast
from palf_dist.distributed.session import Session
from palf_dist.policies.meta_learned import needs_parameters
from palf_dist.types import Contribution, Unit


def tune(session: Session) -> dict[str, Any]:
    """Learning rate and L2 strength for every method, where the configuration leaves them to be tuned."""
    config = session.config
    broadcast = Broadcast(units.initial_policy(config), 0)
    tuned = preparation.reduce_tune(config, _phase(session, "tuning", preparation.tune_units(config), broadcast))
    for sentence in preparation.edges(config, tuned):
        session.progress.event(sentence)
    return tuned


def tune_baselines(session: Session, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of the tuned baselines, where the comparison has any."""
    baselines = preparation.baseline_units(session.config)
    if not baselines:
        return {}
    broadcast = Broadcast(units.initial_policy(session.config), 0, prepared)
    return preparation.reduce_baselines(_phase(session, "tuning baselines", baselines, broadcast))


def prepare(session: Session, *, compared: bool = True, tuned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that the meta-training needs to know beforehand: tuned values and the state's normalisation, plain JSON; and
    what ``evaluate`` needs, where it is to follow (``compared``), so that checkpoints keep it. ``tuned``: what ``tune``
    gave another run, whose values this one shares."""
    config = session.config
    if (field := needs_parameters(config.policy)) is not None:
        remedy = "one with a shield; leave it out" if field == "shield" else "a maml one; choose another kind"
        session.progress.event(
            f"policy.{field}: the finished policy is good for the held-out comparison alone, as AdaptiveLoss refuses "
            f"{remedy} for a policy to use"
        )
    prepared = tune(session) if tuned is None else dict(tuned)
    if compared:
        prepared |= tune_baselines(session, prepared)
    broadcast = Broadcast(units.initial_policy(config), 0, prepared)
    calibration = _phase(session, "calibrating", preparation.calibrate_units(config), broadcast)
    return {**prepared, **preparation.reduce_calibrate(config, calibration)}


def selection_score(session: Session, broadcast: Broadcast) -> float:
    """Mean accuracy of the policy above plain cross-entropy's on fresh tasks of the training datasets, a fraction."""
    contributions = session.gather(units.select_units(session.config, broadcast.version), broadcast)
    return float(np.mean([item.metrics["accuracy"] - item.metrics["reference"] for item in contributions]))


def evaluate(session: Session, broadcast: Broadcast) -> list[dict[str, Any]]:
    """The held-out comparison: one row per method and task, in key order. Baselines are tuned first, where what was
    prepared does not hold them."""
    if "baselines" not in broadcast.prepared:
        tuned = tune_baselines(session, broadcast.prepared)
        broadcast = replace(broadcast, prepared={**broadcast.prepared, **tuned})
    evaluation = units.evaluate_units(session.config, session.datasets)
    return units.rows_of(_phase(session, "evaluating", evaluation, broadcast))


def _phase(session: Session, name: str, work: Sequence[Unit], broadcast: Broadcast) -> list[Contribution]:
    """The contributions of ``work`` in key order. What an earlier process has kept of it is not done again."""
    if session.kept is None:
        session.progress.begin(name, len(work))
        counted = itertools.count(1)
        return session.gather(work, broadcast, each=lambda _: session.progress.advance(next(counted)))
    kept = session.kept.under(broadcast)
    done = kept.found(work)
    found = {item.unit for item in done}

    def arrived(contribution: Contribution) -> None:
        done.append(contribution)
        session.progress.advance(len(done))
        kept.keep(contribution)

    session.progress.begin(name, len(work), len(done))
    try:
        left = [unit for unit in work if unit not in found]
        session.gather(left, broadcast, each=arrived, meanwhile=kept.write_when_due)
    finally:
        kept.write()
    return sorted(done, key=lambda item: item.unit)
