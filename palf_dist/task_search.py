"""TuneLoss on the tasks of a group: mixture weights found by training each task again and again."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from palf_dist.inner_loop import InnerLoop, InnerState, StepResult
from palf_dist.policies import OnlineLearnLoss, TaskMixtures

SNAPSHOTS_OF_A_RUN = 5


def searched(loop: InnerLoop, phi: Tensor, trainings: int) -> InnerLoop:
    """The same inner run under the weights that a TuneLoss search of so many trainings finds best for each task by
    itself: those whose finished model has the least cross-entropy on the task's own validation rows, whose labels are
    as noisy as in training. Where that is never finite, as without such rows, the middle of the box (in log scale).
    Without trainings the run as it is.

    The weights are those of the per-example losses in the box of ``OnlineLearnLoss``; a snapshot has the mean of each
    over the training rows, and that cross-entropy. The tasks train side by side, and what one is told moves no other.
    """
    if not trainings:
        return loop
    from palf_dist.learnloss.records import Outcome  # scipy takes a second to load
    from palf_dist.learnloss.tuning import TuneLoss

    group, space = loop.group, OnlineLearnLoss().space
    searches = [TuneLoss(space, seed=int(spec.keys[-1])) for spec in group.specs]

    def under(weights: list[np.ndarray]) -> InnerLoop:
        return InnerLoop(group, TaskMixtures(space, weights), loop.inner)

    for _ in range(trainings):
        asked = [search.ask() for search in searches]
        seen = _snapshots(under([proposal.weights for proposal in asked]), phi)
        for search, proposal, snapshots in zip(searches, asked, seen, strict=True):
            search.tell(proposal.identifier, Outcome(snapshots[:, 1:], snapshots[:, 0], cost=loop.steps))
    found = [search.best for search in searches]
    return under([space.weights(space.centre) if best is None else best.weights for best in found])


def _snapshots(loop: InnerLoop, phi: Tensor) -> np.ndarray:
    """The snapshots [G, n, 1 + K] of a whole inner run, float64; the last is the finished model."""
    every, seen = max(1, loop.steps // SNAPSHOTS_OF_A_RUN), []

    def look(state: InnerState, result: StepResult) -> None:
        if state.step % every == 0 or state.step == loop.steps:
            seen.append(loop.snapshot(state.theta).double().cpu().numpy())

    loop.run(loop.start(), phi, loop.steps, after_step=look)
    return np.stack(seen, 1)
