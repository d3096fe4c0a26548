"""Which runs may be joined: every refusal, and what is told apart."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palf_dist.errors import PolicyFileError, RunDirectoryError
from palf_dist.evaluation.results_file import results_bytes
from palf_dist.evaluation.runs import ROUNDED, ROUNDING, read_run, read_runs, unlike
from palf_dist.run_directory import CONFIG, RESULTS
from tests.evaluation.judged import judged_run, rows_of
from tests.evaluation.synthetic import few_rows, write_run


def rows(*datasets, **changes):
    """The results on iris as those on each of these."""
    of_iris = [row for row in few_rows() if row["dataset"] == "iris"]
    return [{**row, "dataset": name, "origin": name, **changes} for name in datasets for row in of_iris]


@pytest.fixture
def fold(tmp_path):
    """A run that others are joined with."""
    return judged_run(tmp_path / "fold-0", rows("iris"))


def refused(*places):
    with pytest.raises(RunDirectoryError) as caught:
        read_runs(places)
    return str(caught.value)


def test_rows_are_joined_whatever_the_order(tmp_path, fold):
    other = judged_run(tmp_path / "a", rows("wine", "segment"))
    runs = read_runs([other, fold])
    assert [run.place for run in runs.folds] == [fold, other] and runs.families == []
    assert runs.rows == rows("iris") + rows("wine", "segment")
    assert runs.config == read_runs([fold]).config


def test_a_run_without_results_is_told_how_to_go_on(tmp_path, fold):
    bare = str(write_run(tmp_path / "bare", outer_steps=1, trajectories=0))
    message = refused(fold, bare)
    assert f"{bare}: has not been evaluated" in message and f"palf-dist meta-train --resume {bare}" in message
    assert "holds no run (config.yaml is missing)" in refused(fold, str(tmp_path / "nowhere"))


def test_a_search_is_one_message(tmp_path, fold):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / CONFIG).write_text("target: {kind: x}\n")
    assert "search: holds a search and no meta-training" in refused(fold, str(tmp_path / "search"))


def test_damaged_results_and_policies_are_named(tmp_path, fold):
    other = tmp_path / "other"
    judged_run(other, rows("wine"))
    whole = (other / RESULTS).read_bytes()
    (other / RESULTS).write_bytes(b"PAR1 torn")
    assert f"{other}/results.parquet: cannot be read" in refused(fold, str(other))
    for some in (rows("wine")[1:], rows("iris"), rows("wine") + rows("iris")):
        pq.write_table(pa.Table.from_pylist(some), other / RESULTS)
        assert "does not hold what the run's own config.yaml asks for" in refused(fold, str(other))
    pq.write_table(pa.table({"method": ["ce"], "dataset": ["wine"]}), other / RESULTS)
    assert "lack accuracy, architecture, condition, family" in refused(fold, str(other))
    (other / RESULTS).write_bytes(whole)
    (other / "best" / "policy.json").unlink()
    with pytest.raises(PolicyFileError, match=r"there is no policy\.json"):
        read_runs([fold, str(other)])


def test_results_alone_are_a_run(tmp_path, fold):
    """The file of a run, by another name and without its folder."""
    other = judged_run(tmp_path / "other", rows("wine"))
    run = read_run(other)
    alone = tmp_path / "published.parquet"
    alone.write_bytes(results_bytes(run.rows, run.config, run.card))
    found = read_run(str(alone))
    assert found == replace(run, place=str(alone), alone=True)
    joined = read_runs([str(alone), fold])
    assert joined.rows == read_runs([fold, other]).rows and [run.place for run in joined.explained] == [fold]
    assert f"wine: is judged by both {other} and {alone}" in refused(fold, other, str(alone))
    pq.write_table(pa.Table.from_pylist([*run.rows]), alone)
    assert f"{alone}: does not say of which configuration and policy" in refused(fold, str(alone))
    assert "nowhere.parquet: cannot be read (No such file" in refused(fold, str(tmp_path / "nowhere.parquet"))


def test_a_configuration_that_was_changed_afterwards_is_refused(tmp_path, fold):
    other = judged_run(tmp_path / "other", rows("wine"))
    run, written = read_run(other), (tmp_path / "other" / CONFIG).read_text()
    (tmp_path / "other" / RESULTS).write_bytes(results_bytes(run.rows, run.config, run.card))
    assert read_run(other) == run
    (tmp_path / "other" / CONFIG).write_text(written.replace("steps: 150", "steps: 300"))
    message = refused(fold, other)
    assert f"{other}: config.yaml is not what results.parquet was made with" in message
    assert "inner.steps: 150 then, 300 now" in message
    (tmp_path / "other" / CONFIG).write_text(written.replace("workers: auto", "workers: 7"))
    assert read_run(other).rows == run.rows, "where a run went on touches no result"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("inner.steps=300", "inner.steps: 150 in {fold}, 300 in {other}"),
        ("evaluation.select_every=5", "evaluation.select_every: 20 in {fold}, 5 in {other}"),
        ("policy.hidden=8", "policy.hidden: 16 in {fold}, 8 in {other}"),
        ("policy.kind=palf", 'policy.kind: "robust" in {fold}, "palf" in {other}'),
        ("seed=1", "seed: 0 in {fold}, 1 in {other}"),
        ("data.max_rows=99", "data.max_rows: 20000 in {fold}, 99 in {other}"),
        ("evaluation.suite_conditions=[{name: a}, {name: b}]", "evaluation.suite_conditions: [] in {fold}, "),
    ],
)
def test_runs_of_two_designs_are_not_joined(tmp_path, fold, override, line):
    other = judged_run(tmp_path / "other", rows("wine"), override)
    message = refused(fold, other)
    assert line.format(fold=fold, other=other) in message and "name runs of one design" in message


def test_where_and_how_a_run_was_done_may_differ(tmp_path, fold):
    free = ("name=b", "distributed.workers=7", "tracking.enabled=false", "checkpoint.every=9", "data.cache=/c")
    assert len(read_runs([fold, judged_run(tmp_path / "other", rows("wine"), *free)]).folds) == 2


def test_no_dataset_is_judged_twice_in_one_kind_of_hold_out(tmp_path, fold):
    again = judged_run(tmp_path / "again", rows("wine", "iris"))
    message = refused(again, fold)
    assert message.startswith("iris: is judged by both") and again in message and fold in message
    assert message == refused(fold, again)
    assert "is judged by both" in refused(fold, fold)
    family = judged_run(tmp_path / "family", rows("iris"), train=("digits", "newsgroups"))
    runs = read_runs([family, fold])
    assert [run.place for run in runs.families] == [family] and runs.families[0].family == "tabular"
    assert runs.rows == rows("iris") == runs.family_rows
    assert "is judged by both" in refused(fold, family, judged_run(tmp_path / "two", rows("iris"), train=("digits",)))


def test_a_family_may_be_judged_with_other_architectures_and_values_that_were_not_tuned(tmp_path, fold):
    other = ("tasks.architectures=[{kind: transformer}]", "inner.learning_rate=0.01", "inner.weight_decay=0.001")
    methods = "evaluation.methods=[policy, ce, s5]"
    family = judged_run(tmp_path / "family", rows("iris"), *other, methods, train=("digits",))
    runs = read_runs([family, fold])
    assert [run.place for run in runs.families] == [family] and runs.config == read_runs([fold]).config
    assert "tasks.architectures: [" in refused(fold, judged_run(tmp_path / "other", rows("wine"), *other))
    steps = judged_run(tmp_path / "steps", rows("iris"), "inner.steps=300", train=("digits",))
    assert "inner.steps: 150 in" in refused(fold, steps)


def test_families_alone_are_no_folds(tmp_path):
    family = judged_run(tmp_path / "family", rows("iris"), train=("digits",))
    assert "all runs hold out a whole family; name the runs of a suite's folds" in refused(family)


def test_a_parquet_path_of_an_unknown_family_holds_out_no_family(tmp_path):
    sources = "data.train=[digits, {name: mine, path: /data/mine.parquet}]"
    assert read_runs([judged_run(tmp_path / "run", rows("iris"), sources)]).families == []
    known = "data.train=[digits, {name: mine, path: /data/mine.parquet, family: text}]"
    assert "all runs hold out a whole family" in refused(judged_run(tmp_path / "known", rows("iris"), known))


@pytest.mark.parametrize("card", [{"trained_on": ["digits", "iris"]}, {"origins": ["keel", "uci-iris"]}])
def test_no_policy_judges_what_it_was_trained_on(tmp_path, card):
    run = judged_run(tmp_path / "run", rows("iris", origin="uci-iris sklearn"), card=card)
    assert "its policy was trained on rows of iris, which it judges" in refused(run)


def test_the_policy_is_one_of_the_methods(tmp_path):
    run = judged_run(tmp_path / "run", rows_of(["iris"], ("ce", "s5")))
    assert "evaluation.methods leave the policy out" in refused(run)


def test_runs_of_policies_that_know_less_are_methods(tmp_path, fold):
    names = {"constant": "learned_constant", "maml": "maml_loss", "schedule": "learned_schedule"}
    places = [judged_run(tmp_path / kind, rows("iris"), f"policy.kind={kind}") for kind in names]
    joined = read_runs([*places, fold]).rows
    policies = [row for row in rows("iris") if row["method"] == "policy"]
    assert joined == rows("iris") + [{**row, "method": name} for name in names.values() for row in policies]
    assert [run.learned for run in read_runs(places[:1]).folds] == [None], "alone it is the policy"
    few = [row for row in rows("iris") if row["method"] != "s5"]
    assert (
        read_runs([judged_run(tmp_path / "few", few, "policy.kind=constant"), fold]).rows
        == joined[: -2 * len(policies)]
    )
    changed = [row | {"accuracy": row["accuracy"] + 0.01 * (row["method"] == "ce")} for row in rows("iris")]
    other = judged_run(tmp_path / "other", changed, "policy.kind=schedule")
    assert "ce has another result there on iris than in the other runs" in refused(fold, other)
    elsewhere = judged_run(tmp_path / "elsewhere", rows("wine"), "policy.kind=schedule")
    assert "or none in these" in refused(fold, elsewhere)


def many(count, *changes, method="ce"):
    """``count`` results of a method on one task after the other; the first ones changed by so much."""
    moved = [*changes, *[0.0] * (count - len(changes))]
    (row, *_) = [row for row in rows("iris") if row["method"] == method]
    return [{**row, "seed": seed, "accuracy": 0.8 + change} for seed, change in enumerate(moved)]


def test_rounding_is_no_other_result():
    few = int(ROUNDED * 100)
    assert unlike(many(100), many(100)) is None
    assert unlike(many(100, *[0.9 * ROUNDING] * few), many(100)) is None
    assert unlike(many(100, *[-0.9 * ROUNDING] * (few + 1)), many(100)) == "iris", "on too many tasks"
    assert unlike(many(100, 1.1 * ROUNDING), many(100)) == "iris", "by too much"
    assert unlike(many(100), many(99)) == "iris", "a task that is not there"
    assert unlike(many(100), many(100, float("nan"))) == "iris", "no result"
    assert unlike(many(5, 0.1, method="policy"), many(5)) is None, "the reference alone is compared"
