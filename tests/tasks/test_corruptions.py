from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palf_dist.randomness import random_generator
from palf_dist.tasks.corruptions import add_label_noise, imbalance_profile

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
