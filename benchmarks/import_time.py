"""How long ``from palf_dist import AdaptiveLoss`` takes compared with ``import torch`` alone, each in fresh processes,
by turns, so that what else the machine does meets both. ``python -m benchmarks.import_time``"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

ROUNDS = 11
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
STATEMENTS = {"torch": "import torch", "AdaptiveLoss": "from palf_dist import AdaptiveLoss"}


def seconds(statement: str) -> float:
    """Of an import in a process of its own."""
    ended = subprocess.run([sys.executable, "-c", TIMED.format(statement)], capture_output=True, text=True, check=True)
    return float(ended.stdout)


def main() -> None:
    for statement in STATEMENTS.values():  # the first ones read the files from disk
        seconds(statement)
    rounds = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(ROUNDS)]
    for name in STATEMENTS:
        print(f"{name:<13} {median(each[name] for each in rounds):.2f} s")
    ratios = sorted(each["AdaptiveLoss"] / each["torch"] for each in rounds)
    print(f"ratio         {median(ratios):.2f}, in {ROUNDS} rounds {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
