"""What makes a design, and that none that was looked at is lost."""

from __future__ import annotations

import pytest

from palf_dist.config_loading import parse_config
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.designs import design_of, look, other_looks, published_designs, with_look

TEXT = "data: {train: [digits], held_out: [iris]}"


@pytest.mark.parametrize(
    ("override", "another"),
    [
        ("distributed.mode=async", True),
        ("distributed.max_staleness=1", True),
        ("distributed.threads=2", True),
        ("distributed.memory_per_worker=2.0", True),
        ("distributed.unit_timeout=9.0", False),
        ("tasks.architectures=[{kind: conv}]", True),
        ("tasks.pool=3", True),
        ("policy.kind=schedule", True),
        ("inner.steps=300", True),
        ("evaluation.select_tasks=96", True),
        ("tasks.noise.high=0.5", True),
        ("distributed.workers=7", False),
        ("data.held_out=[wine]", False),
        ("evaluation.methods=[policy]", False),
        ("evaluation.seeds=9", False),
        ("checkpoint.every=7", False),
    ],
)
def test_what_makes_another_design(override, another):
    assert (design_of(parse_config(TEXT, "a", [override])) != design_of(parse_config(TEXT, "a"))) == another


def test_another_look_by_the_same_design_replaces_no_entry():
    config = parse_config(TEXT, "a")
    own = look(config, ["wine", "iris"], 1.0)
    assert own["datasets"] == ["iris", "wine"]
    first = with_look([], own)
    assert with_look(first, own) == first
    renamed = with_look(first, look(config.model_copy(update={"name": "other"}), ["iris", "wine"], 1.0))
    assert [entry["name"] for entry in renamed] == ["other"], "in the place it had"
    second = with_look(first, look(config, ["iris", "wine"], 2.0))
    assert [entry["diff_vs_tuned_ce"] for entry in second] == [1.0, 2.0]
    seeded = look(config.model_copy(update={"seed": 7}), ["iris", "wine"], 1.0)
    assert [entry["seed"] for entry in with_look(first, seeded)] == [0, 7]
    assert len(with_look(first, look(config, ["iris"], 1.0))) == 2


def test_what_other_looks_at_the_same_design_found():
    config = parse_config(TEXT, "a")
    own = look(config, ["iris", "wine"], 1.0)
    seeded = look(config.model_copy(update={"seed": 7}), ["iris", "wine"], 1.0)
    again, fewer, unknown = (
        look(config, names, value)
        for names, value in ((["wine", "iris"], 2.0), (["iris"], 3.0), (["wine", "iris"], None))
    )
    another = look(parse_config(TEXT, "a", ["policy.kind=schedule"]), ["iris", "wine"], 4.0)
    assert other_looks([own, seeded, again, fewer, unknown, another], own) == [1.0, 2.0]
    assert other_looks([own], own) == []


@pytest.mark.parametrize("name", ["results.json", "ablations.json", "ablations-palf.json"])
@pytest.mark.parametrize("text", ["{torn", "[]", '{"designs": 3}', '{"designs": [{"name": "a"}]}', "{}"])
def test_a_file_whose_designs_would_be_lost_is_told(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(RunDirectoryError, match=rf"{name}: is no file of this command .*restore it"):
        published_designs(tmp_path)


def test_there_may_be_no_file(tmp_path):
    assert published_designs(tmp_path / "nowhere") == []
