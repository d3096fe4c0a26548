from __future__ import annotations

import contextlib
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palf_dist.errors import CheckpointError, ConfigError, DataError
from palf_dist.learnloss.tuning import tune_loss
from palf_dist.search.fingerprints import check_unchanged, keep
from palf_dist.search.ledger import Ledger
from palf_dist.search.targets import LossWeightsConfig, make_target
from palf_dist.search.targets.loss_weights import LossWeightsTarget
from palf_dist.search.targets.rows import load_rows
from palf_dist.search.targets.snapshot import load_arrays
from palf_dist.search.targets.softmax import SoftmaxTrainer
from palf_dist.search.trial import ON_THE_FLY, Report, TrialContext
from palf_dist.search.tuneloss_proposals import TuneLossSearch

NETWORK = {
    "model": {"kind": "mlp", "hidden": [8]},
    "training": {"steps": 12, "batch_size": 16},
    "snapshots": 4,
    "label_noise": {"rate": 0.3},
}


def target(tmp_path: Path, **settings: Any) -> LossWeightsTarget:
    made = make_target(
        LossWeightsConfig.model_validate({"dataset": "wine", "cache": str(tmp_path / "cache"), **settings})
    )
    assert isinstance(made, LossWeightsTarget)
    return made


def context(folder: Path, start_from: Path | None = None) -> TrialContext:
    folder.mkdir(exist_ok=True)
    return TrialContext(folder, start_from)


def middle(made: LossWeightsTarget) -> dict[str, float]:
    space = made.weight_space()
    return space.named(space.weights(space.centre))


def without_paths(reports: list[Report]) -> list[dict[str, Any]]:
    """What must be the same in two folders."""
    return [{**vars(report), "artefact": None, "checkpoint": None} for report in reports]


def test_a_softmax_trial_reports_what_it_keeps(tmp_path: Path) -> None:
    made = target(tmp_path, label_noise={"rate": 0.2})
    data = load_rows(made.config)
    designs, _ = data.design(made.config.model)
    parameters, reports = middle(made), []
    for report in made.run(parameters, context(tmp_path / "trial")):
        reports.append(report)
        assert report.artefact is not None
        if report.error > min(heard.error for heard in reports):
            continue
        arrays, card = load_arrays(report.artefact)
        w = arrays["coefficients"]
        log_p = {}
        for split, inputs in designs.items():
            z = inputs @ w
            log_p[split] = z - np.log(np.exp(z).sum(1, keepdims=True))
        train, z = log_p["train"], designs["train"] @ w
        phi = {
            "ce": -train[np.arange(len(z)), data.labels["train"]].mean(),
            "l1": (np.sqrt(w[:-1] ** 2 + 1e-6) - 1e-3).sum(),
            "l2": 0.5 * (w[:-1] ** 2).sum(),
            "label_smoothing": -train.mean(),
            "logit_penalty": 0.5 * (z**2).sum(1).mean(),
        }
        assert report.phi == pytest.approx(list(phi.values()), rel=1e-6) and card["features"] == pytest.approx(phi)
        validation = log_p["validation"][np.arange(len(designs["validation"])), data.labels["validation"]]
        assert report.error == card["validation_error"] == pytest.approx(-validation.mean(), rel=1e-6)
        wrong = (designs["validation"] @ w).argmax(1) != data.labels["validation"]
        assert report.metrics["validation_misclassified"] == wrong.mean()
    assert [report.step for report in reports] == list(range(1, len(reports) + 1))
    assert [report.done for report in reports] == [False] * (len(reports) - 1) + [True]
    assert len(reports) <= made.reports() == 10
    last = reports[-1]
    assert last.gradient is not None and last.curvature is not None and last.metrics["cost"] > len(reports)
    assert {report.metrics["cost"] for report in reports[:-1]} == {reports[0].metrics["cost"]}  # trained before it
    assert 0 < reports[0].metrics["cost"] < last.metrics["cost"]
    assert len(last.gradient) == len(last.curvature) == 4 and all(report.gradient is None for report in reports[:-1])
    lowest = min(report.error for report in reports)
    arrays, card = load_arrays(tmp_path / "trial" / "best")
    assert card["validation_error"] == lowest and card["weights"] == parameters
    final = made.finish(tmp_path / "trial" / "best")
    wrong = (designs["test"] @ arrays["coefficients"]).argmax(1) != data.labels["test"]
    assert final["test_error"] == wrong.mean() and final["best_parameters"] == parameters
    assert "certificate" not in final  # five weights: the searcher says why there is none


def test_an_artefact_says_all_that_made_it(tmp_path: Path) -> None:
    made = target(tmp_path)
    list(made.run(middle(made), context(tmp_path / "trial")))
    card = json.loads((tmp_path / "trial" / "best" / "weights.json").read_text())
    again = LossWeightsTarget(LossWeightsConfig.model_validate(card["target"]))
    assert again.config == made.config
    assert again.finish(tmp_path / "trial" / "best") == made.finish(tmp_path / "trial" / "best")


@pytest.mark.parametrize("settings", [{}, NETWORK], ids=["softmax", "mlp"])
def test_equal_weights_give_equal_trials(settings: dict[str, Any], tmp_path: Path) -> None:
    made = target(tmp_path, **settings)
    first = list(made.run(middle(made), context(tmp_path / "first")))
    again: LossWeightsTarget = pickle.loads(pickle.dumps(made))
    assert without_paths(list(again.run(middle(made), context(tmp_path / "again")))) == without_paths(first)
    other = target(tmp_path, **settings, seed=1)
    assert list(other.run(middle(made), context(tmp_path / "other")))[-1].error != first[-1].error


@pytest.mark.parametrize("settings", [{}, NETWORK], ids=["softmax", "mlp"])
def test_a_trial_goes_on_where_it_was_ended(settings: dict[str, Any], tmp_path: Path) -> None:
    made = target(tmp_path, **settings)
    whole = list(made.run(middle(made), context(tmp_path / "whole")))
    reports = made.run(middle(made), context(tmp_path / "trial"))
    begun = [next(reports), next(reports)]
    reports.close()
    after = list(made.run(middle(made), context(tmp_path / "trial")))
    first = 1 if made.config.is_softmax else 2  # its last report comes again; training anew gives them all again
    assert [report.step for report in after] == list(range(first, len(whole) + 1))
    assert without_paths(begun[: first - 1] + after) == without_paths(whole)
    model, whole_model = (load_arrays(tmp_path / name / "best")[0] for name in ("trial", "whole"))
    assert all(np.array_equal(model[name], whole_model[name]) for name in whole_model)


def test_a_trial_can_start_from_another(tmp_path: Path) -> None:
    made = target(tmp_path, **NETWORK)
    donor = list(made.run(middle(made), context(tmp_path / "donor")))
    reports = made.run(middle(made), context(tmp_path / "half"))
    half = [next(reports), next(reports)][-1]
    start = {name: 3 * value for name, value in middle(made).items()}
    after = list(made.run(start, context(tmp_path / "trial", half.checkpoint)))
    assert [report.step for report in after] == [2, 3, 4] and after[0].error == half.error
    assert after[-1].error != donor[-1].error


def test_what_a_killed_trial_had_kept_is_the_artefact_of_what_is_worse(tmp_path: Path) -> None:
    """Its driver never heard of it, and takes the next report for an improvement."""
    made = target(tmp_path, **NETWORK)
    lost = min(report.error for report in made.run(middle(made), context(tmp_path / "trial")))
    shutil.rmtree(tmp_path / "trial" / "checkpoint")
    for report in made.run(middle(made), context(tmp_path / "trial")):
        assert report.artefact is not None and report.error >= lost
        assert load_arrays(report.artefact)[1]["validation_error"] == lost


def test_its_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PALF_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    config = LossWeightsConfig.model_validate({"dataset": {"name": "own", "path": "own.parquet"}})
    assert config.dataset.path == str(tmp_path / "own.parquet") and config.cache == str(tmp_path / ".palf_cache")


def test_an_edited_file_has_another_fingerprint(tmp_path: Path) -> None:
    def prints(shift: float) -> dict[str, str]:
        columns = {"x": [row % 7 + shift for row in range(120)], "label": [row % 2 for row in range(120)]}
        pq.write_table(pa.table(columns), tmp_path / "own.parquet")
        return target(tmp_path, dataset={"name": "own", "path": str(tmp_path / "own.parquet")}).fingerprints

    before = prints(0.0)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    check_unchanged(run_dir, before)  # a new search
    keep(run_dir, before)
    check_unchanged(run_dir, prints(0.0))
    with pytest.raises(DataError, match=r"own: the dataset has changed .* restore its file"):
        check_unchanged(run_dir, prints(1.0))


def test_stop_is_heard_between_two_reports(tmp_path: Path) -> None:
    made = target(tmp_path, **NETWORK)
    told = context(tmp_path / "trial")
    reports = made.run(middle(made), told)
    next(reports)
    told.stop.set()
    assert list(reports) == []


def test_a_network_that_diverges_ends_with_nan(tmp_path: Path) -> None:
    training = {"steps": 12, "batch_size": 16, "optimiser": "sgd", "learning_rate": 1e30}
    made = target(tmp_path, **{**NETWORK, "training": training})
    (report,) = made.run(middle(made), context(tmp_path / "trial"))
    assert math.isnan(report.error) and report.done and report.artefact is None


def test_on_the_fly_tells_the_weights_it_came_to(tmp_path: Path) -> None:
    made = target(tmp_path, on_the_fly=True)
    space = made.weight_space()
    reports = list(made.run({**middle(made), ON_THE_FLY: True}, context(tmp_path / "trial")))
    weights = reports[-1].weights
    assert weights is not None and weights != list(middle(made).values())
    assert (np.array(weights) >= space.low).all() and (np.array(weights) <= space.high).all()
    again = list(made.run(space.named(np.array(weights)), context(tmp_path / "again")))
    assert again[-1].error == pytest.approx(reports[-1].error, rel=5e-2)  # trained to convergence with them
    assert load_arrays(tmp_path / "trial" / "best")[1]["weights"] == space.named(np.array(weights))


def test_a_search_of_trials_goes_where_tune_loss_does_in_one_process(tmp_path: Path) -> None:
    """Through the ledger, with all that the training on the fly has learned on its way."""
    made = target(tmp_path, on_the_fly=True, label_noise={"rate": 0.2})
    search = TuneLossSearch(made.weight_space(), 0, on_the_fly=True)
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        for number in (1, 2, 3):
            record = ledger.create(search.suggest(number))
            for report in made.run(record.parameters, context(tmp_path / record.name)):
                ledger.report(number, report)
            ledger.end(number, "finished")
            search.tell(Ledger(tmp_path).trials[number])
    problem = SoftmaxTrainer(made.config, load_rows(made.config)).regression
    direct = tune_loss(problem, 3, seed=0)  # that of the guide in a trial
    assert len(direct.trainings[0].waypoints) > 3
    for ours, theirs in zip(search.tune_loss.trainings, direct.trainings, strict=True):
        assert ours.weights == pytest.approx(theirs.weights) and ours.error == pytest.approx(theirs.error)
        assert [w.state() for w in ours.waypoints] == [w.state() for w in theirs.waypoints]


def test_l2_of_columns_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target.weights.l2_categorical: wine has no such columns; leave it out"):
        target(tmp_path, weights={"l2_numeric": [0.1, 1], "l2_categorical": [0.1, 1]})


def test_a_damaged_artefact_is_told(tmp_path: Path) -> None:
    made = target(tmp_path)
    list(made.run(middle(made), context(tmp_path / "trial")))
    for name in ("model.safetensors", "weights.json"):
        (tmp_path / "trial" / "best" / name).write_bytes(b"{")
        with pytest.raises(CheckpointError, match="cannot be read"):
            made.finish(tmp_path / "trial" / "best")


def test_a_search_of_l2_alone_ends_with_a_certificate(tmp_path: Path) -> None:
    made = target(tmp_path, weights={"l2": [0.1, 10]}, model={"kind": "softmax", "intercept": False})
    errors = []
    for number, weight in enumerate(np.geomspace(0.1, 10, 7)):
        errors.append(list(made.run({"l2": float(weight)}, context(tmp_path / f"{number}")))[-1].error)
    best = tmp_path / f"{int(np.argmin(errors))}" / "best"
    final = made.finish(best)
    certificate = final["certificate"]
    assert final["why_no_certificate"] is None and json.dumps(certificate)
    assert certificate["lower_bound"] <= min(errors) + 1e-9
    assert certificate["closed"] and certificate["gap"] <= 0.1 * certificate["upper_bound"]
