"""The batched metrics against scikit-learn's, task by task: padding, ties, and classes that no test row has."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from palf_dist.evaluation.metrics import CALIBRATION_BINS, curve_metrics, prediction_metrics
from palf_dist.randomness import random_generator


def make_tasks(seed, classes, rows, *, grid):
    """Tasks with these numbers of real classes and rows; ``grid``: integer logits, so that many scores are equal."""
    draw = random_generator("metrics", seed)
    tasks, wide, long = len(classes), max(classes) + 1, max(rows) + 3
    logits = draw.normal(size=(tasks, long, wide)) * 2
    if grid:
        logits = np.round(logits)
    logits = logits.astype(np.float32)
    k, n = np.array(classes), np.array(rows)
    labels = draw.integers(0, 10_000, (tasks, long)) % k[:, None]
    mask = (np.arange(long) < n[:, None]).astype(np.float32)
    class_mask = np.arange(wide) < k[:, None]
    frequencies = draw.integers(1, 4, (tasks, wide))
    return [torch.from_numpy(each) for each in (logits, labels, mask, class_mask, frequencies)]


def by_sklearn(logits, labels, mask, class_mask, frequencies):
    """The metrics of one task. Scores of a class are log-probabilities, which rank as probabilities do."""
    real, k = mask.numpy() > 0, int(class_mask.sum())
    scores = torch.log_softmax(logits[:, :k].double(), -1).numpy()[real]
    labels = labels.numpy()[real]
    p, predicted = np.exp(scores), logits[:, :k].argmax(-1).numpy()[real]
    here = np.unique(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # predictions of classes that no row has
        balanced = sk.balanced_accuracy_score(labels, predicted)
    auc = [sk.roc_auc_score(labels == c, scores[:, c]) for c in here if len(here) > 1]
    counts = frequencies[:2].tolist()
    ranked = here if k > 2 else [c for c in here if c == (1 if counts[1] <= counts[0] else 0)]
    precision = [sk.average_precision_score(labels == c, scores[:, c]) for c in ranked]
    right, confidence = predicted == labels, p.max(1)
    share, mean = calibration_curve(right, confidence, n_bins=CALIBRATION_BINS)
    bins = np.searchsorted(np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], confidence)
    weights = np.unique(bins, return_counts=True)[1] / len(bins)
    return {
        "balanced_accuracy": balanced,
        "auc": np.mean(auc) if auc else math.nan,
        "average_precision": np.mean(precision) if precision else math.nan,
        "calibration_error": float(weights @ np.abs(share - mean)),
        "nll": sk.log_loss(labels, p, labels=range(k)),
    }


sizes = st.lists(st.tuples(st.integers(2, 6), st.integers(1, 25)), min_size=1, max_size=4)


@settings(max_examples=30)
@given(st.integers(0, 10**9), sizes, st.booleans())
def test_equal_to_scikit_learn(seed, sizes, grid):
    """Few rows for many classes, so that some have none."""
    tasks = make_tasks(seed, [k for k, _ in sizes], [n for _, n in sizes], grid=grid)
    got = prediction_metrics(*tasks)
    assert all(value.dtype == torch.float64 and value.shape == (len(sizes),) for value in got.values())
    for task in range(len(sizes)):
        expected = by_sklearn(*(each[task] for each in tasks))
        found = {name: value[task].item() for name, value in got.items()}
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


def test_the_area_of_several_classes_is_scikit_learn_s_one_versus_rest():
    tasks = make_tasks(1, [4], [60], grid=False)
    logits, labels, mask, *_ = (each[0] for each in tasks)
    p = torch.softmax(logits[mask > 0, :4].double(), -1).numpy()
    expected = sk.roc_auc_score(labels[mask > 0].numpy(), p, multi_class="ovr", average="macro")
    assert prediction_metrics(*tasks)["auc"].item() == pytest.approx(expected)


def test_of_two_classes_the_rarer_in_training_is_to_be_found():
    logits, labels, mask, class_mask, _ = make_tasks(2, [2, 2, 2], [40] * 3, grid=False)
    logits, labels, mask = (each[:1].expand(3, *each.shape[1:]) for each in (logits, labels, mask))
    frequencies = torch.tensor([[9, 1, 0], [1, 9, 0], [5, 5, 0]])
    first, second, even = prediction_metrics(logits, labels, mask, class_mask, frequencies)["average_precision"]
    assert first == even != second


def test_predictions_that_are_not_finite_have_no_probabilities():
    logits, *rest = make_tasks(3, [3, 3, 3], [12] * 3, grid=False)
    logits[0, 0, 0] = torch.inf
    logits[1, 0, 3] = torch.nan  # a class that is only padding
    logits[2, 12, 0] = torch.nan  # and a row
    got = prediction_metrics(logits, *rest)
    for name in ("auc", "average_precision", "calibration_error", "nll"):
        assert got[name].isnan().tolist() == [True, False, False], name
    assert got["balanced_accuracy"].isfinite().all()


def test_no_rows_no_metrics():
    logits, labels, mask, *rest = make_tasks(4, [3], [5], grid=False)
    assert all(value.isnan().all() for value in prediction_metrics(logits, labels, 0 * mask, *rest).values())


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=3))
def test_what_a_learning_curve_comes_to(curves):
    """scikit-learn's area by trapezoids; the earliest of equally good moments."""
    steps = [0, 10, 30, 40]
    got = curve_metrics(steps, np.array(curves))
    for task, curve in enumerate(curves):
        assert got["area_under_curve"][task] == pytest.approx(sk.auc(steps, curve) / 40)
        assert got["best_accuracy"][task] == max(curve)
        assert got["best_step"][task] == steps[curve.index(max(curve))]
