from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palf_dist.errors import ConfigError
from palf_dist.learnloss.space import WeightSpace
from palf_dist.randomness import random_generator


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=2))
def test_weights_stay_in_the_box_to_the_last_bit(u: list[float]) -> None:
    space = WeightSpace.of({"a": (1e-6, 0.1), "b": (0.3, 7.0)}, "ce")
    weights = space.weights(space.clip(np.array(u)))
    assert (weights >= space.low).all() and (weights <= space.high).all()
    np.testing.assert_allclose(np.log(weights), space.clip(np.array(u)), atol=1e-12)
    assert space.named(weights) == {"a": weights[0], "b": weights[1]}


def test_centre_and_samples() -> None:
    space = WeightSpace.of({"a": (1e-2, 1e2)}, "ce")
    assert space.weights(space.centre) == pytest.approx([1.0])
    samples = space.sample(random_generator("space"), 1000)
    assert samples.shape == (1000, 1) and abs(samples.mean()) < 0.3 and samples.min() >= np.log(1e-2)


@pytest.mark.parametrize(
    ("ranges", "reference", "message"),
    [
        ({}, "ce", "none is named"),
        ({"ce": (0.1, 1.0)}, "ce", "named twice"),
        ({"a": (0.0, 1.0)}, "ce", "weights.a"),
        ({"a": (2.0, 1.0)}, "ce", "weights.a"),
        ({"a": (1.0, 2.0, 3.0)}, "ce", "weights.a: .* needs a pair"),
        ({"a": ("1", 2.0)}, "ce", "weights.a: .* needs a pair"),
        ({"a": 3.0}, "ce", "weights.a: .* needs a pair"),
        ({"a": (1.0, float("inf"))}, "ce", "weights.a"),
        ({"a": (float("nan"), 1.0)}, "ce", "weights.a"),
    ],
)
def test_mistakes_name_the_weight(ranges: dict[str, Any], reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightSpace.of(ranges, reference)
