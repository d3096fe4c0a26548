"""What two runs must have in common to be called the same."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

FREE_COLUMNS = ("seconds", "workers_alive", "reissued")


def fingerprint(run_dir: Path) -> dict[str, bytes | str]:
    """The bytes of the policies, the learner and the trajectories, and the results and metrics that must not vary."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    files = [
        run_dir / "best" / "policy.safetensors",
        run_dir / "best" / "policy.json",
        newest / "policy.safetensors",
        newest / "learner.safetensors",
        *sorted((run_dir / "trajectories").rglob("*.parquet")),
    ]
    metrics = pq.read_table(run_dir / "metrics.parquet").drop_columns(list(FREE_COLUMNS))
    results = pq.read_table(run_dir / "results.parquet").drop_columns(["seconds"])
    rows = {"metrics": str(metrics.to_pylist()), "results": str(results.to_pylist())}
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files} | rows
