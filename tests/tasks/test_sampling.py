"""From which datasets and classes the tasks of meta-training are drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from palf_dist.tasks.family import sample_specs
from palf_dist.tasks.splits import draw_rows
from tests.tasks.cases import image_dataset, run_config, text_dataset, toy_dataset

LARGE = toy_dataset("large", rows=3000, classes=5, seed=3)
TABLES = (toy_dataset("small", rows=160, classes=2), LARGE)
ALL = {item.name: item for item in (*TABLES, image_dataset(), image_dataset("colours", channels=3), text_dataset())}
KINDS = [
    {"kind": "mlp", "hidden": [8]},
    {"kind": "conv", "channels": [4], "image_size": 4},
    {"kind": "transformer", "width": 8, "feedforward": 8, "vocabulary": 64, "length": 8},
]


@pytest.mark.parametrize("outsider", [None, "pictures", "texts"])
def test_families_take_turns_however_many_datasets_they_have(outsider: str | None) -> None:
    names = {"small", "large", "pictures", "colours", "texts"} - {outsider}
    run = run_config(
        [ALL[name] for name in sorted(names)], tasks={"architectures": KINDS, "families": "in_turn", "group_size": 12}
    )
    groups = [sample_specs(run, ALL, (0, "train", turn), turn) for turn in range(30)]
    families = [{ALL[spec.dataset].family for spec in group} for group in groups]
    assert all(len(family) == 1 for family in families)
    count = Counter(family for (family,) in families)
    assert len(set(count.values())) == 1 and set(count) == {ALL[name].family for name in names}
    assert {spec.dataset for group in groups for spec in group} == names
    assert families[: len(count)] * (30 // len(count)) == families


def test_a_share_of_the_tasks_keeps_a_subset_of_the_classes_with_rows_enough() -> None:
    tasks = {"group_size": 400, "train_size": [600, 1200]}
    run = run_config([LARGE], tasks={**tasks, "class_subsets": 0.5})
    specs = sample_specs(run, ALL, (1,), 0)
    subsets = [spec for spec in specs if spec.classes]
    assert abs(len(subsets) / len(specs) - 0.5 * np.log(5 / 3) / np.log(5 / 2)) < 0.08
    assert {len(spec.classes) for spec in subsets} == {3, 4}  # two have too few rows
    assert {label for spec in subsets for label in spec.classes} == set(range(5))
    for spec in subsets[:10]:
        task = draw_rows(LARGE, spec, run.tasks)
        assert task.num_classes == len(spec.classes)
        for rows in task.rows.values():
            assert set(LARGE.labels[rows]) == set(spec.classes)
            assert (np.array(spec.classes)[task.labels[rows]] == LARGE.labels[rows]).all()
        if spec.imbalance == 1:
            assert abs(len(task.rows["train"]) - spec.train_size) <= len(spec.classes)
    whole = sample_specs(run_config([LARGE], tasks=tasks), ALL, (1,), 0)
    assert all(not spec.classes for spec in whole)
    assert [(spec.noise_rate, spec.imbalance) for spec in specs] == [
        (spec.noise_rate, spec.imbalance) for spec in whole
    ]
