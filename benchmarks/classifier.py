"""TuneLossClassifier against scikit-learn's LogisticRegressionCV on equal folds of equal, standardised inputs: prints
test log loss and accuracy and what the tuning cost. ``python -m benchmarks.classifier``"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.preprocessing import StandardScaler

from palf_dist.learnloss import TuneLossClassifier

DATASETS: dict[str, tuple[Callable, int]] = {
    "iris": (load_iris, 75),
    "wine": (load_wine, 89),
    "breast_cancer": (load_breast_cancer, 284),
}
"""Loader and training rows; the others are the test rows."""
SPLITS, FOLDS = 5, 5
L1_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
Folds = list[tuple[np.ndarray, np.ndarray]]


@dataclass
class Result:
    """Of one method on one split."""

    log_loss: float  # nats, test rows
    accuracy: float  # %, test rows
    fits: int  # weights tried x folds
    gradients: int  # evaluations on the training rows of one fold; a Hessian-vector product counts as two
    seconds: float  # CPU


def logistic_regression_cv(folds: Folds, seed: int, elastic_net: bool) -> LogisticRegressionCV:
    """As it comes, except that it tunes what is compared, the log loss. saga is what it has for the elastic net."""
    how = {"l1_ratios": L1_RATIOS, "solver": "saga"} if elastic_net else {"l1_ratios": (0.0,), "max_iter": 1000}
    return LogisticRegressionCV(
        Cs=10, cv=folds, scoring="neg_log_loss", random_state=seed, use_legacy_attributes=False, **how
    )


def tuneloss(folds: Folds, seed: int, weights: Sequence[str] | None, trainings: int) -> TuneLossClassifier:
    return TuneLossClassifier(folds, trainings=trainings, weights=weights, random_state=seed)


METHODS: dict[str, Callable[[Folds, int], LogisticRegressionCV | TuneLossClassifier]] = {
    "LogisticRegressionCV l2": lambda folds, seed: logistic_regression_cv(folds, seed, False),
    "LogisticRegressionCV elastic net": lambda folds, seed: logistic_regression_cv(folds, seed, True),
    "TuneLoss l2, 5 trainings": lambda folds, seed: tuneloss(folds, seed, ("l2",), 5),
    "TuneLoss l1 l2, 10 trainings": lambda folds, seed: tuneloss(folds, seed, ("l1", "l2"), 10),
    "TuneLoss all four, 10 trainings": lambda folds, seed: tuneloss(folds, seed, None, 10),
    "TuneLoss all four, 20 trainings": lambda folds, seed: tuneloss(folds, seed, None, 20),
}


def measure(dataset: str, method: str, seed: int) -> Result:
    load, rows = DATASETS[dataset]
    inputs, labels = load(return_X_y=True)
    x, x_test, y, y_test = train_test_split(inputs, labels, train_size=rows, stratify=labels, random_state=seed)
    scaler = StandardScaler().fit(x)
    x, x_test = scaler.transform(x), scaler.transform(x_test)
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, y))
    model = METHODS[method](folds, seed)
    start = time.process_time()
    model.fit(x, y)
    seconds = time.process_time() - start
    if isinstance(model, TuneLossClassifier):
        fits, gradients = FOLDS * model.report_.trainings, model.report_.cost
    else:
        fits, gradients = model.n_iter_.size, int(model.n_iter_.sum())
    accuracy = 100 * accuracy_score(y_test, model.predict(x_test))  # .score of LogisticRegressionCV is -log loss
    return Result(log_loss(y_test, model.predict_proba(x_test)), accuracy, fits, gradients, seconds)


def main() -> None:
    console = Console(width=140)
    warnings.simplefilter("ignore", ConvergenceWarning)  # saga stops at its default of 100 epochs
    for dataset, (_, rows) in DATASETS.items():
        table = Table(title=f"{dataset}: mean of {SPLITS} splits, {rows} training rows (+- standard error)")
        for column in ("method", "log loss", "accuracy %", "fits", "gradients", "CPU s"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for method in METHODS:
            values = np.array([astuple(measure(dataset, method, seed)) for seed in range(SPLITS)])
            mean, spread = values.mean(0), values.std(0, ddof=1) / np.sqrt(SPLITS)
            table.add_row(
                method,
                f"{mean[0]:.4f} +- {spread[0]:.4f}",
                f"{mean[1]:.2f} +- {spread[1]:.2f}",
                *(f"{value:.0f}" for value in mean[2:4]),
                f"{mean[4]:.1f}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
