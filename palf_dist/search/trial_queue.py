"""Where Ray Tune gets its trials from: the unfinished ones of earlier processes first, then what the searcher proposes.

Tune's own generators number trials anew in every process and know of no others.
"""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Experiment, Trial
from ray.tune.search import SearchAlgorithm

from palf_dist.search.ledger import Ledger, TrialRecord
from palf_dist.search.proposals import Searcher

RESTARTS = 3
"""Times a trial whose process or node was lost begins again from its folder."""


class TrialQueue(SearchAlgorithm):
    """Trials under our own numbers: Tune's name of trial 7 is "00007"."""

    def __init__(self, ledger: Ledger, proposer: Searcher, trials: int, concurrent: int | None) -> None:
        """``trials``: in all; ``concurrent``: at most so many are under way at once, None: whatever Tune likes."""
        self._ledger, self._proposer, self._trials, self._concurrent = ledger, proposer, trials, concurrent
        self._again = list(ledger.unfinished())
        self._under_way: set[str] = set()
        self._spec: dict[str, Any] = {}

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def add_configurations(self, experiments: list[Experiment]) -> None:
        (experiment,) = experiments
        self._spec = experiment.spec

    def next_trial(self) -> Trial | None:
        if self.is_finished() or (self._concurrent is not None and self.under_way >= self._concurrent):
            return None
        record = self._again.pop(0) if self._again else self._new()
        self._under_way.add(record.name)
        return Trial(
            self._spec["run"],
            config={"number": record.number, "parameters": dict(record.parameters)},
            trial_id=record.name,
            storage=self._spec["storage"],
            placement_group_factory=self._spec["resources_per_trial"],
            max_failures=RESTARTS,
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._under_way.discard(trial_id)

    def is_finished(self) -> bool:
        return self._finished or (not self._again and len(self._ledger.trials) >= self._trials)

    def _new(self) -> TrialRecord:
        return self._ledger.create(self._proposer.suggest(len(self._ledger.trials) + 1))
