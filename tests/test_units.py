"""Units on real data: pure functions of their keys, every kind, and what they add up to."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palf_dist import preparation, units
from palf_dist.config import RunConfig
from palf_dist.config_loading import load_config
from palf_dist.errors import ConfigError
from palf_dist.evaluation.controls import SCHEDULE_GROUPS
from palf_dist.evaluation.measures import MEASURES
from palf_dist.evaluation.methods import METHODS, baseline_policy, check_methods
from palf_dist.group_work import EARLY_STOPPING_EVERY, at_refreshes, final_accuracy
from palf_dist.inner_loop import InnerLoop
from palf_dist.outer_loss import accuracy
from palf_dist.policies import make_policy, policy_spec
from palf_dist.tasks.datasets import load_all
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.family import evaluation_specs
from palf_dist.types import Contribution, TaskGroup
from tests.tasks.cases import image_dataset

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, EncodedDataset]]:
    cache = tmp_path_factory.mktemp("cache")
    config = load_config(SMOKE, [f"data.cache={cache}"])
    return config, load_all(config.data)


def runner(data: tuple[RunConfig, dict[str, EncodedDataset]], **estimator: Any) -> units.Runner:
    config, datasets = data
    changed = config.estimator.model_copy(update=estimator)
    return units.Runner(config.model_copy(update={"estimator": changed}), datasets)


@pytest.fixture(scope="module")
def prepared(data: tuple[RunConfig, dict[str, EncodedDataset]]) -> dict[str, Any]:
    config, _ = data
    work, phi = runner(data), units.initial_policy(config)
    tuned = preparation.reduce_tune(config, [work.run(u, phi, 0, {}) for u in preparation.tune_units(config)])
    calibration = [work.run(u, phi, 0, tuned) for u in preparation.calibrate_units(config)]
    return {**tuned, **preparation.reduce_calibrate(config, calibration)}


def same(first: Contribution, second: Contribution) -> bool:
    gradients = (first.gradient, second.gradient)
    equal = gradients[0] is gradients[1] or np.array_equal(*gradients)  # type: ignore[arg-type]
    tables = first.trajectory is second.trajectory or first.trajectory.equals(second.trajectory)
    return bool(equal and tables) and first.metrics == second.metrics and first.rows == second.rows


def test_every_kind_is_a_pure_function_of_its_key(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    config, datasets = data
    phi = units.initial_policy(config)
    work = [
        preparation.tune_units(config)[0],
        preparation.calibrate_units(config)[0],
        units.meta_gradient_units(config, 1)[0],
        units.select_units(config, 0)[0],
        *units.evaluate_units(config, datasets),
    ]
    first, second = runner(data), runner(data)
    forwards = [first.run(unit, phi, 0, prepared) for unit in work]
    backwards = [second.run(unit, phi, 0, prepared) for unit in reversed(work)][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    rows = units.rows_of(forwards)
    assert {row["method"] for row in rows} == {"policy", "ce", "s5"}
    assert {(row["dataset"], row["origin"]) for row in rows} == {("iris", "iris"), ("digits", "digits")}
    assert {row["condition"] for row in rows} == set(config.evaluation.conditions)
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    paired = {"steps_to_best", "reached_best", "steps_to_95", "reached_95"}
    assert all(rows[0].keys() >= MEASURES.keys() - paired for row in rows)
    assert all(row["seconds"] > 0 for row in rows)
    assert all(value == value for row in rows for value in row.values()), "what is not defined is None, not NaN"


def test_every_kind_of_unit_trains_a_residual_net() -> None:
    seen, unseen = image_dataset("seen", side=5, channels=3), image_dataset("unseen", side=6)
    resnet = "{kind: resnet, widths: [4, 8], image_size: 5}"
    config = load_config(
        SMOKE, [f"tasks.architectures=[{resnet}]", "data.train=[seen]", "data.held_out=[unseen]", "inner.steps=6"]
    )
    datasets = {dataset.name: dataset for dataset in (seen, unseen)}
    work, phi = units.Runner(config, datasets), units.initial_policy(config)
    known = preparation.reduce_tune(config, [work.run(u, phi, 0, {}) for u in preparation.tune_units(config)])
    calibration = [work.run(u, phi, 0, known) for u in preparation.calibrate_units(config)]
    known |= preparation.reduce_calibrate(config, calibration)
    step = work.run(units.meta_gradient_units(config, 0)[0], phi, 0, known)
    assert step.gradient is not None and np.isfinite(step.gradient).all() and np.linalg.norm(step.gradient) > 0
    asked = [*units.select_units(config, 0), *units.evaluate_units(config, datasets)]
    rows = units.rows_of([work.run(unit, phi, 0, known) for unit in asked])
    assert {row["method"] for row in rows if "method" in row} == {"policy", "ce", "s5"}
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_online_learnloss_is_a_method_of_the_comparison(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    config, datasets = data
    evaluation = config.evaluation.model_copy(update={"methods": ("online_learnloss",)})
    config = config.model_copy(
        update={"evaluation": evaluation, "inner": config.inner.model_copy(update={"steps": 40})}
    )
    work = units.evaluate_units(config, datasets)
    rows = units.rows_of(units.Runner(config, datasets).run(unit, np.zeros(0), 0, prepared) for unit in work)
    accuracies = {
        name: [row["accuracy"] for row in rows if row["method"] == name] for name in ("online_learnloss", "ce")
    }
    assert len(accuracies["online_learnloss"]) == len(accuracies["ce"]) == len(rows) / 2
    assert all(np.isfinite(values).all() for values in accuracies.values())
    assert accuracies["online_learnloss"] != accuracies["ce"]


@pytest.fixture(scope="module")
def compared(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> tuple[units.Runner, torch.Tensor, dict[str, list[float]]]:
    """A runner and a policy that follows its state, with the accuracies of it and its controls, and of hedge."""
    config, datasets = data
    methods = ("policy", "policy_schedule", "policy_shuffled", "hedge")
    work = units.Runner(
        config.model_copy(
            update={
                "evaluation": config.evaluation.model_copy(update={"methods": methods, "seeds": 2}),
                "tasks": config.tasks.model_copy(update={"group_size": 6}),
                "inner": config.inner.model_copy(update={"steps": 40}),
            }
        ),
        datasets,
    )
    phi = torch.randn(units.initial_policy(config).size, generator=torch.Generator().manual_seed(0))
    check_methods(work.config, datasets)
    made = [work.run(unit, phi.numpy(), 0, prepared) for unit in units.evaluate_units(work.config, datasets)]
    rows = units.rows_of(made)
    return work, phi, {name: [r["accuracy"] for r in rows if r["method"] == name] for name in ("ce", *methods)}


def test_the_controls_of_the_policy_and_hedge_are_methods_of_the_comparison(
    compared: tuple[units.Runner, torch.Tensor, dict[str, list[float]]],
) -> None:
    _, _, accuracies = compared
    assert len({len(values) for values in accuracies.values()}) == 1
    assert len({tuple(values) for values in accuracies.values()}) == 5, "each trains in another way"
    assert all(np.isfinite(values).all() for values in accuracies.values())


def test_the_own_schedule_is_the_mean_over_training_tasks(
    compared: tuple[units.Runner, torch.Tensor, dict[str, list[float]]], prepared: dict[str, Any]
) -> None:
    work, phi, _ = compared
    policy = units.learned_policy(work.config, prepared)
    held_out = evaluation_specs(work.config, work.datasets)[0]
    schedule = work._controls.schedule("schedule", 0, held_out, policy, phi, prepared)
    controls = []
    for index in range(SCHEDULE_GROUPS):
        group = work._group(("schedule", work.config.seed, index), prepared)
        assert {spec.dataset for spec in group.specs} <= {source.name for source in work.config.data.train}
        loop = InnerLoop(group, policy, work.config.inner)
        state = loop.start()
        loop.run(state, phi, 9)  # the third refresh of every fourth step
        controls.append(state.controls)
    want = torch.cat(controls).double().mean(0)  # type: ignore[arg-type]
    assert schedule.table.shape[:2] == (10, len(held_out))
    torch.testing.assert_close(schedule.table[2].double(), want.expand(len(held_out), -1), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(schedule.table[0], schedule.table[2])


def test_shuffled_states_do_not_depend_on_the_parts_that_a_group_is_done_in(
    compared: tuple[units.Runner, torch.Tensor, dict[str, list[float]]], prepared: dict[str, Any]
) -> None:
    """Each task at a time, its partner is still another one of the whole group; no part is too small."""
    work, phi, _ = compared
    unit = next(u for u in units.evaluate_units(work.config, work.datasets) if "policy_shuffled" in u.settings)
    whole = work.run(unit, phi.numpy(), 0, prepared)
    apart = work.run(unit, phi.numpy(), 0, prepared, halvings=3)
    assert len(whole.rows) == 6
    for one, other in zip(whole.rows, apart.rows, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-3)
    own = work.run(replace(unit, settings=unit.settings.replace("_shuffled", "")), phi.numpy(), 0, prepared)
    assert max(abs(a["nll"] / b["nll"] - 1) for a, b in zip(whole.rows, own.rows, strict=True)) > 0.05


@pytest.mark.parametrize("name", ["policy_schedule", "policy_shuffled"])
def test_the_controls_of_the_policy_hold_one_group_at_a_time(
    name: str,
    compared: tuple[units.Runner, torch.Tensor, dict[str, list[float]]],
    prepared: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the memory estimate knows it."""
    config, datasets = compared[0].config, compared[0].datasets
    work = units.Runner(config, datasets)
    groups: list[weakref.ref[TaskGroup]] = []
    build = work._build

    def watched(*arguments: Any) -> TaskGroup:
        assert not any(each() for each in groups), "an earlier group is still there"
        group = build(*arguments)
        groups.append(weakref.ref(group))
        return group

    monkeypatch.setattr(work, "_build", watched)
    unit = next(u for u in units.evaluate_units(config, datasets) if name in u.settings)
    work.run(unit, compared[1].numpy(), 0, prepared)
    assert len(groups) == (SCHEDULE_GROUPS if name == "policy_schedule" else 1) + 1


def test_a_task_that_is_alone_in_its_group_cannot_be_shuffled(
    data: tuple[RunConfig, dict[str, EncodedDataset]],
) -> None:
    config, datasets = data
    evaluation = {"methods": ("policy_shuffled",), "noise_rates": (0.0,), "conditions": ("balanced",)}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})
    check_methods(config, datasets)
    tasks = config.tasks.model_copy(update={"group_size": 1})
    with pytest.raises(ConfigError, match=r"one of iris is alone; change tasks\.group_size"):
        check_methods(config.model_copy(update={"tasks": tasks}), datasets)


@pytest.mark.parametrize("kind", ["widened", "validation_free", "recurrent", "schedule", "constant", "maml"])
def test_every_kind_of_policy_is_calibrated_and_learns(
    kind: str, data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    config, datasets = data
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"kind": kind})})
    work, phi = units.Runner(config, datasets), units.initial_policy(config)
    found = [work.run(unit, phi, 0, prepared) for unit in preparation.calibrate_units(config)]
    tuned = {**prepared, **preparation.reduce_calibrate(config, found)}
    policy = units.learned_policy(config, tuned)
    assert len(tuned["feature_mean"]) == len(tuned["feature_std"]) == len(policy.features)
    made = work.run(units.meta_gradient_units(config, 0)[0], phi, 0, tuned)
    assert made.gradient is not None and made.gradient.shape == phi.shape and np.linalg.norm(made.gradient) > 0
    assert {f"state_{name}" for name in policy.features} <= {*made.trajectory.column_names}
    scores = work.run(units.select_units(config, 0)[0], phi, 0, tuned).metrics
    assert 0 <= scores["accuracy"] <= 1


def test_an_adapting_policy_is_calibrated_at_rest(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    """At the static starting point, where no sum so far has moved it: by hand."""
    config, datasets = data
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"kind": "maml"})})
    work, phi = units.Runner(config, datasets), units.initial_policy(config)
    unit = preparation.calibrate_units(config)[0]
    found = work.run(unit, phi, 0, prepared).arrays
    spec = policy_spec(config.policy)
    rest = make_policy(spec, np.zeros(len(spec.features)), np.full(len(spec.features), 1e30))
    loop = InnerLoop(work._group(("calibrate", config.seed, unit.group), prepared), rest, config.inner)
    values = at_refreshes(loop, torch.from_numpy(phi), lambda state: state.last_features).reshape(
        -1, len(spec.features)
    )
    np.testing.assert_allclose(found["square"], (values**2).sum(0), rtol=1e-5, atol=1e-12)
    assert (found["square"] > 0).sum() >= 3


def test_meta_gradient_differs_by_step_and_group(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    config, _ = data
    work, phi = runner(data), units.initial_policy(config)
    made = [work.run(unit, phi, 0, prepared) for step in (0, 1) for unit in units.meta_gradient_units(config, step)]
    gradients = [item.gradient for item in made]
    assert all(np.isfinite(g).all() and np.linalg.norm(g) > 0 for g in gradients if g is not None)
    assert len({g.tobytes() for g in gradients if g is not None}) == len(made)
    assert made[0].trajectory.num_rows > 0


def test_the_terms_of_an_outer_loss_that_has_several_are_reported(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    config, datasets = data
    outer = config.outer_loss.model_copy(update={"information": 0.5, "gamma": 0.1})
    phi = units.initial_policy(config)
    (unit, *_) = units.meta_gradient_units(config, 0)
    plain, rich = (
        units.Runner(config.model_copy(update={"outer_loss": each}), datasets).run(unit, phi, 0, prepared)
        for each in (config.outer_loss, outer)
    )
    assert plain.metrics.keys() == {"outer_loss"}
    terms = {name.removeprefix("outer_"): value for name, value in rich.metrics.items()}
    assert terms["validation"] == pytest.approx(plain.metrics["outer_loss"])
    objective = terms["information"] - terms["cross_entropy"] - 0.1 * terms["gradient_variance"]
    assert terms["loss"] == pytest.approx(terms["validation"] - 0.5 * objective, rel=1e-5)
    assert terms["information"] > 0 and terms["gradient_variance"] > 0


def test_the_shield_is_counted_in_every_outer_step_and_every_run_of_the_comparison(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    """Against the looks at whole runs; kappa 1 asks for a gradient along cross-entropy's own as long as that."""
    config, datasets = data
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"shield": 1.0})})
    work, phi = units.Runner(config, datasets), units.initial_policy(config)
    unit = units.meta_gradient_units(config, 0)[0]
    made = work.run(unit, phi, 0, prepared)
    assert made.metrics.keys() == {"outer_loss", "shield_share"}
    loop = InnerLoop(
        work._group(("meta_gradient", config.seed, 0, 0), prepared),
        units.learned_policy(config, prepared),
        config.inner,
    )
    state = loop.start()
    loop.run(state, torch.from_numpy(phi), loop.steps)
    share = loop.shield_share(state)
    assert share is not None and made.metrics["shield_share"] == pytest.approx(float(share.mean())) and share.sum() > 0
    rows = units.rows_of(work.run(unit, phi, 0, prepared) for unit in units.evaluate_units(config, datasets))
    shares = {
        is_policy: [r["shield_share"] for r in rows if (r["method"] == "policy") == is_policy]
        for is_policy in (True, False)
    }
    assert set(shares[False]) == {None} and all(0 <= share <= 1 for share in shares[True]) and max(shares[True]) > 0


@pytest.mark.parametrize("policy", ["robust", "recurrent", "maml"])
@pytest.mark.parametrize("kind", ["adjoint", "unroll", "es", "pes"])
def test_windows_go_through_the_whole_run_and_begin_anew(
    kind: str, policy: str, data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    """12 steps in windows of 5: 5 + 5 + 2, then a new inner run."""
    work = runner(data, kind=kind, window=5, pairs=1)
    if policy != "robust":
        changed = work.config.policy.model_copy(update={"kind": policy})
        work = units.Runner(work.config.model_copy(update={"policy": changed}), work.datasets)
    phi = units.initial_policy(work.config)
    size = len(policy_spec(work.config.policy).features)
    known = {**prepared, **{name: prepared[name][:size] for name in ("feature_mean", "feature_std")}}
    carried, lengths = None, []
    for step in range(4):
        (unit, *_) = units.meta_gradient_units(work.config, step)
        made = work.run(unit, phi, step, known, carried)
        carried = made.carried
        lengths.append(None if carried is None else int(carried["state/step"]))
    assert lengths == [5, 10, None, 5]


def test_windowed_adjoint_sums_to_what_windowed_unroll_gives(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    gradients = {}
    for kind in ("adjoint", "unroll"):
        work = runner(data, kind=kind, window=5)
        phi, carried, total = units.initial_policy(work.config), None, 0.0
        for step in range(3):
            made = work.run(units.meta_gradient_units(work.config, step)[0], phi, step, prepared, carried)
            carried = made.carried
            total = total + made.gradient  # type: ignore[operator]
        gradients[kind] = np.asarray(total)
    error = np.linalg.norm(gradients["adjoint"] - gradients["unroll"]) / np.linalg.norm(gradients["unroll"])
    assert error < 1e-3, "float32"


def test_early_stopping_keeps_the_parameters_of_the_best_validation_accuracy(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    """Against a plain loop over the looks; the latest of equally good ones is kept."""
    config, datasets = data
    config = config.model_copy(update={"inner": config.inner.model_copy(update={"steps": 60})})
    work, ce = units.Runner(config, datasets), baseline_policy(METHODS["ce"])
    group = work._group(("early stopping", 0), prepared)
    phi = torch.zeros(0)
    got = final_accuracy(InnerLoop(group, ce, config.inner), phi, early_stopping=True)
    looks = []
    loop = InnerLoop(group, ce, config.inner)
    state = loop.start()
    for stop in range(EARLY_STOPPING_EVERY, loop.steps + 1, EARLY_STOPPING_EVERY):
        loop.run(state, phi, stop)
        looks.append(
            [
                accuracy(loop.evaluate(state.theta, rows), rows.labels, rows.mask, group.class_mask).tolist()
                for rows in (group.validation, group.test)
            ]
        )
    for task in range(group.size):
        _, best = max((validation[task], look) for look, (validation, _) in enumerate(looks))
        assert got[task].item() == pytest.approx(looks[best][1][task])
    assert any(got[task].item() != looks[-1][1][task] for task in range(group.size)), "the case shows a difference"
