"""A search in a process of its own: python -m tests.search.drive RUN_DIR new|resume TRIALS STEPS DELAY."""

from __future__ import annotations

import json
import sys

from palf_dist.search.driver import tune
from tests.search.quadratic import Quadratic, search_config


def main() -> None:
    run_dir, how, trials, steps, delay = sys.argv[1:]
    target = Quadratic(steps=int(steps), delay=float(delay))
    resume = {"new": False, "resume": True}[how]
    result = tune(search_config(trials=int(trials)), run_dir, resume=resume, make_target=lambda config: target)
    print(json.dumps(result.record()))


if __name__ == "__main__":
    main()
