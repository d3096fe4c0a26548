"""Verdicts follow from figures and their intervals alone."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from palf_dist.config_loading import parse_config
from palf_dist.evaluation.claims import CLAIMS, Evidence, findings, judge, phase_gains
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.headline import headline
from palf_dist.evaluation.inference import clustered_mean
from tests.evaluation.synthetic import few_rows, trajectory

PAPER = ("ce", "focal", "label_smoothing", "symmetric_ce", "info_nce")


def config(*overrides):
    return parse_config("data: {train: [digits], held_out: [iris, wine]}", "a", overrides)


def evidence(rows, *overrides, trajectories=None):
    compared, pairs = held_out(rows)
    figures = headline(rows, compared, pairs)
    return Evidence(config(*overrides), figures, {}, rows, compared, pairs, trajectories)


def found(rows, start, *overrides, **more):
    """The entry of the claim that begins like this."""
    (entry,) = (each for each in findings(evidence(rows, *overrides, **more)) if each["claim"].startswith(start))
    return entry


def with_gain(points):
    """CE at 80 %, the policy above it by these points on each dataset, with a bit of scatter."""
    rows = []
    for index, dataset in enumerate("abcd"):
        for seed in range(2):
            for method, gain in (("ce", 0.0), ("policy", points + 0.1 * (index - 1.5))):
                task = {"dataset": dataset, "architecture": "mlp", "noise_rate": 0.4, "condition": "balanced"}
                score = {"accuracy": 0.8 + gain / 100, "balanced_accuracy": 0.7 + gain / 100}
                rows.append({"method": method, **task, "seed": seed, "target_prior": "train", **score})
    return rows


@pytest.mark.parametrize(
    ("values", "claimed", "verdict"),
    [
        ([3.0, 3.1, 2.9], 2.3, "reproduced"),
        ([2.3, 2.3, 2.3], 2.3, "reproduced"),
        ([2.0, 2.1, 1.9], 2.3, "not reproduced"),  # a gain, but a smaller one
        ([3.0, 9.0, -3.0], 2.3, "not reproduced"),  # as large, but nothing is sure
        ([-1.0, -1.1, -0.9], 2.3, "opposite"),
        ([0.0, 0.0, 0.0], 0.0, "not reproduced"),
        ([5.0], 0.0, "not measured"),
    ],
)
def test_the_rule(values, claimed, verdict):
    assert judge(clustered_mean(values, range(len(values))), claimed) == verdict


@pytest.mark.parametrize(("points", "verdict"), [(3.5, "reproduced"), (2.5, "not reproduced"), (-1.0, "opposite")])
def test_errors_avoided(points, verdict):
    """Of 20 % errors 15 % are 3 points."""
    entry = found(with_gain(points), "15-35 %")
    assert entry["verdict"] == verdict and entry["measured"].startswith(f"{5 * points:+.2f} (")


def test_nothing_measured_is_no_verdict():
    rows = with_gain(1.0)
    assert found(rows, "+1.7 points")["verdict"] == "not measured"  # no such method
    assert found(rows, "95 % of the final")["verdict"] == "not measured"  # no curves
    assert found(rows, "3.2 %")["verdict"] == "not measured"
    assert found(rows, "more robust: class imbalance")["verdict"] == "not measured"
    assert found([row for row in rows if row["dataset"] == "a"], "more robust: label")["verdict"] == "not measured"


def test_imbalanced_conditions_are_those_of_the_suite():
    rows = [{**row, "condition": "skewed"} for row in with_gain(1.0)]
    suite = "evaluation.suite_conditions=[{name: skewed, imbalance: 10.0}, {name: as-is}]"
    entry = found(rows, "more robust: class imbalance", suite)
    assert entry["verdict"] == "reproduced" and "+1.00 (.06) points of balanced accuracy" in entry["measured"]
    assert found(rows, "more robust: class imbalance")["verdict"] == "not measured"


def test_ahead_of_every_method_on_every_dataset():
    start = "better than every baseline"
    assert found(with_gain(1.0), start)["verdict"] == "reproduced"
    assert found(with_gain(0.0), start) == {
        "claim": "better than every baseline on every dataset (5.2, table 1)",
        "measured": "ahead of all 1 other methods on 2 of 4 datasets",
        "verdict": "not reproduced",
    }
    assert found(with_gain(-1.0), start)["verdict"] == "opposite"


@pytest.mark.parametrize(
    ("reached", "measured", "verdict"),
    [
        (50, "+50.00", "reproduced"),
        (70, "+30.00", "not reproduced"),
        (150, "-50.00", "opposite"),
    ],
)
def test_fewer_steps(reached, measured, verdict):
    """CE is at its best after 100 steps."""
    steps = [0, 50, 70, 100, 150]
    curves = {"ce": [0.1, 0.1, 0.1, 0.8, 0.8], "policy": [0.8 if step >= reached else 0.1 for step in steps]}
    rows = [{**row, "curve_steps": steps, "curve_accuracy": curves[row["method"]]} for row in with_gain(0.0)]
    entry = found(rows, "95 % of the final")
    assert entry["measured"].startswith(measured) and entry["verdict"] == verdict


def played(shares):
    """A trajectory whose mixture weights go by these functions of t / T, the same on all tasks."""
    table = trajectory(0, tasks=10, basis=PAPER)
    times = table["inner_step"].to_numpy() / 150
    for name in PAPER:
        place = table.schema.get_field_index(f"alpha_{name}")
        table = table.set_column(place, table.schema.field(place), pa.array(shares(name, times), pa.float32()))
    return table.append_column("run", pa.array([0] * table.num_rows))


def as_claimed(name, times):
    phase = np.digitize(times, [0.2, 0.8])
    raised = {"focal": [3, 1, 2], "info_nce": [3, 1, 1], "ce": [1, 3, 1], "label_smoothing": [1, 3, 5]}
    return 0.05 * np.array(raised.get(name, [1, 1, 3]))[phase]


def test_phases():
    table = played(as_claimed)
    gains = phase_gains(table, 150)
    assert [gain.mean for gain in gains] == pytest.approx([20, 20, 20], abs=1e-4)
    start, kind = "phases", "policy.kind=palf"
    assert found(with_gain(0.0), start, kind, trajectories=table)["verdict"] == "reproduced"
    flat = played(lambda name, times: np.full(len(times), 0.2))
    assert found(with_gain(0.0), start, kind, trajectories=flat)["verdict"] == "not reproduced"
    reverse = played(lambda name, times: 0.4 - as_claimed(name, times))
    assert found(with_gain(0.0), start, kind, trajectories=reverse)["verdict"] == "opposite"
    early = table.filter(pa.compute.less(table["inner_step"], 100))
    assert found(with_gain(0.0), start, kind, trajectories=early)["verdict"] == "not measured"
    assert found(with_gain(0.0), start, kind)["measured"] == "nothing: these runs have no trajectories"
    robust = found(with_gain(0.0), start, trajectories=table)
    assert robust["verdict"] == "not measured" and "mixes ce, robust_ce, without focal, info_nce" in robust["measured"]


def test_every_claim_has_an_entry_of_three_texts():
    entries = findings(evidence(few_rows()))
    assert [entry["claim"] for entry in entries] == [claim.text for claim in CLAIMS]
    assert all(list(entry) == ["claim", "measured", "verdict"] for entry in entries)
    assert json.loads(json.dumps(entries)) == entries
    verdicts = {"reproduced", "not reproduced", "opposite", "not measured"}
    assert {entry["verdict"] for entry in entries} <= verdicts
