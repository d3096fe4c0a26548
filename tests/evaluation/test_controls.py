"""Who gets whose controls in the held-out comparison."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from palf_dist.evaluation.controls import partners
from palf_dist.types import TaskSpec


def tasks(cells: list[tuple[str, float]]) -> list[TaskSpec]:
    return [
        TaskSpec(("evaluate", index), dataset, 60, "uniform", noise_rate, 1.0, "train", 0, "adam")
        for index, (dataset, noise_rate) in enumerate(cells)
    ]


@given(
    cells=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.5])), min_size=2, max_size=30),
    group=st.integers(0, 50),
)
def test_a_partner_is_of_another_dataset_or_noise_rate_wherever_that_can_be(
    cells: list[tuple[str, float]], group: int
) -> None:
    found = partners(tasks(cells), group)
    everyone = np.arange(len(cells))
    assert sorted(found) == everyone.tolist() and (found != everyone).all()
    if 2 * max(Counter(cells).values()) <= len(cells):
        assert all(cells[task] != cells[other] for task, other in enumerate(found))


def test_the_group_chooses_the_partners() -> None:
    grid = tasks([(dataset, rate) for dataset in "ab" for rate in (0.0, 0.3) for _ in range(4)])
    found = [partners(grid, group).tolist() for group in range(5)]
    assert len({tuple(each) for each in found}) == 5 and partners(grid, 3).tolist() == found[3]
