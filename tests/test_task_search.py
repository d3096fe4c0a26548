"""TuneLoss on the tasks of a group: against TuneLoss' own driver on each task alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from palf_dist import task_search
from palf_dist.config import InnerConfig
from palf_dist.group_work import measure
from palf_dist.inner_loop import InnerLoop
from palf_dist.learnloss.records import Choose, Outcome, Refine
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.tuning import tune_loss
from palf_dist.policies import OnlineLearnLoss, TaskMixtures, fixed_mixture
from palf_dist.task_search import searched
from palf_dist.types import TaskGroup
from tests.groups import alone, make_group

NOTHING = torch.zeros(0)
SPACE = OnlineLearnLoss().space
STEPS, TRAININGS = 20, 6


@dataclass
class OneTask:
    """A task alone as a problem of TuneLoss, with its mixture as a static loss and snapshots from runs cut short."""

    group: TaskGroup
    space: WeightSpace = SPACE
    accuracies: list[float] = field(default_factory=list)  # on the validation rows, of the finished models

    def train(self, weights: np.ndarray) -> Outcome:
        lambdas = {SPACE.reference: 1.0, **SPACE.named(weights)}
        mixture = fixed_mixture({name: value / sum(lambdas.values()) for name, value in lambdas.items()})
        loop = InnerLoop(self.group, mixture, InnerConfig())
        reader = InnerLoop(self.group, OnlineLearnLoss(), InnerConfig())
        state, seen = loop.start(), []
        for stop in range(4, STEPS + 1, 4):
            loop.run(state, NOTHING, stop)
            seen.append(reader.snapshot(state.theta)[0].numpy())
        rows = self.group.validation
        right = (
            loop.evaluate(state.theta, rows).masked_fill(~self.group.class_mask[:, None], -1e9).argmax(-1)
            == rows.labels
        )
        self.accuracies.append(float(right.double().mean()))
        return Outcome(np.stack(seen)[:, 1:], np.stack(seen)[:, 0])

    def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
        raise NotImplementedError


def loop_of(group: TaskGroup) -> InnerLoop:
    return InnerLoop(group, fixed_mixture(dict.fromkeys(OnlineLearnLoss().active_basis, 0.25)), InnerConfig())


@pytest.fixture(scope="module")
def group() -> TaskGroup:
    made = make_group(steps=STEPS)
    specs = tuple(replace(spec, keys=(*spec.keys, task)) for task, spec in enumerate(made.specs))
    return replace(made, specs=specs)


def test_each_task_gets_the_best_of_a_search_of_its_own(group: TaskGroup) -> None:
    found = searched(loop_of(group), NOTHING, TRAININGS)
    assert isinstance(found.policy, TaskMixtures)
    results = measure(found, NOTHING)
    for task in range(group.size):
        problem = OneTask(alone(group, task))
        trainings = tune_loss(problem, TRAININGS, seed=task, on_the_fly=False).trainings
        assert len({training.error for training in trainings}) == TRAININGS
        looks = zip(problem.accuracies, [-training.error for training in trainings], strict=True)
        (accuracy, loss), best = max(zip(looks, range(TRAININGS), strict=True))
        lambdas = torch.tensor([1.0, *trainings[best].weights])
        mixture = fixed_mixture(dict(zip(found.policy.active_basis, (lambdas / lambdas.sum()).tolist(), strict=True)))
        torch.testing.assert_close(found.policy.vectors[task], mixture.vector, rtol=1e-3, atol=1e-5)
        assert results["validation_accuracy"][task] == pytest.approx(accuracy)
        assert results["validation_loss"][task] == pytest.approx(-loss, rel=1e-4)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e12, 1e30])
def test_trainings_that_diverge_are_not_kept_and_stop_nothing(
    group: TaskGroup, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = task_search._train
    mixtures: list[torch.Tensor] = []  # [G, U] of each training

    def some_diverge(loop: InnerLoop, phi: torch.Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        assert isinstance(loop.policy, TaskMixtures)
        mixtures.append(loop.policy.vectors)
        snapshots, validation = trained(loop, phi)
        if len(mixtures) in (1, 4):
            snapshots[:, 2:] *= factor
            validation = {"validation_accuracy": np.zeros(group.size), "validation_loss": snapshots[:, -1, 0]}
        return snapshots, validation

    monkeypatch.setattr(task_search, "_train", some_diverge)
    kept = searched(loop_of(group), NOTHING, TRAININGS).policy
    assert isinstance(kept, TaskMixtures) and len(mixtures) == TRAININGS
    for task, vector in enumerate(kept.vectors):
        found = [training for training in range(TRAININGS) if torch.equal(mixtures[training][task], vector)]
        assert found and not {*found} & {0, 3}


def test_the_tasks_do_not_all_get_the_same(group: TaskGroup) -> None:
    policy = searched(loop_of(group), NOTHING, TRAININGS).policy
    assert isinstance(policy, TaskMixtures) and len({tuple(row) for row in policy.vectors.tolist()}) > 1


def test_without_trainings_the_run_is_left_as_it_is(group: TaskGroup) -> None:
    loop = loop_of(group)
    assert searched(loop, NOTHING, 0) is loop


def test_without_validation_rows_it_is_the_middle_of_the_box(group: TaskGroup) -> None:
    nothing = torch.zeros_like(group.validation.mask)
    blind = replace(group, validation=replace(group.validation, mask=nothing))
    policy = searched(loop_of(blind), NOTHING, 3).policy
    middle = loop_of(group).policy.controls(NOTHING, group.theta0)
    torch.testing.assert_close(policy.controls(NOTHING, group.theta0), middle)
