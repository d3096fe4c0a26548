"""The file of the overhead benchmark, as results read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.overhead import OVERHEAD_JSON, overhead_figure, read_overheads

WITH = {"policy": "robust", "digest": "ab" * 32, "threads": 1, "torch": "2.9.1"}
MODEL = {"percent": 4.25, "ci95": [3.0, 5.0], "seconds": 0.1}


def written(folder: Path, models: object) -> Path:
    (folder / OVERHEAD_JSON).write_text(json.dumps({"rounds": 31, "steps": 150, **WITH, "models": models}))
    return folder


def test_the_figure_is_that_of_the_model_with_the_most(tmp_path: Path) -> None:
    figure = overhead_figure(read_overheads(written(tmp_path, {"MLP": MODEL, "conv": MODEL | {"percent": 9.5}})))
    assert figure.value == 9.5 and figure.estimate is None and figure.upper == 5.0
    assert figure.meaning == (
        "percent of additional training time, conv (95 % interval 3.0 to 5.0), which has the most (others: MLP 4.2); "
        "a policy of kind robust (abababababab), one thread, torch 2.9.1"
    )


def test_without_a_file_it_is_not_measured(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        figure = overhead_figure(read_overheads(folder))
        assert figure.value is None and "python -m benchmarks.overhead --write-docs" in figure.meaning


@pytest.mark.parametrize("models", [{}, {"MLP": {"percent": 1.0}}, {"MLP": MODEL | {"percent": "NaN"}}, 3])
def test_another_file_is_one_message(tmp_path: Path, models: object) -> None:
    with pytest.raises(
        RunDirectoryError, match=r"results_overhead\.json: is no file of python -m benchmarks\.overhead"
    ):
        read_overheads(written(tmp_path, models))
