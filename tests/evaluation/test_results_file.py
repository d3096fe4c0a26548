"""What a results.parquet says by itself."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palf_dist.config import RunConfig
from palf_dist.errors import ConfigError, RunDirectoryError
from palf_dist.evaluation.results_file import ABOUT, read_results, results_bytes
from tests.evaluation.synthetic import few_rows

CARD = {"trained_on": ["iris"], "origins": ["iris"], "selection_score": float("nan"), "inner_steps": 150}
DATA = {"train": ("iris",), "held_out": ("wine",)}


def test_rows_configuration_and_card_come_back(tmp_path):
    config = RunConfig.model_validate({"data": DATA, "inner": {"learning_rate": 1e-5, "steps": 30}})
    path = tmp_path / "any-name.parquet"
    path.write_bytes(results_bytes(few_rows(), config, CARD))
    found = read_results(str(path))
    assert found.table.to_pylist() == pa.Table.from_pylist(few_rows()).to_pylist() and found.config == config
    assert found.card is not None and str(found.card) == str(CARD)
    assert results_bytes(few_rows(), config, CARD) == path.read_bytes(), "equal ones give equal bytes"


def test_a_file_of_earlier_versions_has_rows_alone(tmp_path):
    pq.write_table(pa.Table.from_pylist(few_rows()), tmp_path / "results.parquet")
    found = read_results(str(tmp_path / "results.parquet"))
    assert found.table.num_rows == len(few_rows()) and found.config is None and found.card is None


@pytest.mark.parametrize(
    ("about", "error", "message"),
    [
        ("{", RunDirectoryError, "its metadata palf_dist are not"),
        ("[]", RunDirectoryError, "its metadata palf_dist are not"),
        ('{"config": "name: a"}', RunDirectoryError, "its metadata palf_dist are not"),
        ('{"config": "name: a", "card": 3}', RunDirectoryError, "its metadata palf_dist are not"),
        ('{"config": "inner: {steps: none}", "card": {}}', ConfigError, r"its metadata.*\n?.*inner\.steps"),
    ],
)
def test_what_it_says_has_to_be_known(tmp_path, about, error, message):
    path = tmp_path / "results.parquet"
    pq.write_table(pa.Table.from_pylist(few_rows()).replace_schema_metadata({ABOUT: about}), path)
    with pytest.raises(error, match=message):
        read_results(str(path))
