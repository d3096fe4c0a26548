"""Which conditions are imbalanced, and which leave a dataset as it is."""

from __future__ import annotations

from palf_dist.config import Condition, EvaluationConfig
from palf_dist.evaluation.conditions import as_is, imbalanced
from palf_dist.tasks.suites import load_suite


def test_the_conditions_of_palf12() -> None:
    evaluation = EvaluationConfig(suite_conditions=tuple(load_suite("palf12").conditions))
    assert imbalanced(evaluation) == {"imbalance-matched", "imbalance-shifted"}
    assert as_is(evaluation) == {"as-is"}


def test_a_condition_that_changes_anything_is_not_as_it_is() -> None:
    changes = ({"noise_rate": 0.1}, {"imbalance": 2.0}, {"target_prior": "uniform"}, {"train_size": 200})
    conditions = [Condition(name="plain"), *(Condition(name=next(iter(each)), **each) for each in changes)]
    evaluation = EvaluationConfig(suite_conditions=tuple(conditions))
    assert as_is(evaluation) == {"plain"} and imbalanced(evaluation) == {"imbalance"}


def test_without_a_suite() -> None:
    assert imbalanced(EvaluationConfig()) == {"matched", "shifted"} and not as_is(EvaluationConfig())
