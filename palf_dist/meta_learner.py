"""The central meta-learner: judges contributions, sums them in key order, and takes one Adam step per outer step.

No Ray in here, and nothing depends on the order or the number of times in which contributions arrive.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from palf_dist.config import RunConfig
from palf_dist.errors import CheckpointError
from palf_dist.types import Contribution, Unit

REFUSAL_CAUSES = ("non_finite", "outlier", "duplicate", "stale")
"""non_finite: a gradient, its norm or the outer loss is NaN or inf. outlier: the norm exceeds outlier_factor x the
median of the recent ones. duplicate: this unit was applied before. stale: computed with too old a policy."""

NORM_HISTORY = 64  # recent norms the median is taken of
NORM_WARM_UP = 5  # norms seen before any is called outlying
ADAM_EPSILON = 1e-8
DIGEST_SIZE = 16


@dataclass(frozen=True)
class StepReport:
    """What became of the contributions of one outer step."""

    outer_step: int  # version of the policy that the step started from
    outer_loss: float  # mean over the accepted contributions; NaN when none was accepted
    gradient_norm: float  # of their mean, before clipping; NaN when none was accepted
    learning_rate: float
    applied: int
    refused: dict[str, int]  # cause -> contributions refused in this step; every cause is a key
    terms: dict[str, float] = field(default_factory=dict)  # outer_<term>, means as outer_loss, where it has several


class MetaLearner:
    """Owner of the shared policy parameters.

    ``policy``: float32 [number of policy parameters]. ``version``: outer steps taken. ``applied`` and ``refused``:
    contributions of the whole run so far, the latter by cause.
    """

    def __init__(self, config: RunConfig, initial: np.ndarray) -> None:
        assert initial.ndim == 1 and np.isfinite(initial).all()
        self._settings = config.meta_learner
        self._max_staleness = config.distributed.max_staleness if config.distributed.mode == "async" else 0
        self.policy = np.array(initial, dtype=np.float32)
        self.version = 0
        self.applied = 0
        self.refused = dict.fromkeys(REFUSAL_CAUSES, 0)
        self._updates = 0  # Adam steps; less than version where a whole step was refused
        self._first_moment = np.zeros(self.policy.shape)
        self._second_moment = np.zeros(self.policy.shape)
        self._recent_norms: deque[float] = deque(maxlen=NORM_HISTORY)
        self._ledger: set[bytes] = set()
        self._keys = bytearray()  # the same in the order of application: ``state`` is asked for after every step

    def apply(self, contributions: Sequence[Contribution]) -> StepReport:
        """Take one outer step with its contributions, in any order, and return what was done.

        The step is along the mean of the accepted gradients. A step whose contributions are all refused leaves the
        policy and Adam's state alone; the version advances all the same, so that the run goes on.
        """
        assert contributions
        median = float(np.median(self._recent_norms)) if len(self._recent_norms) >= NORM_WARM_UP else 0.0
        refused = dict.fromkeys(REFUSAL_CAUSES, 0)
        accepted: list[Contribution] = []
        for contribution in sorted(contributions, key=lambda item: item.unit):
            cause = self._verdict(contribution, median)
            if cause is None:
                accepted.append(contribution)
                self._ledger.add(key := _key(contribution.unit))
                self._keys += key
            else:
                refused[cause] += 1
        return self._take_step(accepted, refused)

    def apply_one(self, contribution: Contribution) -> StepReport:
        """Asynchronous mode: an outer step of one contribution, as it arrives.

        A stale or repeated one is refused and counted without a step: the version stays, or one slow worker would
        age the work of all others.
        """
        if cause := self._too_late(contribution):
            self.refused[cause] += 1
            refused = {**dict.fromkeys(REFUSAL_CAUSES, 0), cause: 1}
            return StepReport(self.version, np.nan, np.nan, self._learning_rate(), 0, refused)
        return self.apply([contribution])

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs to go on bit for bit, as arrays for ``save_checkpoint``."""
        counters = [self.version, self._updates, self.applied, *self.refused.values()]
        return {
            "policy": self.policy.copy(),
            "first_moment": self._first_moment.copy(),
            "second_moment": self._second_moment.copy(),
            "recent_norms": np.array(self._recent_norms, dtype=np.float64),
            "ledger": np.array(self._keys).reshape(-1, DIGEST_SIZE),
            "counters": np.array(counters, dtype=np.int64),
        }

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from ``state()``. Raises CheckpointError when it belongs to a policy of another size."""
        if arrays["policy"].shape != self.policy.shape:
            raise CheckpointError(
                f"the checkpoint's policy has {arrays['policy'].size} parameters, the configured one has "
                f"{self.policy.size}; resume with the configuration that the run was started with"
            )
        self.policy = arrays["policy"].astype(np.float32)
        self._first_moment = arrays["first_moment"].astype(np.float64)
        self._second_moment = arrays["second_moment"].astype(np.float64)
        self._recent_norms = deque(arrays["recent_norms"].tolist(), maxlen=NORM_HISTORY)
        self._ledger = {row.tobytes() for row in arrays["ledger"]}
        self._keys = bytearray(arrays["ledger"].tobytes())
        self.version, self._updates, self.applied, *refused = arrays["counters"].tolist()
        self.refused = dict(zip(REFUSAL_CAUSES, refused, strict=True))

    def _too_late(self, contribution: Contribution) -> str | None:
        if _key(contribution.unit) in self._ledger:
            return "duplicate"
        staleness = self.version - contribution.policy_version
        assert staleness >= 0, "a contribution of a policy that does not exist yet"
        return "stale" if staleness > self._max_staleness else None

    def _verdict(self, contribution: Contribution, median: float) -> str | None:
        """The cause for which a contribution is refused, or None. Notes the norm of every finite one.

        Outlying norms are noted too: should the scale of the gradients change for good, the median follows.
        """
        if cause := self._too_late(contribution):
            return cause
        gradient = contribution.gradient
        assert gradient is not None and gradient.shape == self.policy.shape
        # A norm that overflows counts as non-finite: clipping by it would silently zero the gradient.
        with np.errstate(over="ignore", invalid="ignore"):
            norm = _norm(gradient.astype(np.float64))
        if not (np.isfinite(norm) and np.isfinite(contribution.metrics["outer_loss"])):
            return "non_finite"
        self._recent_norms.append(norm)
        return "outlier" if 0 < median * self._settings.outlier_factor < norm else None

    def _learning_rate(self) -> float:
        settings = self._settings
        progress = min(self.version / max(settings.outer_steps - 1, 1), 1.0)
        return settings.learning_rate * (1.0 - (1.0 - settings.final_learning_rate) * progress)

    def _take_step(self, accepted: list[Contribution], refused: dict[str, int]) -> StepReport:
        outer_loss = gradient_norm = np.nan
        learning_rate = self._learning_rate()
        terms: dict[str, float] = {}
        if accepted:
            terms = {name: float(np.mean([c.metrics[name] for c in accepted])) for name in accepted[0].metrics}
            outer_loss = terms.pop("outer_loss")
            total = np.zeros(self.policy.shape)
            for contribution in accepted:  # one by one, in key order: the rounding is part of the result
                assert contribution.gradient is not None
                total += contribution.gradient
            gradient = total / len(accepted)
            gradient_norm = _norm(gradient)
            gradient *= min(1.0, self._settings.clip / max(gradient_norm, np.finfo(np.float64).tiny))
            self._adam(gradient, learning_rate)
        report = StepReport(self.version, outer_loss, gradient_norm, learning_rate, len(accepted), refused, terms)
        self.version += 1
        self.applied += len(accepted)
        for cause, count in refused.items():
            self.refused[cause] += count
        return report

    def _adam(self, gradient: np.ndarray, learning_rate: float) -> None:
        """Adam in float64 with decoupled weight decay towards 0; the policy is rounded to float32 once."""
        beta1, beta2 = self._settings.beta1, self._settings.beta2
        self._updates += 1
        self._first_moment = beta1 * self._first_moment + (1.0 - beta1) * gradient
        self._second_moment = beta2 * self._second_moment + (1.0 - beta2) * gradient**2
        first = self._first_moment / (1.0 - beta1**self._updates)
        second = self._second_moment / (1.0 - beta2**self._updates)
        policy = self.policy.astype(np.float64)
        direction = first / (np.sqrt(second) + ADAM_EPSILON) + self._settings.weight_decay * policy
        self.policy = (policy - learning_rate * direction).astype(np.float32)


def _norm(vector: np.ndarray) -> float:
    """Euclidean norm without BLAS, whose summation order may follow the number of threads."""
    return float(np.sqrt(np.sum(np.square(vector))))


def _key(unit: Unit) -> bytes:
    """128 bits that name a unit in the ledger: 16 bytes for each unit of the run, whatever its settings hold."""
    text = json.dumps([unit.kind, unit.outer_step, unit.group, unit.settings])
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_SIZE).digest()
