"""One rule for all claims."""

from __future__ import annotations

import pytest

from palf_dist.evaluation.inference import clustered_mean
from palf_dist.evaluation.verdicts import all_of, judge, judged, scaled


@pytest.mark.parametrize(
    ("values", "claimed", "verdict"),
    [
        ([3.0, 3.1, 2.9, 3.0, 3.1], 2.3, "reproduced"),
        ([2.0, 2.1, 1.9, 2.0, 2.1], 2.3, "not reproduced"),  # a gain, but a smaller one
        ([3.0, 9.0, -3.0, 3.0, 4.0], 2.3, "not reproduced"),  # as large, but nothing is sure
        ([-1.0, -1.1, -0.9, -1.0, -1.1], 2.3, "opposite"),
        ([3.0, 3.1, 2.9, 3.0], 2.3, "not measured"),  # four datasets
        ([-1.0, -1.1, -0.9, -1.0], 2.3, "not measured"),
        ([2.3] * 5, 2.3, "not measured"),  # no error to judge by
        ([0.0] * 12, 0.0, "not measured"),
        ([5.0], 0.0, "not measured"),
        ([], 0.0, "not measured"),
    ],
)
def test_the_rule(values, claimed, verdict):
    assert judge(clustered_mean(values, range(len(values))), claimed) == verdict


def test_in_another_unit() -> None:
    estimate = clustered_mean([1.0, 2.0, 3.0, 4.0, 5.0], range(5))
    lost = scaled(estimate, -10.0)
    assert (lost.mean, lost.se, lost.low, lost.high) == pytest.approx(
        (-30.0, 10 * estimate.se, -10 * estimate.high, -10 * estimate.low)
    )
    assert judged(lost, "apples").verdict == "opposite"
    assert judged(lost, "apples").measured.startswith("-30.00 (7.07) apples, 95 % interval")


def test_a_claim_of_several_things() -> None:
    assert all_of(["reproduced", "reproduced"]) == "reproduced" and all_of(["opposite"] * 2) == "opposite"
    assert all_of(["reproduced", "opposite"]) == "not reproduced"
    assert all_of(["reproduced", "not measured"]) == "not measured"
