"""TuneLoss on the tasks of a group: mixture weights found by training each task again and again."""

from __future__ import annotations

from math import inf

import numpy as np
from torch import Tensor

from palf_dist.group_work import moments, on_validation
from palf_dist.inner_loop import InnerLoop, InnerState, StepResult
from palf_dist.policies import OnlineLearnLoss, TaskMixtures

SNAPSHOTS = 5  # of each training; fewer where it has fewer steps


def searched(loop: InnerLoop, phi: Tensor, trainings: int) -> InnerLoop:
    """The same inner run under constant weights of the per-example losses that TuneLoss looks for in so many trainings
    of each task, in the box of ``OnlineLearnLoss``. Without trainings the run as it is.

    A search is told the snapshots of its trainings: the mean of each loss over the training rows and, as the error,
    the cross-entropy on the task's own validation rows, whose labels are as noisy as in training. It gives the weights
    whose finished model has the best accuracy on these rows, of equals the one with the lowest cross-entropy; where
    neither is ever known, as without such rows, the middle of the box (in log scale).

    The tasks train side by side, and what one is told moves no other; but a search follows the last bits of what it
    is told, and may go another way where the group is done in other parts.
    """
    if not trainings:
        return loop
    from palf_dist.learnloss.records import Outcome  # scipy takes a second to load
    from palf_dist.learnloss.tuning import TuneLoss

    group, space = loop.group, OnlineLearnLoss().space
    searches = [TuneLoss(space, seed=int(spec.keys[-1])) for spec in group.specs]
    best = [space.weights(space.centre)] * group.size
    rank = [(-inf, -inf)] * group.size
    run = InnerLoop(group, TaskMixtures(space, best), loop.inner)
    for _ in range(trainings):
        asked = [search.ask() for search in searches]
        run.policy = TaskMixtures(space, [proposal.weights for proposal in asked])  # the loop's parts suit them all
        snapshots, validation = _train(run, phi)
        for task, (search, proposal) in enumerate(zip(searches, asked, strict=True)):
            outcome = Outcome(snapshots[task, :, 1:], snapshots[task, :, 0], cost=run.steps)
            search.tell(proposal.identifier, outcome)
            own = float(validation["validation_accuracy"][task]), -float(validation["validation_loss"][task])
            if np.isfinite(own).all() and own > rank[task]:
                best[task], rank[task] = proposal.weights, own
    run.policy = TaskMixtures(space, best)
    return run


def _train(loop: InnerLoop, phi: Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The snapshots [G, n, 1 + K] of a whole inner run, float64, the last of which is the finished model, and what that
    one is worth on the validation rows."""
    wanted, seen = set(moments(loop.steps, SNAPSHOTS)[1:]), []

    def look(state: InnerState, result: StepResult) -> None:
        if state.step in wanted:
            seen.append(loop.snapshot(state.theta).double().cpu().numpy())

    state = loop.start()
    loop.run(state, phi, loop.steps, after_step=look)
    return np.stack(seen, 1), on_validation(loop, state.theta)
