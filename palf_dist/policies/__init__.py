"""Who chooses the controls: one protocol, implemented by meta-learned, static, schedule and online policies."""

from palf_dist.policies.base import Policy, WithoutParameters
from palf_dist.policies.hedge import HedgePolicy
from palf_dist.policies.meta_learned import (
    AdaptingPolicy,
    LearnedPolicy,
    PolicySpec,
    RecurrentPolicy,
    make_policy,
    policy_spec,
)
from palf_dist.policies.online_learnloss import OnlineLearnLoss
from palf_dist.policies.schedule import CurriculumPolicy, RecordedSchedule
from palf_dist.policies.static import StaticPolicy, fixed_mixture, mixture_controls
from palf_dist.policies.task_mixtures import TaskMixtures

__all__ = [
    "AdaptingPolicy",
    "CurriculumPolicy",
    "HedgePolicy",
    "LearnedPolicy",
    "OnlineLearnLoss",
    "Policy",
    "PolicySpec",
    "RecordedSchedule",
    "RecurrentPolicy",
    "StaticPolicy",
    "TaskMixtures",
    "WithoutParameters",
    "fixed_mixture",
    "make_policy",
    "mixture_controls",
    "policy_spec",
]
