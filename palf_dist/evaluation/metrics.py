"""How good the predictions of one inner run are on its clean test rows, for G tasks at once, with padding: of the
finished model, and along the run.

Those of the finished model are taken in float64 from the logits. A value that is not defined is NaN: what only some
rows can tell where these are not among the test rows, and whatever needs probabilities where a logit is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.integrate import trapezoid
from torch import Tensor
from torch.nn.functional import pad

CALIBRATION_BINS = 15
"""Bins of equal width on [0, 1], each open below and closed above, as in Guo et al. 2017."""


def prediction_metrics(
    logits: Tensor, labels: Tensor, mask: Tensor, class_mask: Tensor, frequencies: Tensor
) -> dict[str, Tensor]:
    """Metrics [G] float64 by name, each as scikit-learn defines it.

    - balanced_accuracy: recall, the mean over the classes that are among the rows.
    - auc: area under the ROC curve of each class against the rest, ties counting half; the mean over the classes that
      some rows have and others have not.
    - average_precision: mean over the classes that some rows have; with two classes of the rarer one alone.
    - calibration_error: expected calibration error of the largest probability, see ``CALIBRATION_BINS``.
    - nll: mean negative log-likelihood in nats.

    Args:
        logits: [G, N, C]. labels: [G, N] int64. mask: [G, N], 1 on real rows. class_mask: [G, C], True on real classes.
        frequencies: [G, C] of the classes in training, which say which of two is the rarer: of equals the last.
    """
    real = mask > 0
    rows = real.sum(1)
    there = class_mask[:, None, :] & real[:, :, None]
    finite = (logits.isfinite() | ~there).all(2).all(1)
    logits = logits.masked_fill(~real[:, :, None], 0.0)
    log_p = torch.log_softmax(logits.double().masked_fill(~class_mask[:, None, :], -torch.inf), -1)
    truth = torch.zeros_like(log_p).scatter(2, labels[:, :, None], 1.0) * real[:, :, None]
    of_class = truth.sum(1)
    here = of_class > 0

    predicted = logits.masked_fill(~class_mask[:, None, :], -1e9).argmax(-1)
    right = (predicted == labels) & real
    recall = (truth * right[:, :, None]).sum(1) / of_class
    auc, precision = _ranking(log_p, truth, real)
    auc_known = here & (of_class < rows[:, None])
    last = class_mask.shape[1] - 1
    rarest = last - frequencies.double().masked_fill(~class_mask, torch.inf).flip(1).argmin(1, keepdim=True)
    binary = class_mask.sum(1, keepdim=True) == 2
    wanted = class_mask & (~binary | torch.zeros_like(class_mask).scatter(1, rarest, True))
    own = log_p.gather(2, labels[:, :, None])[:, :, 0]
    return {"balanced_accuracy": _mean(recall, here)} | {
        name: torch.where(finite, value, torch.nan)
        for name, value in {
            "auc": _mean(auc, auc_known),
            "average_precision": _mean(precision, here & wanted),
            "calibration_error": _calibration_error(log_p.amax(-1).exp(), right, real),
            "nll": -_mean(own, real),
        }.items()
    }


def _ranking(scores: Tensor, truth: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Area under the ROC curve and average precision [G, C] of each class against the rest.

    With scores s of the real rows, a class's rows P and the others N: AUC = mean over i in P of the share of N with
    s < s_i and half of that with s = s_i; AP = mean over i in P of the share of P among the rows with s >= s_i.
    """
    padding = (~real).sum(1)[:, None, None]
    ascending, order = scores.masked_fill(~real[:, :, None], -torch.inf).transpose(1, 2).sort(-1)  # padding first
    chosen = truth.transpose(1, 2).gather(2, order)
    positives = pad(chosen.cumsum(-1), (1, 0))  # among the first n [G, C, N + 1]
    below, up_to = _bounds_of_ties(ascending)
    lower, not_higher = positives.gather(2, below), positives.gather(2, up_to)
    worse, no_better = below - padding - lower, up_to - padding - not_higher
    count = positives[..., -1]
    rest = real.sum(1, keepdim=True) - count
    auc = (chosen * (worse + no_better)).sum(-1) / (2 * count * rest)
    hits = count[..., None] - lower
    precision = hits / (hits + rest[..., None] - worse)
    return auc, (chosen * precision.nan_to_num()).sum(-1) / count


def _bounds_of_ties(ascending: Tensor) -> tuple[Tensor, Tensor]:
    """How many [..., N] are smaller than each, and how many are not larger."""
    number = torch.arange(1, ascending.shape[-1], device=ascending.device)
    differs = ascending[..., 1:] != ascending[..., :-1]
    first = pad(torch.where(differs, number, 0), (1, 0))
    last = pad(torch.where(differs, number, len(number) + 1), (0, 1), value=len(number) + 1)
    return first.cummax(-1).values, last.flip(-1).cummin(-1).values.flip(-1)


def _calibration_error(confidence: Tensor, right: Tensor, real: Tensor) -> Tensor:
    """Mean over the real rows of |accuracy - mean confidence| of the row's bin, [G]."""
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=confidence.dtype, device=confidence.device)
    surplus = (right.double() - confidence) * real
    by_bin = surplus.new_zeros(len(surplus), CALIBRATION_BINS)
    by_bin.scatter_add_(1, torch.bucketize(confidence, edges[1:-1]), surplus)
    return by_bin.abs().sum(1) / real.sum(1)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean [G] of the chosen ones; NaN where there are none."""
    return torch.where(chosen, values, 0.0).sum(1) / chosen.sum(1)


def curve_metrics(steps: Sequence[int], accuracy: np.ndarray) -> dict[str, np.ndarray]:
    """What a learning curve comes to, [G] float64 by name; ``accuracy`` [G, M] was read after ``steps`` [M].

    - area_under_curve: by trapezoids, over its length: the mean accuracy along the run.
    - best_accuracy, and best_step: the earliest moment that has it.
    """
    return {
        "area_under_curve": trapezoid(accuracy, steps, axis=1) / (steps[-1] - steps[0]),
        "best_accuracy": accuracy.max(1),
        "best_step": np.asarray(steps, np.float64)[accuracy.argmax(1)],
    }
