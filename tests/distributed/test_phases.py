"""What the phases around the outer steps tell the user."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from palf_dist.config_loading import load_config
from palf_dist.distributed import phases
from palf_dist.distributed.session import Session

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


@pytest.mark.parametrize(
    ("setting", "told_of"),
    [("shield=0.5", "one with a shield; leave it out"), ("kind=maml", "a maml one"), ("shield=null", None)],
)
def test_who_meta_trains_what_no_loop_takes_is_told_before_any_work(setting: str, told_of: str | None) -> None:
    told: list[str] = []

    def gather(*_: Any, **__: Any) -> list[Any]:
        told.append("work")
        return []

    progress = SimpleNamespace(event=told.append, begin=lambda *_: None)
    config = load_config(SMOKE, [f"policy.{setting}", "inner.learning_rate=0.1", "inner.weight_decay=0.0"])
    phases.prepare(cast(Session, SimpleNamespace(config=config, progress=progress, gather=gather, kept=None)))
    warned = [f"AdaptiveLoss refuses {told_of}" in sentence for sentence in told]
    assert warned == ([True] if told_of else []) + [False, False]
