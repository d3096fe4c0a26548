"""How to use a finished policy: the one snippet that the command line and the report show, and the README extends."""

from __future__ import annotations

import json
from pathlib import Path


def usage(policy: str | Path) -> str:
    """The lines that put the policy file, or the folder that holds it, into somebody's PyTorch loop."""
    return f"""\
from palf_dist import AdaptiveLoss

criterion = AdaptiveLoss.load({json.dumps(str(policy), ensure_ascii=False)}, total_steps=...)

loss = criterion(logits, y, index=index)  # index: which training rows these are
loss.backward(); criterion.step(model, optimizer); optimizer.step()
"""
