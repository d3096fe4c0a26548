"""Steps to the reference's accuracy, and the rows of methods that pick a static loss: against plain arithmetic."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palf_dist.evaluation.derived import PICKS, held_out, pick_rows, with_steps
from palf_dist.evaluation.methods import METHODS, ORACLES
from palf_dist.evaluation.report import headline_sentence
from palf_dist.evaluation.statistics import task_of
from palf_dist.evaluation.table import table_notes, to_main_markdown, to_records
from tests.evaluation.synthetic import few_rows

STATICS = ("ce", "focal", "s5")
USES = ("policy_trainval", "policy_shielded")


def row(method, accuracy, seed=0, dataset="iris", **columns):
    task = {"dataset": dataset, "architecture": "mlp", "noise_rate": 0.3, "condition": "balanced", "seed": seed}
    return {"method": method, **task, "accuracy": accuracy} | columns


def curve(method, *accuracies, **columns):
    steps = [10 * index for index in range(len(accuracies))]
    return row(method, accuracies[-1], curve_accuracy=list(accuracies), curve_steps=steps, **columns)


def picked(rows, name):
    return {task_of(each): each for each in pick_rows(rows) if each["method"] == name}


def test_steps_to_the_reference_s_best_of_the_same_task():
    rows = [
        curve("ce", 0.1, 0.5, 0.8, 0.7),
        curve("s5", 0.1, 0.77, 0.79, 0.9),
        curve("focal", 0.1, 0.2, 0.3, 0.4),
        curve("ce", 0.1, 0.2, 0.2, 0.2, seed=1),
        curve("s5", 0.1, 0.2, 0.1, 0.1, seed=1),
        curve("s5", 0.1, 0.9, 0.9, 0.9, seed=2),  # without a reference
    ]
    got = with_steps(rows)
    names = ("steps_to_best", "reached_best", "steps_to_95", "reached_95")
    assert [tuple(each.get(name) for name in names) for each in got] == [
        (20, 1, 20, 1),
        (30, 1, 10, 1),
        (30, 0, 30, 0),  # never: all steps of the run
        (10, 1, 10, 1),
        (10, 1, 10, 1),
        (None, None, None, None),
    ]
    assert rows[0].keys() == got[-1].keys(), "rows are not changed in place"


def test_rows_of_earlier_versions_have_no_curves():
    rows = [row("ce", 0.5), row("s5", 0.6)]
    assert with_steps(rows) == rows
    compared, pairs = held_out(rows)
    assert [item.method for item in compared] == ["ce", "s5", "static_oracle"] and pairs == []
    assert compared[0].others == {}


accuracies = st.lists(st.tuples(*[st.sampled_from([0.4, 0.5, 0.6, 0.7])] * 6), min_size=2, max_size=4)


@settings(max_examples=30)
@given(accuracies)
def test_picks_are_the_best_by_their_score(drawn):
    """Each draw holds the accuracies and then the validation accuracies of the static methods under one seed."""
    rows = [
        row(name, values[index], seed, validation_accuracy=values[3 + index], seconds=1.0, extra=values[index] / 2)
        for seed, values in enumerate(drawn)
        for index, name in enumerate(STATICS)
    ]
    others = ("policy", "curriculum", "ce_trainval", "ce_early_stopping", "ce_by_validation", "tuneloss")
    # the validation accuracies of the last three are the largest of their looks
    rows += [row(other, 1.0, seed, validation_accuracy=1.0, seconds=1.0) for other in others for seed in range(2)]
    table = np.array(drawn)
    scores = {
        "static_oracle": table[:, :3],
        "static_by_validation": table[:, 3:],
        "static_oracle_left_out": np.array([np.delete(table[:, :3], seed, 0).mean(0) for seed in range(len(table))]),
    }
    for name, score in scores.items():
        got = picked(rows, name)
        assert len(got) == len(table)
        for task, made in got.items():
            seed = task[-1]
            best = np.isclose(score[seed], score[seed].max(), rtol=0, atol=1e-15)
            assert made["accuracy"] == pytest.approx(table[seed, :3][best].mean())
            assert made["extra"] == pytest.approx(made["accuracy"] / 2)
            assert made["seconds"] == 3, "all of them were trained"
    oracle, left_out = picked(rows, "static_oracle"), picked(rows, "static_oracle_left_out")
    assert all(oracle[task]["accuracy"] >= left_out[task]["accuracy"] - 1e-12 for task in oracle)


def test_equals_share_their_curves_too():
    tied = [curve("ce", 0.1, 0.3, 0.5, auc=0.6), curve("s5", 0.1, 0.5, 0.5, auc=None), curve("focal", 0.1, 0.2, 0.4)]
    (made,) = picked([{**each, "auc": each.get("auc")} for each in tied], "static_oracle").values()
    assert made["curve_accuracy"] == pytest.approx([0.1, 0.4, 0.5]) and made["curve_steps"] == [0, 10, 20]
    assert made["auc"] is None and made["seed"] == 0 and made["dataset"] == "iris"


@pytest.mark.parametrize("bad", [math.nan, None])
def test_a_task_that_lacks_a_candidate_has_no_pick(bad):
    rows = [row(name, 0.5, seed, validation_accuracy=0.5) for name in STATICS for seed in range(3)]
    rows[0]["accuracy"] = bad
    rows[4]["validation_accuracy"] = bad
    del rows[8]
    assert [task[-1] for task in picked(rows, "static_oracle")] == [1]
    assert picked(rows, "static_by_validation") == {}


def test_a_single_seed_leaves_nothing_out_and_a_single_loss_nothing_to_pick():
    rows = [row(name, 0.5, validation_accuracy=0.5) for name in STATICS]
    assert {each["method"] for each in pick_rows(rows)} == {"static_oracle", "static_by_validation"}
    assert pick_rows(rows[:1]) == []


def test_picks_are_rows_of_the_comparison():
    compared, pairs = held_out(few_rows())
    names = {item.method for item in compared}
    picks = {"static_oracle", "static_by_validation", "best_static"}  # one seed: nothing to leave out
    assert names == {"policy", "ce", "s5"} | picks
    assert {item.reference for item in pairs} == names - {"policy"} and {item.method for item in pairs} == {"policy"}
    by_name = {item.method: item for item in compared}
    against = {item.reference: item.overall.difference.mean for item in pairs}
    gained = by_name["policy"].overall.difference.mean - by_name["static_oracle"].overall.difference.mean
    assert against["static_oracle"] == pytest.approx(gained)
    assert "steps_to_best" in by_name["s5"].others and by_name["ce"].others["reached_best"].overall.value == 100
    assert PICKS.keys().isdisjoint(METHODS) and PICKS.keys() - set(ORACLES) == {"static_by_validation", "best_static"}


def test_the_policy_is_compared_with_itself_in_another_use_and_not_the_other_way_round():
    rows = few_rows()
    better = [row | {"method": name, "accuracy": 0.99} for name in USES for row in rows if row["method"] == "s5"]
    compared, pairs = held_out(better + rows)
    assert {item.method for item in pairs} == {"policy"} and {*USES} < {item.reference for item in pairs}
    plain, _ = held_out(rows)
    kept = [item for item in compared if item.method not in USES]
    assert [(item.method, item.overall) for item in kept] == [(item.method, item.overall) for item in plain]
    text = to_main_markdown(compared)
    assert re.findall(r"^\| \*\*(.*?)\*\*", text, re.MULTILINE) == ["meta-learned policy"]
    policy = next(item for item in compared if item.method == "policy")
    assert f"{policy.overall.difference.mean:+.2f} points against tuned CE" in headline_sentence(compared)
    assert held_out([row for row in rows + better if row["method"] != "policy"])[1] == []


def tuned_rows():
    """Two tasks of each of two architectures; the best of the tuning is s5 on one and the tuned focal on the other."""
    scores = {"mlp": {"ce": 0.5, "focal_tuned": 0.6, "s5": 0.7}, "conv": {"ce": 0.5, "focal_tuned": 0.8, "s5": 0.7}}
    chosen = {"mlp": '{"gamma":3.0}', "conv": '{"gamma":0.5}'}
    return [
        row(
            method,
            0.9 if method == "ce" else 0.4 + 0.1 * seed,
            seed,
            architecture=architecture,
            tuning_accuracy=score,
            tuned=chosen[architecture] if method == "focal_tuned" else None,
            seconds=2.0,
        )
        for architecture, by_method in scores.items()
        for method, score in by_method.items()
        for seed in range(2)
    ]


def test_the_best_static_loss_is_that_of_the_tuning_whatever_the_held_out_rows_say():
    rows = tuned_rows()
    found = picked(rows, "best_static")
    assert len(found) == 4
    for task, made in found.items():
        assert made["picked"] == (["s5"] if task.architecture == "mlp" else ["focal_tuned"])
        assert made["accuracy"] == 0.4 + 0.1 * task.seed and made["seconds"] == 2.0, "one training, not one of each"
        assert made["tuned"] is None
    assert picked(rows, "static_oracle")[task]["accuracy"] == 0.9
    rows[0]["tuning_accuracy"] = None
    assert len(picked(rows, "best_static")) == 3, "a loss that was not looked at"


def test_what_tuning_chose_stands_with_the_results():
    compared, pairs = held_out([*tuned_rows(), *(row("policy", 0.9, s, architecture="mlp") for s in range(2))])
    chosen = {item.method: item.chosen for item in compared}
    assert chosen["focal_tuned"] == ("gamma = 3 (mlp)", "gamma = 0.5 (conv)")
    assert chosen["best_static"] == ("s5 (mlp)", "focal_tuned (conv)")
    assert chosen["ce"] == chosen["s5"] == chosen["policy"] == ()
    assert "best_static" in {item.reference for item in pairs}
    note = "best tuned static, as chosen on meta-training tasks: s5 (mlp); focal_tuned (conv)."
    assert note in table_notes(compared)
    records = {record["method"]: record for record in to_records(compared)}
    assert records["focal_tuned"]["chosen"] == ["gamma = 3 (mlp)", "gamma = 0.5 (conv)"]
    assert "chosen" not in records["s5"]


def test_losses_that_tie_in_the_tuning_are_both_named():
    rows = [row("ce", 0.5, tuning_accuracy=0.6, tuned=None)]
    rows += [row(name, 0.7, tuning_accuracy=0.8, tuned=chosen) for name, chosen in (("s5", None), ("s5_tuned", "{}"))]
    (made,) = picked(rows, "best_static").values()
    assert made["picked"] == ["s5", "s5_tuned"] and made["accuracy"] == 0.7
