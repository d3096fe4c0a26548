"""The methods of the comparison are the losses that METHODS parts 5 and 6 name."""

from __future__ import annotations

import pytest
import torch

from palf_dist.errors import ConfigError
from palf_dist.evaluation.methods import METHODS, TUNED, baseline_policy, select_methods
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


def test_every_basis_loss_has_a_static_row_of_its_own():
    assert {active_basis(method) for method in STATIC} >= {(name,) for name in BASIS_LOSSES}


@pytest.mark.parametrize("name", ["policy", "policy_schedule", "policy_shuffled"])
def test_the_policy_and_its_controls_have_no_static_ones(name):
    assert METHODS[name].uses_policy == (name == "policy")
    with pytest.raises(AssertionError):
        baseline_policy(METHODS[name])


def test_the_curriculum_follows_the_clock():
    curriculum = baseline_policy(METHODS["curriculum"])
    assert curriculum.features == ("time",) and curriculum.active_basis == ("ce", "focal", "label_smoothing")


def test_selection_keeps_the_table_order_and_always_holds_the_reference():
    by_name = ["policy_schedule", "policy_shuffled", "hedge", "generalised_ce", "mae", "elr", "bootstrap"]
    by_name += [f"{name}_tuned" for name, *_ in TUNED]
    assert [method.name for method in select_methods()] == [name for name in METHODS if name not in by_name]
    assert [method.name for method in select_methods(by_name)] == [*by_name[:2], "ce", *by_name[2:]]
    assert [method.name for method in select_methods(["s5", "policy"])] == ["policy", "ce", "s5"]
    assert [method.name for method in select_methods([])] == ["ce"]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"evaluation\.methods.*'foccal'.*did you mean 'focal'"):
        select_methods(["foccal"])
