"""The columns of a result by which methods are compared: what each is called, its unit, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One numeric column of the results."""

    name: str
    label: str  # as tables print it
    meaning: str
    scale: float = 100.0  # fractions are shown in percent, their differences in points
    lower_is_better: bool = False

    @property
    def sign(self) -> int:
        """A difference times this is positive where it is a gain."""
        return -1 if self.lower_is_better else 1


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("accuracy", "accuracy %", "of the finished model on clean test rows"),
        Measure("balanced_accuracy", "balanced %", "mean recall over the classes"),
        Measure("auc", "AUC %", "area under the ROC curve, each class against the rest, mean over classes"),
        Measure("average_precision", "AP %", "mean over classes; with two, of the one that is rarer in training"),
        Measure(
            "calibration_error",
            "ECE %",
            "expected calibration error, 15 bins of equal width; lower is better",
            lower_is_better=True,
        ),
        Measure("nll", "NLL", "negative log-likelihood in nats; lower is better", 1.0, lower_is_better=True),
        Measure("area_under_curve", "curve %", "mean test accuracy along the run: the area under the learning curve"),
        Measure("best_accuracy", "best %", "test accuracy at its best moment along the run"),
        Measure("best_step", "own best", "inner steps to that moment; lower is better", 1.0, lower_is_better=True),
        Measure(
            "steps_to_best",
            "to best",
            "inner steps to the reference's best accuracy on the task, all steps where never reached; lower is better",
            1.0,
            lower_is_better=True,
        ),
        Measure("reached_best", "reach best %", "share of tasks where that was reached"),
        Measure("steps_to_95", "to 95 %", "inner steps to 95 % of it; lower is better", 1.0, lower_is_better=True),
        Measure("reached_95", "reach 95 %", "share of tasks where these 95 % were reached"),
    )
}

SECONDS = Measure(
    "seconds",
    "seconds",
    "of work per task, with the making of the task and its measurement, on machines that may do other work besides: "
    "a hint, no benchmark; lower is better",
    1.0,
    lower_is_better=True,
)
"""Apart from the others, since it is never the same twice."""
