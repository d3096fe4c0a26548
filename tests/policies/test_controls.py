"""The controls of the evaluation: shuffled states, and a recorded schedule."""

from __future__ import annotations

import pytest
import torch

from palf_dist.config import InnerConfig, PolicyConfig
from palf_dist.errors import ConfigError
from palf_dist.inner_loop import InnerLoop, InnerState
from palf_dist.policies import LearnedPolicy, RecordedSchedule, ShuffledPolicy, make_policy, policy_spec
from tests.groups import make_group


def random_policy(kind: str) -> tuple[LearnedPolicy, torch.Tensor]:
    spec = policy_spec(PolicyConfig(kind=kind, refresh=3))
    policy = make_policy(spec, torch.zeros(len(spec.features)), torch.ones(len(spec.features)))
    torch.manual_seed(3)
    return policy, torch.randn(policy.num_parameters).double()


@pytest.mark.parametrize("kind", ["robust", "recurrent"])
@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_each_task_gets_the_controls_of_another_one(kind: str, tasks: int) -> None:
    policy, phi = random_policy(kind)
    state = torch.randn(tasks, *([4] if kind == "recurrent" else []), len(policy.features)).double()
    own = policy.controls(phi, state)
    shuffled = ShuffledPolicy(policy, (0,))
    got = shuffled.controls(phi, state)
    others = torch.cdist(got, own).argmin(1).tolist()
    torch.testing.assert_close(got, own[others])
    assert sorted(others) == list(range(tasks)) and all(task != other for task, other in enumerate(others))
    assert torch.equal(shuffled.controls(phi, state), got), "the same other task at every step"


def test_keys_choose_who_sees_whose_states() -> None:
    policy, _ = random_policy("robust")
    assert len({tuple(ShuffledPolicy(policy, (key,))._others(8).tolist()) for key in range(5)}) == 5


def test_a_task_alone_cannot_be_shuffled() -> None:
    policy, phi = random_policy("robust")
    with pytest.raises(ConfigError, match="memory_per_worker: no room for two tasks at a time"):
        ShuffledPolicy(policy, (0,)).controls(phi, torch.zeros(1, len(policy.features)))


@pytest.mark.parametrize(("steps", "refresh"), [(150, 10), (150, 1), (7, 3), (1000, 7), (12, 20)])
def test_a_recorded_schedule_finds_its_place_from_the_clock(steps: int, refresh: int) -> None:
    moments = torch.arange(0, steps, refresh)
    table = torch.arange(float(len(moments)))[:, None]
    schedule = RecordedSchedule(table, steps, refresh, ("ce",))
    time = torch.tensor([moment / steps for moment in moments.tolist()])[:, None]
    assert torch.equal(schedule.controls(torch.zeros(0), time), table)


@pytest.mark.parametrize("steps", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_recorded_schedule_plays_what_was_recorded(steps: int, dtype: torch.dtype) -> None:
    """Under the schedule of its first task alone, that task trains as it did and the others do not."""
    policy, phi = random_policy("robust")
    group = make_group(steps=steps, dtype=dtype)
    seen: list[torch.Tensor] = []

    def note(state: InnerState, result: object) -> None:
        assert state.controls is not None
        if result.refreshed:  # type: ignore[attr-defined]
            seen.append(state.controls[0])

    loop = InnerLoop(group, policy, InnerConfig())
    recorded = loop.start()
    loop.run(recorded, phi.to(dtype), steps, after_step=note)
    schedule = RecordedSchedule(torch.stack(seen), steps, policy.refresh, policy.active_basis)
    replay = InnerLoop(group, schedule, InnerConfig())
    state = replay.start()
    replay.run(state, torch.zeros(0), steps)
    assert torch.equal(state.theta[0], recorded.theta[0]) and not torch.equal(state.theta[1], recorded.theta[1])
