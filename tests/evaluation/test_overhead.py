"""The file of the overhead benchmark, as results read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.overhead import OVERHEAD_JSON, overhead_figure, read_overheads

WITH = {"policy": "robust", "refresh": 100, "digest": "ab" * 32, "threads": 1, "torch": "2.9.1"}
CELL = {
    "model": "MLP",
    "batch": 64,
    "policy": "robust",
    "refresh": 100,
    "percent": 4.25,
    "ci95": [3.0, 5.0],
    "plain": 100,
}


def written(folder: Path, cells: object) -> Path:
    (folder / OVERHEAD_JSON).write_text(json.dumps({"rounds": 31, **WITH, "cells": cells}))
    return folder


def test_the_figure_is_that_of_the_model_with_the_most(tmp_path: Path) -> None:
    """Of the policy and the refresh interval that the file names."""
    others = [CELL | {"refresh": 10, "percent": 80.0}, CELL | {"policy": "palf", "percent": 90.0}]
    figure = overhead_figure(
        read_overheads(written(tmp_path, [CELL, CELL | {"model": "conv", "percent": 9.5}, *others]))
    )
    assert figure.value == 9.5 and figure.estimate is None and figure.upper == 5.0
    assert figure.meaning == (
        "percent of additional training time, conv, batch 64 (95 % interval 3.0 to 5.0), which has the most (others: "
        "MLP, batch 64 4.2); a policy of kind robust (abababababab), one thread, torch 2.9.1, asked every 100 steps"
    )


def test_without_a_file_it_is_not_measured(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        figure = overhead_figure(read_overheads(folder))
        assert figure.value is None and "python -m benchmarks.overhead --write-docs" in figure.meaning


@pytest.mark.parametrize(
    "cells", [[], [CELL | {"percent": "NaN"}], [{"model": "MLP"}], [CELL | {"policy": "palf"}], 3], ids=str
)
def test_another_file_is_one_message(tmp_path: Path, cells: object) -> None:
    with pytest.raises(
        RunDirectoryError, match=r"results_overhead\.json: is no file of python -m benchmarks\.overhead"
    ):
        read_overheads(written(tmp_path, cells))
