"""From which datasets the tasks of meta-training are drawn."""

from __future__ import annotations

from collections import Counter

import pytest

from palf_dist.tasks.family import sample_specs
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
