"""What the ball certificate proves on softmax regression with one, two and three loss weights, and what it takes in
trainings and gradient evaluations. ``python -m benchmarks.learnloss_certificates``"""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits, load_wine

from palf_dist.learnloss.certificates import certify
from palf_dist.learnloss.softmax import LabelledRows, SoftmaxRegression
from palf_dist.randomness import random_generator

DATASETS = {"digits": load_digits, "wine": load_wine, "breast cancer": load_breast_cancer}
ROWS = 300  # for training, at most half of them
ONE = {"l2": (1e-4, 1e2)}
CASES: tuple[tuple[dict[str, tuple[float, float]], float], ...] = (
    (ONE, 0.1),
    (ONE, 0.01),
    ({"l2": (1e-2, 1e2), "label_smoothing": (1e-3, 1.0)}, 0.1),
    ({"l2": (1e-2, 1e2), "logit_penalty": (1e-3, 1.0)}, 0.1),
    ({"l2": (1e-2, 1e2), "logit_penalty": (1e-3, 1.0), "label_smoothing": (1e-3, 1.0)}, 0.1),
)


class Counted(SoftmaxRegression):
    """Counts the trainings, their gradient evaluations and those of the certificate."""

    trainings = spent = certifying = 0

    def fit(self, weights: np.ndarray) -> np.ndarray:
        snapshots, cost = self._minimise(weights, np.zeros(self.shape), self.max_iterations)
        self.trainings, self.spent = self.trainings + 1, self.spent + cost
        return snapshots[-1]

    def error_gradient(self, coefficients: np.ndarray) -> np.ndarray:
        self.certifying += 1  # asks for it once for each model
        return super().error_gradient(coefficients)


def problem(dataset: str, ranges: dict[str, tuple[float, float]]) -> Counted:
    """Standardised inputs and an intercept; the L2 weight is that of all parameters, which makes the loss strongly
    convex."""
    inputs, labels = DATASETS[dataset](return_X_y=True)
    order = random_generator("learnloss_certificates", dataset).permutation(len(labels))
    inputs, labels, rows = inputs[order], labels[order], min(ROWS, len(labels) // 2)
    inputs = inputs[:, inputs[:rows].std(0) > 1e-6]
    inputs = np.clip((inputs - inputs[:rows].mean(0)) / inputs[:rows].std(0), -5, 5)
    inputs = np.column_stack([inputs, np.ones(len(inputs))])
    train, validation = LabelledRows(inputs[:rows], labels[:rows]), LabelledRows(inputs[rows:], labels[rows:])
    return Counted(train, validation, int(labels.max()) + 1, {"l2": np.ones(inputs.shape[1], bool)}, ranges)


def main() -> None:
    table = Table("dataset", "weights", "target", "proven gap", "trainings", "their gradients", "more gradients")
    for dataset in DATASETS:
        for ranges, target in CASES:
            case = problem(dataset, ranges)
            moduli = [0.0, *(float(name == "l2") for name in ranges)]
            found = certify(case, np.array(moduli), target=target, evaluations=2000)
            counts = (case.trainings, case.spent, case.certifying)
            gap = f"{found.gap / found.upper_bound:.1%}"
            table.add_row(dataset, ", ".join(ranges), f"{target:.0%}", gap, *map(str, counts))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
