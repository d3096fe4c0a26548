"""What is said of a policy is what was planted in its trajectories, and what pandas finds."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from palf_dist.config import PolicyConfig
from palf_dist.evaluation.inference import clustered_mean
from palf_dist.evaluation.interpretation import Interpretation, interpret
from palf_dist.evaluation.interpretation_tables import in_words, section, tables, to_record
from palf_dist.policies import make_policy, policy_spec
from palf_dist.policies.policy_file import PolicyArtefact
from palf_dist.randomness import random_generator
from tests.evaluation.recorded import by_noise, constant, facts, in_phases, played, rising, run_config, time

CONTROLS = {
    "robust_ce": in_phases,
    "ce": lambda task, times: 1 - in_phases(task, times),
    "e": by_noise,
    "wd": lambda task, times: 1 + in_phases(task, times),
}
FEATURES = {"time": time, "loss": rising, "noise_rate": by_noise, "entropy": constant(0.4)}


def artefact(*features: str) -> PolicyArtefact:
    """A policy that reads these features and was drawn at random."""
    spec = policy_spec(PolicyConfig(features=features or tuple(FEATURES), hidden=4))
    size = len(spec.features)
    phi = random_generator("phi").normal(size=make_policy(spec, [0.0] * size, [1.0] * size).num_parameters)
    zero = np.zeros(size, np.float32)
    return PolicyArtefact(spec, phi.astype(np.float32), zero, zero + 1)


def of(controls=CONTROLS, *overrides: str, policy: PolicyArtefact | None = None, noise: float = 0.02) -> Interpretation:
    table = pa.concat_tables([played(step, controls, FEATURES, noise=noise, every=25) for step in range(3)])
    return interpret(table, run_config(*overrides), facts(), [policy])


@pytest.fixture(scope="module")
def item() -> Interpretation:
    return of(policy=artefact())


def test_the_curves_are_means_over_tasks_with_errors_clustered_by_dataset(item: Interpretation) -> None:
    table = pa.concat_tables([played(step, CONTROLS, FEATURES, noise=0.02) for step in range(3)]).to_pandas()
    assert [*item.curves] == ["all", "family", "noise", "architecture"]
    assert item.runs.names == ("alpha_ce", "alpha_robust_ce", "e", "wd")
    noisy = table[table.noise_rate > 0.3]
    curve = item.curves["noise"]["noise above 0.3"]
    means = noisy.groupby("inner_step")[list(item.runs.names)].mean()
    assert curve.array("mean") == pytest.approx(means.to_numpy(), abs=1e-6)
    late = noisy[noisy.inner_step == 140]
    expected = clustered_mean(late["alpha_ce"].astype(float), late["dataset"].tolist())
    assert (curve.array("low")[14, 0], curve.array("high")[14, 0]) == pytest.approx((expected.low, expected.high))
    assert (curve.runs, curve.clusters) == (18, 6)
    image = item.curves["family"]["image"]
    early = table[table.dataset.isin(["digits", "fashion-mnist"]) & (table.inner_step < 30)]
    assert image.phases[0][1].mean == pytest.approx(early["alpha_robust_ce"].mean(), abs=1e-6)
    assert [row[1].mean for row in image.phases] == pytest.approx([0.2, 0.8, 0.5], abs=0.02)


def test_planted_phases_are_found_for_all_and_for_each_family(item: Interpretation) -> None:
    assert [*item.phases] == ["all", "image", "tabular", "text"]
    for phases in item.phases.values():
        assert phases.boundaries == pytest.approx((0.2, 0.8)) and phases.agree == (True, True)
        assert phases.by_phases > 0.95 and phases.ahead[0] > 0.1
    words = in_words(item.phases["all"])
    assert words.startswith("boundaries at 20 % (20 to 20 %) and 80 % (80 to 80 %) of the run, resolved to 7 %; three")


def test_a_ramp_is_said_to_be_none() -> None:
    item = of({"robust_ce": rising, "wd": lambda task, times: 3 - times})
    found = item.phases["all"]
    assert found.by_line > found.by_phases and found.ahead[1] < 0
    assert "explains as much the controls change gradually" in "".join(section(item)).replace("\n", " ")


def test_no_control_counts_by_its_scale() -> None:
    """wd goes its own way on a scale a thousand times as large; three others outvote it."""
    half = np.digitize

    def three(task, times):
        return 0.3 * half(times, [0.2 - 1e-9, 0.8 - 1e-9])

    def other(task, times):
        return 1000.0 * half(times, [0.4, 0.6])

    item = of({"focal": three, "mae": three, "robust_ce": three, "wd": other}, noise=0.0)
    assert item.phases["all"].boundaries == pytest.approx((0.2, 0.8))


def test_a_weight_and_its_mirror_count_once() -> None:
    def early(task, times):
        return 0.1 + 0.8 * (times > 0.3)

    def late(task, times):
        return 2.0 * (times > 0.6) + 1

    mirrored = {"ce": lambda task, times: 1 - early(task, times), "robust_ce": early, "wd": late}
    both, once = of(mirrored, noise=0.0), of({name: mirrored[name] for name in ("robust_ce", "wd")}, noise=0.0)
    assert both.phases["all"] == once.phases["all"]


def test_importance_is_of_the_policy_on_the_recorded_states(item: Interpretation) -> None:
    assert item.importance is not None and item.importance.features == tuple(FEATURES)
    among, along = ((draws.mean((0, 2)) > 0).tolist() for draws in (item.importance.among, item.importance.along))
    assert (among, along) == ([False, False, True, False], [True, True, False, False])
    assert item.importance.by_run.shape == (54, 4)


def test_several_policies_are_averaged() -> None:
    table = played(0, CONTROLS, FEATURES)
    both = pa.concat_tables([table.append_column("run", pa.array([index] * table.num_rows)) for index in (0, 1)])
    one, other = artefact(), artefact()
    other = PolicyArtefact(other.spec, -2 * other.phi, other.mean, other.std)
    found = interpret(both, run_config(), facts(), [one, other]).importance
    alone = [
        interpret(part.append_column("run", pa.array([index] * part.num_rows)), run_config(), facts(), [one, other])
        for index, part in enumerate((table, table))
    ]
    assert found.among == pytest.approx(np.mean([each.importance.among for each in alone], 0))
    assert found.by_run == pytest.approx(np.concatenate([each.importance.by_run for each in alone]))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (None, "no policy that can be read"),
        (artefact("time", "accuracy"), "do not hold what the policy reads: accuracy"),
        (artefact("entropy"), "says the same of all that was recorded"),
    ],
)
def test_why_there_is_no_importance(policy: PolicyArtefact | None, reason: str) -> None:
    item = of(policy=policy)
    assert item.importance is None and reason in item.not_measured["importance"] and item.phases
    assert "Not measured: importance (" in "".join(section(item)) and to_record(item)["importance"] is None


def test_a_policy_without_a_state_and_one_that_stays_where_it_is() -> None:
    spec = policy_spec(PolicyConfig(kind="constant"))
    phi, nothing = np.zeros(6, np.float32), np.zeros(0, np.float32)
    item = of(policy=PolicyArtefact(spec, phi, nothing, nothing))
    assert item.not_measured["importance"] == "the policy reads no state"
    still = of({"e": constant(0.3)}, noise=0.0)
    assert not still.curves and set(still.not_measured.values()) == {"the policy moves no control"}
    assert section(still) == ["Not measured: the policy moves no control.\n"] and tables(still) == []
    longer = of(CONTROLS, "inner.steps=300")
    assert longer.not_measured["curves"] == "no inner run of the trajectories is whole and finite (54 are not)"
    assert section(None) == ["Not measured: these runs have no trajectories.\n"]
    json.dumps([to_record(still), to_record(longer)], allow_nan=False)


def test_too_few_refreshes_have_no_phases() -> None:
    table = played(0, CONTROLS, FEATURES)
    rare = table.filter(pa.compute.equal(pa.compute.bit_wise_and(table["inner_step"], 1), 0))  # all
    few = rare.filter(pa.array(np.isin(table["inner_step"].to_numpy(), [0, 50, 100])))
    item = interpret(few, run_config("policy.refresh=50"), facts(), [artefact()])
    assert item.not_measured == {"phases": "the policy is asked 3 times in a run, and two boundaries take 6"}
    assert item.curves["all"]["all"].phases[2] == [None] * 4 and " → -" in "".join(section(item))
    assert to_record(item)["controls"][0]["means"]["e"]["80-100 %"] is None


def test_the_record_is_json_and_the_tables_are_whole(item: Interpretation) -> None:
    record = json.loads(json.dumps(to_record(item), allow_nan=False))
    assert [entry["group"] for entry in record["controls"]] == [
        *("all", "image", "tabular", "text"),
        *("no label noise", "noise up to 0.3", "noise above 0.3"),
        *("conv", "mlp 2", "mlp 3"),
    ]
    assert record["phases"]["all"]["paper_within"] == [True, True] and record["not_measured"] == {}
    features = record["importance"]["features"]
    assert {*features} == {*FEATURES} and features["time"]["among_tasks"]["mean"] == {"mean": 0.0, "sd": 0.0}
    total = [
        sum(features[name][kind]["mean"]["mean"] for kind in ("among_tasks", "along_the_run")) for name in features
    ]
    assert total == sorted(total, reverse=True) and not math.isclose(total[0], 0)
    for each in tables(item):
        header, rows = each.cells
        assert rows and all(len(row) == len(header) for row in rows)
    page = "".join(section(item))
    assert "| - | all | 54 | 6 |" in page and "| family | image | 18 | 2 |" in page
