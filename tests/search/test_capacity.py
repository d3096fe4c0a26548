from __future__ import annotations

import pytest

from palf_dist.errors import ClusterError
from palf_dist.search.capacity import trials_at_once

ONE = [{"CPU": 1.0}]
THREE = [{"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 2.0}]


@pytest.mark.parametrize(
    ("bundles", "nodes", "wanted", "fit"),
    [
        (ONE, [{"CPU": 2.0, "memory": 1.0}], 10, 2),
        (ONE, [{"CPU": 2.0}], 1, 1),
        (THREE, [{"CPU": 5.0}], 10, 1),
        (THREE, [{"CPU": 3.0}, {"CPU": 2.0}], 10, 1),
        (THREE, [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 4.0}], 10, 2),
        ([{"CPU": 0.1}], [{"CPU": 0.3}], 10, 3),
        ([{"CPU": 1.0}, {"CPU": 1.0, "GPU": 0.5}], [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}], 10, 2),
    ],
)
def test_as_many_trials_as_fit(
    bundles: list[dict[str, float]], nodes: list[dict[str, float]], wanted: int, fit: int
) -> None:
    assert trials_at_once(bundles, nodes, wanted) == fit


@pytest.mark.parametrize(
    ("bundles", "nodes"),
    [
        (ONE, []),
        ([{"CPU": 3.0}], [{"CPU": 2.0}, {"CPU": 2.0}]),  # a bundle is never spread over nodes
        (THREE, [{"CPU": 4.0}]),
        ([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 8.0}, {"GPU": 1.0}]),
    ],
)
def test_what_can_never_be_placed_is_refused(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> None:
    with pytest.raises(ClusterError, match=r"can never give.*fewer workers"):
        trials_at_once(bundles, nodes, 10)


def test_the_refusal_says_what_is_asked_and_what_there_is() -> None:
    with pytest.raises(ClusterError, match=r"takes 5 CPU in 3 bundle.s., the largest 2 CPU.*1 node.s. with 4 CPU"):
        trials_at_once(THREE, [{"CPU": 4.0, "memory": 7.0}], 10)
