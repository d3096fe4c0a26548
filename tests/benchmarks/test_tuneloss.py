"""The benchmark's counting and its baselines on small problems, and the command itself, made tiny."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from benchmarks.tuneloss.__main__ import app
from benchmarks.tuneloss.methods import METHODS, REFERENCE, run_hoag
from benchmarks.tuneloss.noisy_mlp import NoisyMLP
from benchmarks.tuneloss.plot import LOOKS, plot_anytime
from benchmarks.tuneloss.problems import CASES, FIVE, standardise
from benchmarks.tuneloss.results import Curve, Run
from benchmarks.tuneloss.summary import NEAR, UNITS, Need, cost_on_the_fly, summarise
from palf_dist.learnloss.records import Choose, Outcome, Refine, Sensitivity
from palf_dist.learnloss.softmax import LabelledRows, SoftmaxRegression
from palf_dist.learnloss.space import WeightSpace
from palf_dist.randomness import random_generator

ROOT = Path(__file__).parent.parent.parent


class Bowl:
    """e = 1 + |u - u*|^2 / 2 with its exact derivative; phi says nothing."""

    def __init__(self, target: np.ndarray) -> None:
        self.space = WeightSpace.of({"a": (1e-3, 1e1), "b": (1e-2, 1e2)}, "ce")
        self.target = target

    def train(self, weights: np.ndarray) -> Outcome:
        away = np.log(weights) - self.target
        error = np.array([1 + 0.5 * float(away @ away)])
        return Outcome(np.ones((1, 3)), error, lambda: Sensitivity(away / weights, cost=7), cost=10)

    def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
        raise NotImplementedError


def small_problem() -> SoftmaxRegression:
    generator = random_generator("small benchmark problem")
    inputs, labels = generator.normal(size=(60, 6)), generator.integers(0, 2, 60)
    inputs[:, 0] += labels
    groups = {"l2_a": np.arange(6) < 3, "l2_b": np.arange(6) >= 3}
    rows = LabelledRows(inputs[:20], labels[:20]), LabelledRows(inputs[20:], labels[20:])
    return SoftmaxRegression(*rows, 2, groups, FIVE, max_iterations=20)


def curve(method: str, errors: list[float], costs: list[int], problem: str = "wine", seed: int = 0) -> Curve:
    return Curve(problem, seed, method, np.minimum.accumulate(errors), np.cumsum(costs))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_its_budget_and_the_box(name: str) -> None:
    problem = small_problem()
    problem.derivatives = METHODS[name].derivatives
    trials = METHODS[name].run(problem, 5, 3)
    assert len(trials) == 5
    for trial in trials:
        assert ((problem.space.low <= trial.weights) & (trial.weights <= problem.space.high)).all()
        assert trial.error == pytest.approx(problem.train(trial.weights).error, rel=1e-2)  # on the fly: another start
        assert trial.cost > 0
    if not name.endswith("_fly"):
        np.testing.assert_allclose(trials[0].weights, problem.space.weights(problem.space.centre))


def test_only_methods_that_use_derivatives_pay_for_them() -> None:
    bowl = Bowl(np.zeros(2))
    assert {trial.cost for trial in METHODS["tpe"].run(bowl, 4, 0)} == {10}
    assert {trial.cost for trial in run_hoag(bowl, 4, 0)} == {17}


def test_hoag_goes_down_the_hypergradient_to_the_minimum() -> None:
    bowl = Bowl(np.log([0.5, 0.2]))
    errors = [trial.error for trial in run_hoag(bowl, 60, 0)]
    first = np.linalg.norm(np.log([0.5, 0.2]) - bowl.space.centre)
    assert errors[1] == pytest.approx(1 + 0.5 * (first - 0.5) ** 2), "the first step has length 1 / k"
    assert min(errors[:40]) < 1.001


def test_until_counts_trainings_and_what_they_cost() -> None:
    found = curve("tpe", [3, np.inf, 2, 2.5, 1], [10, 20, 30, 40, 50])
    assert found.until(3) == (1, 10)
    assert found.until(2) == (3, 60)
    assert found.until(0.5) == (np.inf, np.inf)
    assert found.spent == (5, 150)


def test_unsolved_cases_are_infinite_in_medians_and_cost_the_reference_its_budget_in_ratios() -> None:
    values, reference = np.array([2, 5, np.inf]), np.array([np.inf, 50, 20])
    need = Need.of(values, reference, np.full(3, 100.0))
    assert (need.median, need.solved, need.understated) == (5, 2, False)
    assert need.ratio == 10  # medians 50 and 5
    assert need.paired == 10  # of 100 / 2, 50 / 5 and 20 / infinity
    hopeless = Need.of(np.full(2, np.inf), np.array([3, 4]), np.full(2, 9.0))
    assert hopeless.median == np.inf and hopeless.solved == 0 and np.isnan(hopeless.ratio)
    assert Need.of(np.array([4.0]), np.array([np.inf]), np.array([100.0])).understated


def test_a_training_on_the_fly_is_counted_in_plain_ones() -> None:
    errors = np.ones(3)
    tpe = [Curve("wine", seed, "tpe", errors, np.array([5.0, 15.0, 115.0])) for seed in (0, 1)]  # 5, 10 and 100
    fly = [Curve("wine", seed, "tuneloss_fly", errors, np.array([60.0, 61.0, 62.0]), True) for seed in (0, 2)]
    plain = Curve("wine", 0, "tuneloss", errors, np.array([1.0, 2.0, 3.0]))
    assert cost_on_the_fly([*tpe, *fly, plain]) == 6.0  # seed 2 has nothing to be compared with
    assert np.isnan(cost_on_the_fly([*tpe, plain]))


def test_summary_measures_against_the_best_that_anyone_found() -> None:
    best = {("wine", 0): 1.0, ("wine", 1): 2.0}
    curves = [
        curve(REFERENCE, [2, 1.04, 1.0], [1, 1, 1]),
        curve(REFERENCE, [3, 3, 2.0], [1, 1, 1], seed=1),
        curve("random", [1.005, 1], [5, 5]),
        curve("random", [2.03, 2.03], [5, 5], seed=1),
    ]
    rows = {row.method: row for row in summarise(curves, best)}
    assert list(rows) == [REFERENCE, "random"]
    assert [rows["random"].needs["trainings", near].solved for near in NEAR] == [1, 2, 2]
    assert rows[REFERENCE].needs["trainings", 0.05].median == 2.5
    assert all(rows[REFERENCE].needs[unit, near].ratio == 1 for unit in UNITS for near in NEAR)
    assert rows["random"].needs["trainings", 0.02].paired == 3
    assert rows["random"].needs["gradient evaluations", 0.02].paired == pytest.approx(3 / 5)
    alone = summarise(curves[1:], best)[1]  # the reference did not do all its cases
    assert np.isnan(alone.needs["trainings", 0.02].ratio)


def test_the_plot_has_a_line_for_each_method_that_falls() -> None:
    assert set(LOOKS) == set(METHODS)
    curves = [curve("tpe", [2, 1.1, 1], [5, 5, 5]), curve("random", [2, 1.5, 1.2], [5, 5, 5])]
    for axis in plot_anytime(curves, {("wine", 0): 1.0}, "title").axes:
        lines = [line.get_ydata() for line in axis.get_lines()][:2]
        for line, last in zip(lines, (1e-3, 0.2), strict=True):
            assert line[0] == pytest.approx(1) and line[-1] == pytest.approx(last) and (np.diff(line) <= 0).all()


def test_standardised_by_the_training_rows_alone() -> None:
    columns = np.array([[0.0, 5, np.nan], [2.0, 5, 4], [2.0, 5, 6], [100.0, 7, np.nan]])
    np.testing.assert_allclose(standardise(columns[:, :2], 2), [[-1], [1], [1], [8]])
    np.testing.assert_allclose(standardise(columns[:, 2:], 3), [[0], [-1], [1], [0]])


def test_problems_are_as_many_and_as_diverse_as_promised() -> None:
    convex = [case for case in CASES.values() if case.set != "control"]
    tuning = [case for case in convex if case.set == "tuning"]
    reported = [case for case in convex if case.set == "reported"]
    assert len(tuning) == 3 and sum(len(case.ranges) == 5 for case in reported) >= 6
    assert sum(len(case.ranges) == 2 for case in reported) == 2
    assert not {case.dataset for case in tuning} & {case.dataset for case in reported}


def test_problems_are_made_of_real_rows_and_the_seed() -> None:
    case = CASES["wine_2"]
    problem, again, other = case.make(0, "none"), case.make(0, "none"), case.make(1, "none")
    assert isinstance(problem, SoftmaxRegression) and isinstance(again, SoftmaxRegression)
    assert isinstance(other, SoftmaxRegression)
    inputs = problem.train_rows.inputs
    assert (inputs == again.train_rows.inputs).all() and not np.array_equal(inputs, other.train_rows.inputs)
    assert len(inputs) == case.rows[0] and problem.space.names == ("l2", "label_smoothing")
    np.testing.assert_allclose(inputs[:, :-1].mean(0), 0, atol=0.2)  # clipped columns: not exactly
    assert (inputs[:, -1] == 1).all()


def test_the_control_is_noisy_in_the_same_order_for_everyone() -> None:
    generator = random_generator("small network")
    rows = [LabelledRows(generator.normal(size=(60, 4)), generator.integers(0, 3, 60)) for _ in range(2)]
    first, second = (NoisyMLP(*rows, 3, WeightSpace.of(FIVE, "ce"), seed=1) for _ in range(2))
    weights = first.space.weights(first.space.centre)
    errors = [first.train(weights).error for _ in range(2)]
    assert errors[0] != errors[1], "equal weights, other draws"
    seen: list[int] = []

    def choose(features: np.ndarray, errors: np.ndarray) -> np.ndarray:
        assert features.shape == (len(errors), 6)
        seen.append(len(errors))
        return 2 * weights

    last, outcome = second.train_on_the_fly(choose)
    assert (last == 2 * weights).all() and seen[0] == 1 and seen[-1] < len(outcome.errors)
    assert second.train(weights).error == errors[1]


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.tuneloss", "--folder", str(folder), *arguments]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PALF_CACHE": str(tmp_path / "cache")}


def finished(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = command(tmp_path / "results", *arguments)
    return subprocess.run(run, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=200)


TINY = ("--problems", "breast_cancer,wine_2", "--seeds", "1", "--trainings", "6", "--processes", "1")


@pytest.mark.slow
def test_the_command_made_tiny(tmp_path: Path) -> None:
    methods = ["tuneloss_curvature_fly", "tuneloss", "hoag", "tpe", "cma_es", "random"]
    ended = finished(tmp_path, *TINY, "--methods", ",".join(methods))
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "results"
    table = pq.read_table(folder / "results.parquet")
    assert len(table) == 2 * len(methods) * 6
    assert set(table["method"].to_pylist()) == set(methods)
    text = (folder / "results.md").read_text()
    for name in methods:
        assert text.count(f"\n| {METHODS[name].label} |") == 6, "three tables of each set of problems"
        assert METHODS[name].label in ended.stdout
    assert text.index("## Reported") < text.index("## Tuning")
    assert all((folder / f"anytime_{group}.png").stat().st_size > 10_000 for group in ("reported", "tuning"))

    kept = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.parquet")}
    lost = Run("wine_2", 0, "hoag", 6).path(folder)
    lost.unlink()
    again = finished(tmp_path, *TINY, "--methods", ",".join(methods))
    assert again.returncode == 0, again.stderr
    assert "1/1 wine_2 seed 0, HOAG" in again.stdout
    now = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*.parquet")}
    assert {path for path in now if now[path] != kept[path]} == {lost}
    assert pq.read_table(folder / "results.parquet")["error"].equals(table["error"])


@pytest.mark.slow
def test_an_interrupted_command_keeps_what_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    run = command(
        folder,
        "--problems",
        "wine_2,wine",
        "--methods",
        "random",
        "--seeds",
        "40",
        "--trainings",
        "10",
        "--processes",
        "1",
    )
    with subprocess.Popen(
        run, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert b"1/80" in process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == 130, said
    assert b"interrupted: what is done is in" in said
    done = list(folder.glob("runs/random/*.parquet"))
    assert 1 <= len(done) < 80
    assert all(pq.read_metadata(path).num_rows == 10 for path in done)


@pytest.mark.parametrize(
    ("option", "given", "wrong"),
    [("--problems", "wien", "wien"), ("--methods", "tpe,grid", "grid"), ("--set", "x", "x")],
)
def test_a_mistake_is_one_message(tmp_path: Path, option: str, given: str, wrong: str) -> None:
    ended = CliRunner().invoke(app, [option, given, "--folder", str(tmp_path / "results")])
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"error: {option}: {wrong} is none of ") and ended.stderr.count("\n") == 1
    assert ended.stdout == "" and not list(tmp_path.iterdir())
