from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit
from scipy.stats import chisquare

from palf_dist.randomness import random_generator
from palf_dist.tasks.corruptions import (
    add_label_noise,
    class_transitions,
    draw_labels,
    imbalance_profile,
    instance_transitions,
)

N = 40_000


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_uniform_noise_resamples_over_all_classes(num_classes: int, rate: float) -> None:
    labels = np.arange(N) % num_classes
    noisy = add_label_noise(labels, "uniform", rate, num_classes, random_generator("noise", num_classes))
    wrong = rate * (1 - 1 / num_classes)
    tolerance = 4.5 * np.sqrt(wrong * (1 - wrong) / N)  # a right function fails once in 100,000 seeds
    assert abs((noisy != labels).mean() - wrong) < tolerance
    shifts = np.bincount((noisy - labels)[noisy != labels] % num_classes, minlength=num_classes)[1:]
    assert shifts.min() > 0.9 * shifts.max()


def test_pair_flip_moves_to_the_next_class() -> None:
    labels = np.arange(N) % 4
    noisy = add_label_noise(labels, "pair_flip", 0.3, 4, random_generator("noise"))
    flipped = noisy != labels
    assert abs(flipped.mean() - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / N)
    np.testing.assert_array_equal(noisy[flipped], (labels[flipped] + 1) % 4)


def test_no_noise_changes_nothing() -> None:
    labels = np.arange(100) % 3
    np.testing.assert_array_equal(add_label_noise(labels, "uniform", 0.0, 3, random_generator(0)), labels)


@given(st.integers(2, 60), st.floats(0, 0.499), st.integers(0, 99))
def test_a_transition_matrix_has_the_mean_rate_asked_for(num_classes: int, rate: float, seed: int) -> None:
    generator = random_generator(seed)
    labels = generator.integers(max(1, num_classes - 1), size=90)  # a class may be absent
    matrix = class_transitions(labels, rate, num_classes, generator)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    assert (matrix.argmax(1) == range(num_classes)).all(), "no class is mostly taken for another one"
    assert np.isclose(1 - matrix[labels, labels].mean(), rate, atol=1e-9)


def test_transition_matrices_differ_between_classes_and_tasks() -> None:
    labels = np.arange(600) % 6
    matrices = np.stack([class_transitions(labels, 0.3, 6, random_generator("task", seed)) for seed in range(400)])
    wrong = 1 - matrices[:, range(6), range(6)]
    assert 0.07 < wrong.std() < 0.15 and wrong.max() < 0.5
    shares = matrices / wrong[:, :, None]
    off = shares[:, ~np.eye(6, dtype=bool)]
    # Dirichlet(1, ..., 1) of five: mean 1/5, variance 4 / (25 * 6)
    assert abs(off.mean(0) - 0.2).max() < 4.5 * np.sqrt(4 / 150 / 400)
    assert abs(off.var() - 4 / 150) < 0.002
    again = class_transitions(labels, 0.3, 6, random_generator("task", 7))
    np.testing.assert_array_equal(again, matrices[7])


def test_labels_are_drawn_as_the_matrix_says() -> None:
    labels = np.arange(N) % 4
    matrix = class_transitions(labels, 0.4, 4, random_generator("matrix"))
    noisy = draw_labels(matrix[labels], random_generator("draw"))
    for label in range(4):
        counts = np.bincount(noisy[labels == label], minlength=4)
        assert chisquare(counts, N / 4 * matrix[label]).pvalue > 1e-5
    assert abs((noisy != labels).mean() - 0.4) < 4.5 * np.sqrt(0.4 * 0.6 / N)


def test_labels_of_no_probability_are_never_drawn() -> None:
    rows = np.array([[0.0, 0.3, 0.0, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]).repeat(5000, axis=0)
    drawn = draw_labels(rows, random_generator("draw"))
    assert set(drawn[:5000]) == {1, 3} and set(drawn[5000:]) == {0}


@given(st.integers(2, 12), st.floats(0, 0.499), st.integers(0, 99))
def test_instance_dependent_noise_has_the_mean_rate_asked_for(num_classes: int, rate: float, seed: int) -> None:
    generator = random_generator(seed)
    labels, features = generator.integers(num_classes, size=80), generator.standard_normal((80, 5))
    rows = instance_transitions(labels, features, rate, num_classes, generator)
    assert rows.min() >= 0
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-12)
    assert np.isclose(1 - rows[range(80), labels].mean(), rate, atol=1e-9)
    assert (rows[range(80), labels] > 0.5 - 1e-9).all(), "the true label stays the likeliest"


def residual(values: np.ndarray, features: np.ndarray) -> float:
    """What is left of ``values`` after the best affine fit, as a share of their spread."""
    design = np.column_stack([features, np.ones(len(features))])
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float(np.abs(left).max() / values.std())


def test_instance_dependent_noise_follows_random_projections_of_the_inputs() -> None:
    """Log-odds of a wrong label are affine in the inputs, and within a class so are those between two wrong labels."""
    generator = random_generator("instances")
    labels, features = np.arange(N) % 3, generator.standard_normal((N, 4))
    rows = instance_transitions(labels, features, 0.3, 3, generator)
    wrong = 1 - rows[range(N), labels]
    assert residual(logit(2 * wrong), features) < 1e-8
    assert 0.08 < wrong.std() < 0.13
    slopes = []
    for label in range(3):
        one, other = np.flatnonzero(np.arange(3) != label)
        between = np.log(rows[labels == label, one] / rows[labels == label, other])
        assert residual(between, features[labels == label]) < 1e-8
        slopes.append(np.linalg.lstsq(features[labels == label], between, rcond=None)[0])
    assert np.linalg.matrix_rank(np.stack(slopes), tol=0.1) == 3, "each class has its own W"
    drawn = draw_labels(rows, generator)
    assert abs((drawn != labels).mean() - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / N)
    often = wrong > np.median(wrong)
    assert (drawn != labels)[often].mean() - (drawn != labels)[~often].mean() > 0.1


def test_equal_inputs_are_mislabelled_equally_often() -> None:
    rows = instance_transitions(np.array([0, 1, 1]), np.zeros((3, 2)), 0.25, 2, random_generator(0))
    np.testing.assert_allclose(rows, [[0.75, 0.25], [0.25, 0.75], [0.25, 0.75]])


@given(st.integers(2, 64), st.floats(1, 1000))
def test_profile_is_exponential_with_the_ratio_asked_for(num_classes: int, ratio: float) -> None:
    profile = np.sort(imbalance_profile(num_classes, ratio, random_generator(num_classes)))
    assert np.isclose(profile.sum(), 1)
    assert np.isclose(profile[-1] / profile[0], ratio)
    steps = np.diff(np.log(profile))
    np.testing.assert_allclose(steps, steps[0], atol=1e-9)


def test_every_class_can_be_the_largest() -> None:
    largest = {imbalance_profile(3, 10, random_generator(seed)).argmax() for seed in range(40)}
    assert largest == {0, 1, 2}
