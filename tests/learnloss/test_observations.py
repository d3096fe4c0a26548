from __future__ import annotations

import json

import numpy as np
import pytest

from palf_dist.learnloss.observations import Observations
from palf_dist.randomness import random_generator


def grown(batches: int, rows: int = 7) -> tuple[Observations, np.ndarray, np.ndarray]:
    generator = random_generator("observations", batches)
    features, errors = generator.normal(size=(batches, rows, 3)), generator.normal(size=(batches, rows))
    observations = Observations()
    for training in range(batches):
        added = observations.add(features[training], errors[training], training, final_last=training % 2 == 0)
        assert added == rows
    return observations, features.reshape(-1, 3), errors.ravel()


@pytest.mark.parametrize("batches", [1, 9, 10, 50])
def test_they_keep_their_order_while_they_grow(batches: int) -> None:
    observations, features, errors = grown(batches)
    assert len(observations) == 7 * batches
    np.testing.assert_array_equal(observations.features, features)
    np.testing.assert_array_equal(observations.errors, errors)
    np.testing.assert_array_equal(observations.trainings, np.repeat(np.arange(batches), 7))
    assert np.flatnonzero(observations.finals).tolist() == [7 * t + 6 for t in range(0, batches, 2)]


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    observations = Observations()
    features = np.ones((6, 2))
    features[0, 1], features[1, 0], features[5, 1] = np.nan, -np.inf, 1e200
    assert observations.add(features, [1.0, 2.0, 3.0, np.nan, 5.0, 6.0], training=4, final_last=True) == 2
    assert observations.errors.tolist() == [3.0, 5.0]
    assert observations.dropped == 4
    assert not observations.finals.any(), "the trained model was among those left out: another is no substitute"


def test_none_usable_first_and_some_later() -> None:
    observations = Observations()
    assert observations.add([[np.nan, 1.0]], [1.0], training=0, final_last=True) == 0
    assert len(observations.features) == len(observations) == 0
    assert observations.add([[2.0, 1.0]], [1.0], training=1, final_last=True) == 1
    assert observations.features.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("batches", [0, 1, 30])
def test_the_state_survives_json_to_the_last_bit(batches: int) -> None:
    observations, features, errors = grown(batches) if batches else (Observations(), np.zeros((0, 3)), np.zeros(0))
    observations.add([[np.nan, 0.0, 0.0]], [0.0], training=99, final_last=False)
    restored = Observations.from_state(json.loads(json.dumps(observations.state())))
    assert restored.state() == observations.state()
    assert restored.dropped == 1
    restored.add([[1.0, 2.0, 3.0]], [0.5], training=100, final_last=True)
    np.testing.assert_array_equal(restored.features, np.vstack([features, [[1.0, 2.0, 3.0]]]))
    np.testing.assert_array_equal(restored.errors, np.append(errors, 0.5))


def test_the_number_of_features_is_that_of_the_first() -> None:
    observations, _, _ = grown(1)
    with pytest.raises(ValueError, match="shape"):
        observations.add(np.ones((1, 4)), [1.0], training=1, final_last=True)
