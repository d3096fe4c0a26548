from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.estimator_checks import parametrize_with_checks

from palf_dist.errors import ConfigError
from palf_dist.learnloss import TuneLossClassifier
from palf_dist.learnloss.classifier import RANGES

X, Y = load_iris(return_X_y=True)
NAMES = load_iris().target_names[Y]


def quick(**parameters: object) -> TuneLossClassifier:
    return TuneLossClassifier(**{"cv": 0.3, "trainings": 2, "random_state": 0, **parameters})


@parametrize_with_checks([TuneLossClassifier(cv=0.25, trainings=2, weights=("l1", "l2"), max_iter=20)])
def test_scikit_learn_takes_it_for_an_estimator(
    estimator: TuneLossClassifier, check: Callable[[TuneLossClassifier], None]
) -> None:
    check(estimator)


def test_importing_it_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from palf_dist.learnloss import LearnLoss, TuneLoss, WeightSpace, tune_loss\n"
        "assert callable(tune_loss) and 'sklearn' not in sys.modules\n"
        "from palf_dist.learnloss import TuneLossClassifier\n"
        "assert not {'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)\n"
        "import palf_dist.learnloss as package\n"
        "assert all(getattr(package, name) for name in package.__all__) and not hasattr(package, 'other')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_tells_what_the_search_came_to() -> None:
    model = TuneLossClassifier(cv=3, trainings=4, random_state=0).fit(X, NAMES)
    assert model.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    assert model.coef_.shape == (3, 4)
    assert model.intercept_.shape == (3,)
    assert set(model.best_weights_) == set(RANGES)
    assert len(model.trainings_) == model.report_.trainings == 4
    assert model.trainings_[0]["kind"] == "on_the_fly"
    best = min(model.trainings_, key=lambda training: training["validation_error"])
    assert best["weights"] == model.best_weights_
    assert best["validation_error"] == model.validation_error_ < 0.2
    assert sum(training["gradient_evaluations"] for training in model.trainings_) == model.report_.cost
    for name, weight in model.best_weights_.items():
        assert RANGES[name][0] <= weight <= RANGES[name][1]
    assert model.score(X, NAMES) > 0.95
    logits = X @ model.coef_.T + model.intercept_
    np.testing.assert_allclose(model.decision_function(X), logits)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(X), expected, atol=1e-12)


def test_two_classes_have_scikit_learns_shapes() -> None:
    rows, labels = X[50:], NAMES[50:]
    model = quick().fit(rows, labels)
    assert model.coef_.shape == (1, 4)
    assert model.intercept_.shape == (1,)
    logits = model.decision_function(rows)
    np.testing.assert_allclose(logits, rows @ model.coef_[0] + model.intercept_[0])
    np.testing.assert_allclose(model.predict_proba(rows)[:, 1], 1 / (1 + np.exp(-logits)))
    np.testing.assert_array_equal(model.predict(rows) == "virginica", logits > 0)
    assert model.score(rows, labels) > 0.9


@pytest.mark.parametrize("classes", [2, 3])
def test_with_l2_alone_it_is_scikit_learns_logistic_regression(classes: int) -> None:
    """On all rows, standardised; l2 = 1 / (n C). Softmax with two columns halves the penalty that scikit-learn has."""
    rows, labels = X[classes > Y] if classes == 3 else X[50:], Y[classes > Y] if classes == 3 else Y[50:]
    model = quick(weights={"l2": (0.01, 0.1)}, trainings=1, max_iter=1000).fit(rows, labels)
    scale = rows.std(0)
    strength = model.best_weights_["l2"] / (2 if classes == 2 else 1)
    other = LogisticRegression(C=1 / (len(rows) * strength), tol=1e-8, max_iter=1000)
    other.fit((rows - rows.mean(0)) / scale, labels)
    np.testing.assert_allclose(model.coef_ * scale, other.coef_, atol=5e-3)
    np.testing.assert_allclose(model.predict_proba(rows), other.predict_proba((rows - rows.mean(0)) / scale), atol=2e-3)


def test_tuning_beats_the_ends_of_the_range() -> None:
    rows, labels = load_breast_cancer(return_X_y=True)
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(rows[:150], labels[:150]))
    model = TuneLossClassifier(folds, trainings=4, weights=["l2"], random_state=0).fit(rows[:150], labels[:150])
    low, high = RANGES["l2"]
    for end in ((low, 2 * low), (high / 2, high)):
        fixed = TuneLossClassifier(folds, trainings=1, weights={"l2": end}, random_state=0)
        fixed.fit(rows[:150], labels[:150])
        assert model.validation_error_ < fixed.validation_error_
        assert log_loss(labels[150:], model.predict_proba(rows[150:])) < log_loss(
            labels[150:], fixed.predict_proba(rows[150:])
        )


def test_units_of_the_columns_do_not_matter() -> None:
    units, shift = np.array([1e3, 1e-3, 1.0, 10.0]), np.array([5.0, 0.0, -3.0, 1e3])
    model = quick(weights={"l2": (0.01, 0.0100001)}, trainings=1)
    coefficients = model.fit(X, Y).coef_
    probabilities = model.predict_proba(X)
    model.fit(X * units + shift, Y)
    np.testing.assert_allclose(model.predict_proba(X * units + shift), probabilities, atol=1e-3)
    np.testing.assert_allclose(model.coef_ * units, coefficients, rtol=1e-2, atol=1e-3)


def test_a_random_state_gives_the_same_again() -> None:
    first, again, other = (quick(weights=["l2"], random_state=state).fit(X, Y) for state in (0, 0, 1))
    np.testing.assert_array_equal(first.coef_, again.coef_)
    assert (first.coef_ != other.coef_).any()


def test_groups_have_weights_of_their_own() -> None:
    parameters = {"weights": {"l2": (0.01, 0.02)}, "trainings": 1}
    ids = quick(groups=["sepal", "sepal", "petal", "petal"], **parameters).fit(X, Y)
    assert set(ids.best_weights_) == {"l2_sepal", "l2_petal"}
    frame = pd.DataFrame(X, columns=["a", "b", "c", "d"])
    by_name = {"sepal": ["a", "b"], "petal": ["c", "d"]}
    for groups in ({"sepal": [0, 1], "petal": [2, 3]}, {"sepal": [True, True, False, False], "petal": [2, 3]}, by_name):
        model = quick(groups=groups, **parameters).fit(frame, Y)
        np.testing.assert_allclose(model.coef_, ids.coef_, rtol=1e-2, atol=1e-2)
        assert model.feature_names_in_.tolist() == ["a", "b", "c", "d"]
    strong = quick(groups={"petal": [2, 3]}, weights={"l2_petal": (50.0, 100.0)}, trainings=1).fit(X, Y)
    size = np.abs(strong.coef_ * X.std(0)).max(0)
    assert size[2:].max() < 0.1 < size[:2].max()


def test_rare_classes_are_no_obstacle() -> None:
    labels = np.r_[Y[:149], 7]  # one row of its class
    labels[:2] = 9  # two rows
    for cv in (5, 0.2):
        model = quick(cv=cv, trainings=1).fit(X, labels)
        assert model.classes_.tolist() == [0, 1, 2, 7, 9]
        assert np.isfinite(model.predict_proba(X)).all()
        assert model.validation_error_ < 1
    with pytest.raises(ValueError, match="3 rows are too few"):
        quick(cv=3).fit(X[:3], [0, 1, 2])
    with pytest.raises(ValueError, match="one class only"):
        quick().fit(X, np.zeros(len(X), int))


@pytest.mark.parametrize(
    "cv",
    [2, 0.5, StratifiedKFold(2), [(np.arange(0, 150, 2), np.arange(1, 150, 2))]],
    ids=["int", "share", "splitter", "rows"],
)
def test_validation_rows_come_from_where_they_are_told_to(cv: object) -> None:
    model = quick(cv=cv, trainings=1, weights=["l2"]).fit(X, Y)
    assert model.score(X, Y) > 0.9


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"cv": 1}, "cv: 1 is no whole number of at least 2"),
        ({"cv": 0.7}, r"cv: 0.7 .* \(0, 0.5\]"),
        ({"cv": True}, "cv: True"),
        ({"cv": "five"}, "cv: .*five"),
        ({"trainings": 0}, "trainings: 0 is no whole number of at least 1"),
        ({"max_iter": 2.5}, "max_iter: 2.5"),
        ({"weights": "l1"}, "weights: 'l1' is neither"),
        ({"weights": ["ridge"]}, "'ridge' is unknown; there are l1, l2"),
        ({"weights": {"l1": 3}}, r"weights\['l1'\]: 3 is no pair"),
        ({"weights": {"l1": (1, 0)}}, r"weights.l1: \[1, 0\] is no interval"),
        ({"weights": []}, "name at least one"),
        ({"groups": ["a", "b"]}, r"groups: shape \(2,\), but X has 4 columns"),
        ({"groups": {"a": [0, 1], "b": [1]}}, "column 1 is in two groups"),
        ({"groups": {"a": [9]}}, r"groups\['a'\]: no columns of X with 4"),
        ({"groups": {"a": ["width"]}}, r"groups\['a'\]: \['width'\] are not all names"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quick(**parameters).fit(X, Y)


def test_sparse_inputs_are_refused() -> None:
    with pytest.raises(TypeError, match="Sparse data was passed"):
        quick().fit(csr_array(X), Y)
