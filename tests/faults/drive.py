"""A run in a process of its own: python -m tests.faults.drive CONFIG.json RUN_DIR new|resume. Prints its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from palf_dist.config import RunConfig
from palf_dist.distributed.driver import meta_train


def main() -> None:
    config, run_dir, how = sys.argv[1:]
    result = meta_train(
        RunConfig.model_validate_json(Path(config).read_text()), run_dir, resume={"new": False, "resume": True}[how]
    )
    print(json.dumps({"interrupted": result.interrupted, "outer_steps": result.outer_steps}))


if __name__ == "__main__":
    main()
