"""A run in a process of its own: python -m tests.faults.drive CONFIG.json RUN_DIR new|resume.

It tells what it does on stdout, one JSON object a line; the last line is its result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from palf_dist.config import RunConfig
from palf_dist.distributed.driver import meta_train
from palf_dist.progress import Progress


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


class Telling(Progress):
    """Tells its events and its progress."""

    def advance(self, done: int) -> None:
        super().advance(done)
        tell(phase=self.status.phase, done=done, workers=self.status.workers)

    def event(self, text: str) -> None:
        super().event(text)
        tell(event=text)


def main() -> None:
    config, run_dir, how = sys.argv[1:]
    result = meta_train(
        RunConfig.model_validate_json(Path(config).read_text()),
        run_dir,
        resume={"new": False, "resume": True}[how],
        progress=Telling(),
    )
    tell(interrupted=result.interrupted, outer_steps=result.outer_steps)


if __name__ == "__main__":
    main()
