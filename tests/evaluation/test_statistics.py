"""The pairing of tasks, and what comes out for each method."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
from scipy import stats

from palf_dist.evaluation.inference import holm
from palf_dist.evaluation.measures import MEASURES
from palf_dist.evaluation.statistics import Tally, clusters_of, compare, compare_each
from palf_dist.evaluation.table import to_records
from palf_dist.randomness import random_generator


def row(
    method, accuracy, dataset="iris", noise_rate=0.0, condition="balanced", seed=0, architecture=0, noise_kind="uniform"
):
    return {
        "noise_kind": noise_kind,
        "method": method,
        "dataset": dataset,
        "architecture": architecture,
        "noise_rate": noise_rate,
        "condition": condition,
        "seed": seed,
        "accuracy": accuracy,
    }


def by_method(rows):
    return {item.method: item for item in compare(rows)}


def test_differences_are_paired_and_in_points():
    rows = [row("ce", 0.5), row("ce", 0.9, "wine"), row("s5", 0.95, "wine"), row("s5", 0.6)]
    s5 = by_method(rows)["s5"]
    assert s5.overall.value == pytest.approx(77.5)
    assert s5.overall.difference.mean == pytest.approx(7.5)
    assert s5.overall.difference.se == pytest.approx(2.5)
    assert (s5.overall.difference.low, s5.overall.difference.high) == pytest.approx(
        (7.5 - 12.706 * 2.5, 7.5 + 12.706 * 2.5), abs=1e-2
    )
    assert (s5.overall.difference.tasks, s5.overall.difference.clusters) == (2, 2)


@pytest.mark.parametrize(
    "column, value",
    [
        ("dataset", "wine"),
        ("noise_kind", "pair_flip"),
        ("noise_rate", 0.3),
        ("condition", "matched"),
        ("seed", 1),
        ("architecture", 1),
    ],
)
def test_tasks_that_differ_in_any_key_are_never_paired(column, value):
    s5 = by_method([row("ce", 0.5), row("s5", 0.6, **{column: value})])["s5"]
    assert s5.overall.difference.tasks == 0
    assert s5.missing == 2  # each of the two tasks lacks one side
    assert math.isnan(s5.overall.difference.mean) and math.isnan(s5.overall.value)


def test_datasets_of_one_origin_are_one_cluster():
    """Against the same tasks with a single name for both, in the errors, the test and the bootstrap."""
    gains = {"tiles": 0.01, "tiles_fine": 0.02, "digits": 0.04, "wine": -0.01}
    rows = [
        row(name, 0.5 + (gain if name == "s5" else 0), dataset) | {"origin": "tiles" if "t" in dataset[0] else dataset}
        for name in ("ce", "s5")
        for dataset, gain in gains.items()
    ]
    renamed = [each | {"dataset": each["origin"], "architecture": each["dataset"]} for each in rows]
    got, want = by_method(rows)["s5"], by_method(renamed)["s5"]
    assert got.overall == want.overall and got.bootstrap == want.bootstrap
    assert (got.datasets, got.overall.difference.clusters) == (4, 3) and set(got.by_dataset) == set(gains)
    apart = by_method([{**each, "origin": None} for each in rows])["s5"].overall.difference
    assert apart.clusters == 4 and apart.p != got.overall.difference.p
    (pair,) = compare_each(rows, "s5")
    assert pair.overall.difference.clusters == 3


def test_a_source_in_common_joins_clusters():
    origins = {"one": "a b", "two": "c", "three": "d", "both": "e b c", "bare": ""}
    found = clusters_of({"dataset": name, "origin": origin} for name, origin in origins.items())
    assert found["one"] == found["two"] == found["both"]
    assert len({found[name] for name in ("one", "three", "bare")}) == 3


def test_slices_hold_their_own_tasks():
    rows = []
    for dataset in ("iris", "wine"):
        for rate in (0.3, 0.0):
            for condition in ("shifted", "balanced"):
                rows.append(row("ce", 0.5, dataset, rate, condition))
                gain = rate / 10 + (0.02 if condition == "shifted" else 0) + (0.001 if dataset == "wine" else 0)
                rows.append(row("s5", 0.5 + gain, dataset, rate, condition))
    s5 = by_method(rows)["s5"]
    assert {str(noise): part.difference.mean for noise, part in s5.by_noise.items()} == pytest.approx(
        {"0": 1.05, "0.3": 4.05}
    )
    assert list(s5.by_condition) == ["balanced", "shifted"]
    assert s5.by_condition["shifted"].difference.mean == pytest.approx(3.55)
    assert s5.by_cell["balanced", 0.3].difference.mean == pytest.approx(3.05)
    assert s5.by_cell["balanced", 0.3].difference.clusters == 2
    assert s5.by_dataset["wine"].difference.mean == pytest.approx(2.6)
    assert s5.by_dataset["wine"].difference.clusters == 4  # tasks: within one dataset they are the replicates


def test_kinds_of_noise_are_not_mixed():
    rows = []
    for kind, rate, gain in (("uniform", 0.3, 0.1), ("pair_flip", 0.0, 0.2), ("pair_flip", 0.3, 0.4)):
        task = {"noise_rate": rate, "noise_kind": kind}
        rows += [row("ce", 0.5, **task), row("s5", 0.5 + gain, **task)]
    rows += [row("ce", 0.5, seed=1), row("s5", 0.6, seed=1)]
    by_noise = by_method(rows)["s5"].by_noise
    assert [str(noise) for noise in by_noise] == ["0", "0.3", "pair-flip 0.3"]
    assert [part.difference.mean for part in by_noise.values()] == pytest.approx([15, 10, 40])


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_missing_and_non_finite_results_are_counted(bad):
    rows = [row("ce", 0.5, seed=seed) for seed in range(4)]
    rows += [row("s5", 0.6, seed=0), row("s5", bad, seed=1), row("s5", 0.7, seed=2)]
    s5 = by_method(rows)["s5"]
    assert (s5.missing, s5.non_finite, s5.overall.difference.tasks) == (1, 1, 2)
    assert s5.overall.difference.mean == pytest.approx(15)
    ce = by_method(rows)["ce"]
    assert (ce.missing, ce.non_finite, ce.overall.difference.tasks) == (0, 0, 4)


def test_two_results_of_one_task_are_an_error():
    with pytest.raises(AssertionError, match="two results of ce"):
        compare([row("ce", 0.5), row("ce", 0.6)])


def test_the_reference_must_be_there():
    with pytest.raises(AssertionError, match="reference"):
        compare([row("s5", 0.5)])


def test_an_arrow_table_gives_the_same_and_noise_rates_survive_float32():
    rows = [row(name, 0.5 + 0.1 * seed, seed=seed, noise_rate=0.15) for name in ("ce", "s5") for seed in range(3)]
    table = pa.Table.from_pylist(rows)
    narrow = table.set_column(
        table.column_names.index("noise_rate"), "noise_rate", table["noise_rate"].cast(pa.float32())
    )
    assert compare(table) == compare(rows) == compare(narrow)


def test_order_reference_first_then_by_difference():
    rows = [row(name, value) for name, value in {"s5": 0.6, "focal": 0.4, "ce": 0.5, "policy": 0.7}.items()]
    rows.append(row("uniform", math.nan))
    assert [item.method for item in compare(rows)] == ["ce", "policy", "s5", "focal", "uniform"]


def test_another_reference_turns_the_signs():
    rows = [row("ce", 0.5), row("ce", 0.9, "wine"), row("s5", 0.95, "wine"), row("s5", 0.6)]
    (first, ce) = compare(rows, reference="s5")
    assert (first.method, first.overall.difference.mean) == ("s5", 0)
    mirrored = by_method(rows)["s5"]
    assert ce.overall.difference.mean == pytest.approx(-mirrored.overall.difference.mean)
    assert ce.overall.difference.p == pytest.approx(mirrored.overall.difference.p)
    assert ce.bootstrap == pytest.approx((-mirrored.bootstrap[1], -mirrored.bootstrap[0]))


def test_one_method_against_each_the_hardest_first():
    levels = {"ce": 0.5, "s5": 0.62, "focal": 0.4, "policy": 0.6}
    rows = [
        row(name, level + 0.01 * index * (name == "ce"), dataset)
        for name, level in levels.items()
        for index, dataset in enumerate(("iris", "wine", "digits"))
    ]
    pairs = compare_each(rows, "policy")
    assert [(item.method, item.reference) for item in pairs] == [("policy", name) for name in ("s5", "ce", "focal")]
    assert [item.overall.difference.mean for item in pairs] == pytest.approx([-2, 9, 20])
    raw = {item.reference: item.overall.difference.p for item in pairs}
    assert {item.reference: item.adjusted_p for item in pairs} == pytest.approx(holm(raw))


def test_the_p_values_of_a_table_are_corrected_together():
    random = random_generator("holm")
    rows = [
        row(name, 0.5 + gain + 0.03 * random.normal(), dataset)
        for name, gain in {"ce": 0.0, "s5": 0.05, "focal": 0.01, "uniform": -0.02}.items()
        for dataset in "abcdef"
    ]
    compared = by_method(rows)
    raw = {name: item.overall.difference.p for name, item in compared.items() if name != "ce"}
    assert {name: compared[name].adjusted_p for name in raw} == pytest.approx(holm(raw))
    assert math.isnan(compared["ce"].adjusted_p)
    differences = [s["accuracy"] - c["accuracy"] for s, c in zip(rows[6:12], rows[:6], strict=True)]
    assert raw["s5"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_oracles_and_controls_are_not_corrected_for():
    random = random_generator("family")
    names = ("ce", "policy", "s5", "focal", "static_oracle", "static_oracle_left_out", "policy_shuffled")
    rows = [row(name, 0.5 + 0.03 * random.normal(), dataset) for name in names for dataset in "abcdef"]
    for compared in (compare(rows), compare_each(rows, "policy")):
        others = {item.method if item.method != "policy" else item.reference: item for item in compared}
        left = {name: item for name, item in others.items() if not math.isnan(item.adjusted_p)}
        assert left.keys() <= {"ce", "s5", "focal"} and len(left) >= 2
    compared = by_method(rows)
    raw = {name: compared[name].overall.difference.p for name in ("policy", "s5", "focal")}
    assert {name: compared[name].adjusted_p for name in raw} == pytest.approx(holm(raw))


def test_datasets_within_a_condition_and_noise_rate_have_their_own_tasks():
    random = random_generator("within")
    rows = [
        row(name, 0.5 + 0.05 * random.normal(), dataset, rate, condition, seed)
        for name in ("ce", "s5")
        for dataset in ("iris", "wine")
        for rate in (0.0, 0.3)
        for condition in ("balanced", "shifted")
        for seed in range(4)
    ]
    s5 = by_method(rows)["s5"]
    assert list(s5.by_dataset_cell) == [(c, r) for c in ("balanced", "shifted") for r in (0.0, 0.3)]
    chosen = [
        [
            each["accuracy"]
            for each in rows
            if (each["method"], each["dataset"]) == (name, "wine")
            and (each["condition"], each["noise_rate"]) == ("shifted", 0.3)
        ]
        for name in ("s5", "ce")
    ]
    got = s5.by_dataset_cell["shifted", 0.3]["wine"].difference
    assert (got.tasks, got.p) == (4, pytest.approx(stats.ttest_rel(*chosen).pvalue))
    (record,) = [each for each in to_records(compare(rows)) if each["method"] == "s5"]
    within = record["by_dataset_within"]["shifted 0.3"]
    raw = {name: part["p"] for name, part in within.items()}
    assert {name: part["p_holm"] for name, part in within.items()} == pytest.approx(holm(raw), abs=1e-8)


def test_a_dataset_is_won_where_its_own_interval_leaves_zero():
    gains = {
        "won": (0.1, 0.11, 0.12),
        "lost": (-0.1, -0.1, -0.1),
        "tied": (0.1, -0.05, 0.02),
        "equal": (0.0, 0.0, 0.0),
        "won_once": (0.01,),
        "tied_once": (0.0,),
    }
    rows = [
        row(name, 0.5 + (gain if name == "s5" else 0), dataset, seed=seed)
        for name in ("ce", "s5")
        for dataset, values in gains.items()
        for seed, gain in enumerate(values)
    ]
    assert by_method(rows)["s5"].tally == Tally(wins=2, ties=3, losses=1)
    assert by_method(rows)["ce"].tally == Tally(0, 6, 0)
    errors = [{**each, "nll": 1 - each["accuracy"]} for each in rows]
    nll = {item.method: item for item in compare(errors, measure=MEASURES["nll"])}["s5"]
    assert nll.tally == Tally(wins=2, ties=3, losses=1), "lower is better"


def test_other_measures_come_with_accuracy_where_there_are_any():
    rows = [
        row("ce", 0.5) | {"nll": 2.0, "auc": None},
        row("ce", 0.5, "wine") | {"nll": 1.0, "auc": None},
        row("s5", 0.4) | {"nll": 1.5, "auc": None},
        row("s5", 0.4, "wine") | {"nll": None, "auc": None},
    ]
    (ce, s5) = compare(rows)
    assert list(ce.others) == list(s5.others) == ["nll"]
    nll = s5.others["nll"]
    assert (nll.overall.value, nll.overall.difference.mean) == (1.5, -0.5), "not scaled"
    assert (nll.non_finite, nll.overall.difference.tasks) == (1, 1)
    assert compare(rows, measure=MEASURES["nll"])[1] == nll
