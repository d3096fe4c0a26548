"""The methods of the comparison are the losses that METHODS parts 5 and 6 name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palf_dist.config_loading import parse_config
from palf_dist.errors import ConfigError
from palf_dist.evaluation.derived import PICKS
from palf_dist.evaluation.methods import (
    LEARNED,
    METHODS,
    ORACLES,
    TRAININGS,
    TUNED,
    baseline_policy,
    is_baseline,
    is_claimed,
    select_methods,
    tuned_together,
)
from palf_dist.policies import OnlineLearnLoss
from palf_dist.preparation import validated_pairs
from palf_dist.types import BASIS_LOSSES, CONTROLS, DEFAULT_HYPERPARAMETERS, NUM_BASIS

STATIC = [method for method in METHODS.values() if method.alpha]


def static_controls(method):
    return baseline_policy(method).controls(torch.zeros(0), torch.zeros(1, 0))[0]


def active_basis(method):
    return baseline_policy(method).active_basis


@pytest.mark.parametrize("method", STATIC, ids=lambda method: method.name)
def test_controls_are_a_mixture_with_unit_weight_decay(method):
    controls = static_controls(method)
    assert controls.shape == (len(CONTROLS),)
    assert controls[:NUM_BASIS].min() >= 0
    assert controls[:NUM_BASIS].sum().item() == pytest.approx(1)
    assert controls[CONTROLS.index("wd")] == 1
    assert active_basis(method) == tuple(name for name, a in zip(BASIS_LOSSES, controls, strict=False) if a > 0)


def named(name):
    return dict(zip(CONTROLS, static_controls(METHODS[name]).tolist(), strict=True))


def test_the_constants_of_the_methods_document():
    s5 = named("s5")
    assert (s5["robust_ce"], s5["la"]) == (1, 1)
    assert (s5["e"], s5["ew"]) == pytest.approx((0.2, 0.6))
    ce_rce = named("ce_rce")
    assert ce_rce["symmetric_ce"] == 1 and (ce_rce["a"], ce_rce["b"]) == pytest.approx((0.1, 1))
    uniform = named("uniform")
    assert [uniform[name] for name in BASIS_LOSSES] == pytest.approx([0.2] * 5 + [0] * 5)
    assert named("generalised_ce")["q"] == pytest.approx(0.7) and named("elr")["lam"] == 3
    assert named("bootstrap")["beta"] == pytest.approx(0.8)
    ce = named("ce")
    assert {name: ce[name] for name in DEFAULT_HYPERPARAMETERS} == pytest.approx(DEFAULT_HYPERPARAMETERS)


def test_early_stopping_differs_from_ce_in_the_stop_only():
    assert named("ce_early_stopping") == named("ce")
    assert [method.name for method in METHODS.values() if method.early_stopping] == ["ce_early_stopping"]


@pytest.mark.parametrize("name", ["ce_trainval", "ce_by_validation"])
def test_ce_with_other_rows_or_values_is_the_same_loss_and_no_static_one_to_choose(name):
    assert named(name) == named("ce") and METHODS["ce"].is_static and not METHODS[name].is_static
    tuned = [method.name for method in tuned_together([name, "s5_tuned"])]
    assert tuned == ["ce", "s5_tuned"] and tuned_together([name]) == ()


def test_weights_tuned_on_the_task_are_no_static_loss_and_begin_in_the_middle_of_the_box():
    method = METHODS["tuneloss"]
    assert not method.is_static and is_baseline(method.name) and method.searched == TRAININGS
    middle = OnlineLearnLoss().mixture(np.zeros((0, 5)))
    assert [method.alpha[name] for name in OnlineLearnLoss().active_basis] == pytest.approx(middle)
    assert method.searched == len(validated_pairs(parse_config("data: {train: [digits], held_out: [iris]}", "a"))), (
        "as many trainings as ce_by_validation"
    )


def test_the_policy_in_another_use_is_claimed_and_no_baseline():
    rows = [*METHODS, *PICKS, *(method.name for method in LEARNED.values())]
    policies = {"policy", "policy_trainval", "policy_shielded"}
    controls = {"policy_schedule", "policy_shuffled"}
    assert {name for name in rows if not is_claimed(name)} == controls | {*ORACLES}
    assert {name for name in rows if not is_baseline(name)} == controls | {*ORACLES} | policies


def test_every_basis_loss_has_a_static_row_of_its_own():
    assert {active_basis(method) for method in STATIC} >= {(name,) for name in BASIS_LOSSES}


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("policy")])
def test_the_policy_and_its_controls_have_no_static_ones(name):
    assert METHODS[name].uses_policy == (name not in ("policy_schedule", "policy_shuffled"))
    with pytest.raises(AssertionError):
        baseline_policy(METHODS[name])


def test_the_curriculum_follows_the_clock():
    curriculum = baseline_policy(METHODS["curriculum"])
    assert curriculum.features == ("time",) and curriculum.active_basis == ("ce", "focal", "label_smoothing")


def test_selection_keeps_the_table_order_and_always_holds_the_reference():
    by_name = ["policy_trainval", "policy_shielded", "policy_schedule", "policy_shuffled"]
    by_name += ["tuneloss", "hedge", "generalised_ce", "mae", "elr", "bootstrap", "ce_trainval", "ce_true_labels"]
    by_name += ["ce_by_validation"]
    by_name += [f"{name}_tuned" for name, *_ in TUNED]
    assert [method.name for method in select_methods()] == [name for name in METHODS if name not in by_name]
    assert [method.name for method in select_methods(by_name)] == [*by_name[:4], "ce", *by_name[4:]]
    assert [method.name for method in select_methods(["s5", "policy"])] == ["policy", "ce", "s5"]
    assert [method.name for method in select_methods([])] == ["ce"]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"evaluation\.methods.*'foccal'.*did you mean 'focal'"):
        select_methods(["foccal"])
