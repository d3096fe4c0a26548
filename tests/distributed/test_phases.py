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


@pytest.mark.parametrize("shield", ["0.5", "null"])
def test_who_meta_trains_under_a_shield_is_told_before_any_work(shield: str) -> None:
    told: list[str] = []

    def gather(*_: Any, **__: Any) -> list[Any]:
        told.append("work")
        return []

    progress = SimpleNamespace(event=told.append, begin=lambda *_: None)
    config = load_config(SMOKE, [f"policy.shield={shield}", "inner.learning_rate=0.1", "inner.weight_decay=0.0"])
    phases.prepare(cast(Session, SimpleNamespace(config=config, progress=progress, gather=gather)))
    warned = ["AdaptiveLoss refuses one with a shield" in sentence for sentence in told]
    assert warned == ([True] if shield == "0.5" else []) + [False, False]
