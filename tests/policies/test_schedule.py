"""Schedules of what a policy was seen to ask for."""

from __future__ import annotations

import pytest
import torch

from palf_dist.config import InnerConfig, PolicyConfig
from palf_dist.group_work import at_refreshes
from palf_dist.inner_loop import InnerLoop
from palf_dist.policies import LearnedPolicy, RecordedSchedule, make_policy, policy_spec
from tests.groups import make_group


def random_policy(kind: str, *, refresh: int = 3, shield: float | None = None) -> tuple[LearnedPolicy, torch.Tensor]:
    spec = policy_spec(PolicyConfig(kind=kind, refresh=refresh, shield=shield))
    policy = make_policy(spec, torch.zeros(len(spec.features)), torch.ones(len(spec.features)))
    return policy, torch.randn(policy.num_parameters, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize(("steps", "refresh"), [(150, 10), (150, 1), (7, 3), (1000, 7), (12, 20)])
def test_a_recorded_schedule_finds_its_place_from_the_clock(steps: int, refresh: int) -> None:
    moments = torch.arange(0, steps, refresh)
    policy, _ = random_policy("robust", refresh=refresh)
    table = torch.arange(float(2 * len(moments))).reshape(-1, 2, 1)  # of two tasks
    schedule = RecordedSchedule(table, steps, policy)
    for at, moment in enumerate(moments.tolist()):
        time = torch.full((2, 1), moment / steps)
        assert torch.equal(schedule.controls(torch.zeros(0), time), table[at])
        second = schedule.part(slice(1, 2))
        assert torch.equal(second.controls(torch.zeros(0), time[1:]), table[at, 1:])


@pytest.mark.parametrize("shield", [None, 0.999])
@pytest.mark.parametrize("kind", ["robust", "recurrent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_under_what_was_recorded_of_it_is_that_run(dtype: torch.dtype, kind: str, shield: float | None) -> None:
    """Also under the shield, which mixes what the policy asked for anew. Of another task, a run is another one."""
    policy, phi = random_policy(kind, shield=shield)
    group, phi = make_group(dtype=dtype), phi.to(dtype)
    loop = InnerLoop(group, policy, InnerConfig())
    recorded = loop.start()
    loop.run(recorded, phi, loop.steps)
    asked = at_refreshes(loop, phi, lambda state: policy.controls(phi, state.features))
    for order in ([0, 1, 2], [0, 2, 1]):
        table = torch.from_numpy(asked[:, order]).to(dtype)
        replay = InnerLoop(group, RecordedSchedule(table, loop.steps, policy), InnerConfig())
        state = replay.start()
        replay.run(state, torch.zeros(0), loop.steps)
        same = (state.theta == recorded.theta).all(1).tolist()
        assert same == [task == other for task, other in enumerate(order)]
    if shield is not None:
        assert recorded.shielded is not None and recorded.shielded.max() > 0
