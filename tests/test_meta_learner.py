"""The meta-learner: Adam against torch's, order independence, refusals by cause, and bit-for-bit resume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from palf_dist.config import DataConfig, DistributedConfig, MetaLearnerConfig, RunConfig
from palf_dist.errors import CheckpointError
from palf_dist.meta_learner import NORM_WARM_UP, REFUSAL_CAUSES, MetaLearner
from palf_dist.randomness import random_generator
from palf_dist.types import Contribution, Unit

SIZE = 7


def config(mode: str = "sync", max_staleness: int = 2, **settings: float) -> RunConfig:
    return RunConfig(
        data=DataConfig(train=("iris",), held_out=("wine",)),
        meta_learner=MetaLearnerConfig(**settings),
        distributed=DistributedConfig(mode=mode, max_staleness=max_staleness),
    )


def initial() -> np.ndarray:
    return random_generator("initial").normal(size=SIZE).astype(np.float32)


def contribution(step: int, group: int = 0, scale: float = 1.0, version: int | None = None) -> Contribution:
    gradient = scale * random_generator("gradient", step, group).normal(size=SIZE)
    loss = {"outer_loss": 0.5 + 0.01 * group}
    return Contribution(Unit("meta_gradient", step, group), step if version is None else version, loss, gradient)


def warm_up(learner: MetaLearner) -> int:
    """Take enough ordinary steps for outliers to be judged; the next outer step."""
    for step in range(NORM_WARM_UP):
        learner.apply([contribution(step)])
    return NORM_WARM_UP


def test_equals_torch_adam_with_linear_decay_and_clipping() -> None:
    steps = 9
    learner = MetaLearner(config(outer_steps=steps, learning_rate=0.02, clip=0.5, final_learning_rate=0.1), initial())
    phi = torch.tensor(initial().astype(np.float64), requires_grad=True)
    adam = torch.optim.Adam([phi], lr=0.02, betas=(0.9, 0.98), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.1, total_iters=steps - 1)
    for step in range(steps):
        group = [contribution(step, index) for index in range(3)]
        report = learner.apply(group)
        phi.grad = torch.tensor(np.mean([item.gradient for item in group], axis=0))
        norm = torch.nn.utils.clip_grad_norm_([phi], 0.5)
        assert report.gradient_norm == pytest.approx(float(norm), rel=1e-12)
        assert report.learning_rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        adam.step()
        schedule.step()
        assert (report.outer_step, report.applied, learner.version) == (step, 3, step + 1)
        assert report.outer_loss == pytest.approx(0.51)
    assert report.learning_rate == pytest.approx(0.002)
    assert learner.policy.dtype == np.float32
    np.testing.assert_allclose(learner.policy, phi.detach().numpy(), rtol=2e-6)


def test_terms_of_the_outer_loss_are_averaged_over_what_was_accepted() -> None:
    learner = MetaLearner(config(), initial())
    group = [contribution(0, index) for index in range(3)]
    for index, item in enumerate(group):
        item.metrics["outer_information"] = float(index)
    group[2].metrics["outer_loss"] = float("nan")
    assert learner.apply(group).terms == {"outer_information": 0.5}
    assert learner.apply([contribution(1)]).terms == {}


def test_small_gradients_are_not_scaled_up() -> None:
    """Adam hides a constant scale, so look at its first moment."""
    learner = MetaLearner(config(clip=10.0, beta1=0.0), initial())
    small = contribution(0)
    learner.apply([small])
    np.testing.assert_array_equal(learner.state()["first_moment"], small.gradient)


def test_weight_decay_is_decoupled_and_scaled_by_the_learning_rate() -> None:
    decayed = MetaLearner(config(weight_decay=0.1), initial())
    plain = MetaLearner(config(), initial())
    for learner in (decayed, plain):
        learner.apply([contribution(0)])
    expected = plain.policy.astype(np.float64) - 0.03 * 0.1 * initial()
    np.testing.assert_allclose(decayed.policy, expected, rtol=1e-6)


def test_arrival_order_changes_no_bit() -> None:
    group = [contribution(0, index, scale=10.0**-index) for index in range(4)]
    policies = set()
    for order in itertools.permutations(group):
        learner = MetaLearner(config(), initial())
        learner.apply(order)
        policies.add((learner.policy.tobytes(), learner.state()["first_moment"].tobytes()))
    assert len(policies) == 1


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e200])
def test_non_finite_contributions_are_refused_not_zeroed(poison: float) -> None:
    """1e200 is finite, but its norm overflows: clipping by it would zero the gradient."""
    bad = contribution(0, 1)
    assert bad.gradient is not None
    bad.gradient[2] = poison
    learner, clean = MetaLearner(config(), initial()), MetaLearner(config(), initial())
    report = learner.apply([contribution(0, 0), bad])
    clean.apply([contribution(0, 0)])
    assert report.refused == {"non_finite": 1, "outlier": 0, "duplicate": 0, "stale": 0}
    assert learner.refused == report.refused
    assert (report.applied, learner.applied) == (1, 1)
    assert learner.policy.tobytes() == clean.policy.tobytes()


def test_non_finite_outer_loss_is_refused() -> None:
    bad = contribution(0)
    bad.metrics["outer_loss"] = float("nan")
    learner = MetaLearner(config(), initial())
    assert learner.apply([bad, contribution(0, 1)]).refused["non_finite"] == 1


def test_outliers_are_refused_once_there_is_a_history() -> None:
    learner = MetaLearner(config(outlier_factor=20.0), initial())
    assert learner.apply([contribution(0, 0, scale=1e4), contribution(0, 1)]).applied == 2, "nothing to compare with"
    for step in range(1, 4):
        learner.apply([contribution(step)])
    before = learner.policy.copy()
    report = learner.apply([contribution(4, 0, scale=1e3)])
    assert report.refused["outlier"] == 1
    assert np.isnan(report.gradient_norm) and np.isnan(report.outer_loss)
    np.testing.assert_array_equal(learner.policy, before)
    assert learner.version == 5, "a step whose contributions are all refused counts"
    assert learner.apply([contribution(5, 0, scale=3.0)]).applied == 1


def test_a_lasting_change_of_scale_is_accepted_in_the_end() -> None:
    learner = MetaLearner(config(), initial())
    first = warm_up(learner)
    applied = [learner.apply([contribution(step, scale=1e3)]).applied for step in range(first, first + 10)]
    assert applied[0] == 0 and applied[-1] == 1


def test_zero_gradients_do_not_make_everything_outlying() -> None:
    learner = MetaLearner(config(), initial())
    for step in range(NORM_WARM_UP):
        learner.apply([contribution(step, scale=0.0)])
    np.testing.assert_array_equal(learner.policy, initial())
    assert learner.apply([contribution(NORM_WARM_UP)]).applied == 1


def test_each_key_is_applied_at_most_once() -> None:
    learner = MetaLearner(config("async"), initial())
    report = learner.apply([contribution(0, 0), contribution(0, 0)])
    assert (report.applied, report.refused["duplicate"]) == (1, 1)
    after_one = MetaLearner(config("async"), initial())
    after_one.apply([contribution(0, 0)])
    assert learner.policy.tobytes() == after_one.policy.tobytes()
    assert learner.apply([contribution(0, 0), contribution(0, 1)]).refused["duplicate"] == 1
    windowed = Contribution(Unit("meta_gradient", 0, 0, '{"window":1}'), 1, {"outer_loss": 0.5}, np.ones(SIZE))
    assert learner.apply([windowed]).applied == 1, "other settings make another key"


def test_asynchronous_staleness_is_bounded() -> None:
    learner = MetaLearner(config("async", max_staleness=2), initial())
    for step in range(3):
        assert learner.apply_one(contribution(step)).applied == 1
    assert learner.version == 3
    report = learner.apply_one(contribution(0, 7, version=0))
    assert (report.applied, report.refused["stale"], learner.version) == (0, 1, 3)
    assert learner.apply_one(contribution(1, 7, version=1)).applied == 1
    report = learner.apply_one(contribution(1, 7, version=1))
    assert (report.refused["duplicate"], learner.version) == (1, 4)
    assert learner.refused == {"non_finite": 0, "outlier": 0, "duplicate": 1, "stale": 1}
    assert learner.applied == 4


def test_synchronous_mode_takes_no_stale_contribution() -> None:
    learner = MetaLearner(config("sync", max_staleness=2), initial())
    learner.apply([contribution(0)])
    assert learner.apply([contribution(1, version=0)]).refused["stale"] == 1


def test_resumed_equals_undisturbed_bit_for_bit() -> None:
    def run(steps: range, learner: MetaLearner) -> MetaLearner:
        for step in steps:
            group = [contribution(step, index) for index in range(3)]
            if step % 3 == 0:
                group[1] = contribution(step, 1, scale=1e5)
            if step % 4 == 0:
                group[2].gradient = np.full(SIZE, np.nan)
            learner.apply(group)
        return learner

    undisturbed = run(range(12), MetaLearner(config(), initial()))
    assert undisturbed.refused["outlier"] > 0 and undisturbed.refused["non_finite"] > 0
    for cut in (1, 6, 11):
        first = run(range(cut), MetaLearner(config(), initial()))
        resumed = MetaLearner(config(), initial())
        resumed.load_state(first.state())
        run(range(cut, 12), resumed)
        expected, found = undisturbed.state(), resumed.state()
        assert expected.keys() == found.keys()
        for name in expected:
            assert expected[name].tobytes() == found[name].tobytes(), name
        assert (resumed.version, resumed.applied, resumed.refused) == (12, undisturbed.applied, undisturbed.refused)
        repeated = resumed.apply([contribution(cut - 1, 0, version=12)])
        assert repeated.refused["duplicate"] == 1, "the ledger is part of the state"


def test_state_is_a_copy_and_every_cause_is_stored() -> None:
    learner = MetaLearner(config(), initial())
    state = learner.state()
    state["policy"][:] = 0
    state["first_moment"][:] = 1
    np.testing.assert_array_equal(learner.policy, initial())
    np.testing.assert_array_equal(learner.state()["first_moment"], np.zeros(SIZE))
    assert state["counters"].size == 3 + len(REFUSAL_CAUSES)


def test_state_of_another_policy_is_refused() -> None:
    learner = MetaLearner(config(), initial())
    other = MetaLearner(config(), np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match="3 parameters, the configured one has 7"):
        learner.load_state(other.state())
