"""TuneLoss as a Searcher of Ray Tune, for anybody's own Tuner and trainable.

What a trainable reports, and when a trial counts as trained to the end, is said in docs/tune_searcher.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.result import TRAINING_ITERATION
from ray.tune.search import Searcher
from ray.tune.search.sample import Domain, Float, LogUniform
from ray.tune.search.variant_generator import parse_spec_vars

from palf_dist.atomic import write_atomic
from palf_dist.errors import CheckpointError, ConfigError
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.tuning import TuneLoss
from palf_dist.search.tune_result import TrialReport, failure, outcome_of, read

logger = logging.getLogger(__name__)

METRIC, FINAL = "e", "final"
"""Keys of a result; the metric's is a default."""
ALIKE = 0.1  # log units between weights


class TuneLossSearcher(Searcher):
    """Proposes loss weights to Ray Tune by TuneLoss (METHODS part 2): each trial is a training with the weights
    ``config[name]``, which reports its validation error e and its features phi [K].

    - ``space``: the weights to tune, as a WeightSpace or ``{name: (low, high)}`` (``tune.loguniform(low, high)`` will
      do too). None: the loguniform domains of the Tuner's ``param_space``, whose other values pass as they are.
    - ``reference``: name of the feature whose weight is 1, for a phi reported by name; "reference" by default.
    - ``metric``, ``mode``: the key of e and whether e is to be minimised. Ray passes those of a ``TuneConfig`` on only
      beside a ``param_space``; without either, "e" and "min".
    - ``features``: the key of phi.
    - ``noisy``: trainings with equal weights differ; the best is trained again before it is believed.

    The state is saved as JSON and continues exactly. Raises ConfigError for settings that contradict each other and
    for a report that cannot be read.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def __init__(
        self,
        space: WeightSpace | Mapping[str, Any] | None = None,
        reference: str | None = None,
        metric: str | None = None,
        mode: str | None = None,
        features: str = "phi",
        seed: int = 0,
        noisy: bool = False,
    ) -> None:
        if mode not in (None, "min", "max"):
            raise ConfigError(f"mode: {mode!r} is neither 'min' nor 'max'")
        if isinstance(space, WeightSpace) and reference not in (None, space.reference):
            raise ConfigError(f"reference: {reference!r} is not {space.reference!r}, as the space has it; leave it out")
        super().__init__(metric, mode)
        self._metric: str | None = metric
        self._mode: str | None = mode
        self._features = features
        self._reference = reference or "reference"
        self._seed, self._noisy = seed, noisy
        self._space: WeightSpace | None = None
        self._tune_loss: TuneLoss | None = None
        self._trials: dict[str, tuple[int, list[float]]] = {}  # every trial ever suggested: its proposal and weights
        self._reports: dict[str, dict[int, TrialReport]] = {}  # of the trials in flight, by step
        self._crashes: list[list[float]] = []  # weights of the trials that ended with an error
        self._warned = False
        if space is not None:
            self._start(space if isinstance(space, WeightSpace) else self._space_of(space))

    @property
    def tune_loss(self) -> TuneLoss:
        """The search itself: its best weights, its report. Errors there are minimised: -e in max mode."""
        if self._tune_loss is None:
            raise ConfigError(
                "space: no loss weights to tune; give TuneLossSearcher a space such as {'l2': (1e-4, 1.0)}, or the "
                "Tuner a param_space such as {'l2': tune.loguniform(1e-4, 1.0)}"
            )
        return self._tune_loss

    def _space_of(self, ranges: Mapping[str, Any]) -> WeightSpace:
        return WeightSpace.of({name: _bounds(name, value) for name, value in ranges.items()}, self._reference)

    def _start(self, space: WeightSpace) -> None:
        self._space = space
        self._tune_loss = TuneLoss(space, seed=self._seed, noisy=self._noisy)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take over what the Tuner was given. Always True: what cannot be taken over raises ConfigError."""
        for name, given, own in (("metric", metric, self._metric), ("mode", mode, self._mode)):
            if given and own and given != own:
                raise ConfigError(f"{name}: TuneConfig says {given!r}, TuneLossSearcher {own!r}; say it in one place")
        self._metric, self._mode = self._metric or metric, self._mode or mode
        _, domains, grids = parse_spec_vars(config)
        for path, domain in (*domains, *grids):
            if len(path) > 1 or not _is_loguniform(domain):
                raise ConfigError(
                    f"param_space.{'.'.join(map(str, path))}: TuneLossSearcher searches loss weights only, which are "
                    "tune.loguniform domains at the top level; make it a fixed value"
                )
        if domains:
            space = self._space_of({path[0]: domain for path, domain in domains})
            if self._space is None:
                self._start(space)
            elif _plain(space) != _plain(self._space):
                raise ConfigError(
                    f"param_space: searches {', '.join(space.names)}, but TuneLossSearcher has a space of its own "
                    f"({', '.join(self._space.names)}); define the search in one place"
                )
        elif self._space is not None and (twice := [name for name in self._space.names if name in config]):
            raise ConfigError(
                f"param_space.{twice[0]}: fixed there, but tuned by TuneLossSearcher; drop one of the two"
            )
        return True

    def suggest(self, trial_id: str) -> dict[str, float]:
        """Weights by name. There is always something to try, however many trials are in flight."""
        tune_loss = self.tune_loss
        self._metric = self._metric or METRIC
        if self._mode is None:
            if self._metric != METRIC:
                raise ConfigError(f"mode: tell TuneLossSearcher whether {self._metric!r} is to be 'min' or 'max'")
            self._mode = "min"
        assert self._space is not None and trial_id not in self._trials
        proposal = tune_loss.ask()
        self._trials[trial_id] = proposal.identifier, proposal.weights.tolist()
        self._reports[trial_id] = {}
        return self._space.named(proposal.weights)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep a report. Raises ConfigError where it cannot be read, which ends the experiment at its first report, as
        Tune itself does for one without the metric: every later trial would be trained in vain."""
        if self._in_flight(trial_id):
            self._keep(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell TuneLoss of a trial that ended; what was told before is not told again."""
        if not self._in_flight(trial_id):
            return
        returned, final = False, None
        if result is not None and not error:
            # Tune shows the report at which it stops a trial here only, and that of a trainable that returned before.
            returned, final = result.get(TRAINING_ITERATION) in self._reports[trial_id], result.get(FINAL)
            self._keep(trial_id, result)
        identifier, weights = self._trials[trial_id]
        reports = self._reports.pop(trial_id)
        seen = [reports[step] for step in sorted(reports)]
        if error and self._crashes_again(weights):
            seen = [failure(len(weights))]
        elif error or not seen:
            self.tune_loss.abandon(identifier)
            return
        trained = bool(returned if final is None else final)
        complete = trained or not np.isfinite(seen[-1].error)  # a training that diverged has failed, ended or not
        if not complete and final is None and not self._warned:
            self._warned = True
            logger.warning(
                "Trial %s was stopped before its trainable returned, so its reports count as snapshots, but not as a "
                "trained model. Where this is wrong, add 'final': True to the last report. (Said once.)",
                trial_id,
            )
        self.tune_loss.tell(identifier, outcome_of(seen, complete), complete=complete)

    def _crashes_again(self, weights: list[float]) -> bool:
        """Whether a training with such weights crashed before. A first crash is taken for the machine's fault; were
        the second too, TuneLoss, which learns nothing from it, could propose the same weights for ever."""
        again = any(np.abs(np.log(np.divide(weights, other))).max() < ALIKE for other in self._crashes)
        self._crashes.append(weights)
        return again

    def _in_flight(self, trial_id: str) -> bool:
        if trial_id not in self._trials:
            logger.warning("Trial %s is none that this searcher suggested (before it was restored?): ignored", trial_id)
        return trial_id in self._reports

    def _keep(self, trial_id: str, result: dict[str, Any]) -> None:
        assert self._space is not None
        if self._metric not in result:  # a trial that ended without any report; Tune refuses reports without the metric
            return
        report = read(result, self._space, self._metric, self._features, -1.0 if self._mode == "max" else 1.0)
        reports, step = self._reports[trial_id], result[TRAINING_ITERATION]
        # After a restore a trial goes on from its last checkpoint: what was reported later on is about to be repeated.
        self._reports[trial_id] = {s: kept for s, kept in reports.items() if s < step} | {step: report}

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON, atomically."""
        write_atomic(Path(checkpoint_path), json.dumps(self.__getstate__()).encode())

    def restore(self, checkpoint_path: str) -> None:
        """Go on exactly where the saved search was. Raises CheckpointError for a file that cannot be read, and
        ConfigError where this searcher was made for another search."""
        try:
            state = json.loads(Path(checkpoint_path).read_bytes())
            settings = state["settings"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{checkpoint_path}: no saved state of a TuneLossSearcher ({error})") from error
        for name, own in self._settings().items():
            if own is not None and own != settings[name]:
                raise ConfigError(
                    f"{name}: {checkpoint_path} has {settings[name]!r}, but this searcher {own!r}; make it alike"
                )
        self.__setstate__(state)

    def _settings(self) -> dict[str, Any]:
        space = _plain(self._space) if self._space else None
        return {"space": space, "metric": self._metric, "mode": self._mode, "features": self._features}

    def __getstate__(self) -> dict[str, Any]:
        """Everything, as plain data: what is saved, and what Tune's own copies of its arguments hold."""
        return {
            "settings": self._settings(),
            "reference": self._reference,
            "seed": self._seed,
            "noisy": self._noisy,
            "tune_loss": self._tune_loss.state() if self._tune_loss else None,
            "trials": dict(self._trials),
            "crashes": list(self._crashes),
            "reports": {trial: list(reports.items()) for trial, reports in self._reports.items()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state["settings"]
        self._metric, self._mode, self._features = settings["metric"], settings["mode"], settings["features"]
        self._reference, self._seed, self._noisy = state["reference"], state["seed"], state["noisy"]
        self._warned = False
        self._space, self._tune_loss = None, None
        if settings["space"]:
            self._space = WeightSpace(**{**settings["space"], "names": tuple(settings["space"]["names"])})
            self._tune_loss = TuneLoss.from_state(self._space, state["tune_loss"])
        self._trials = {trial: (identifier, weights) for trial, (identifier, weights) in state["trials"].items()}
        self._crashes = list(state["crashes"])
        self._reports = {
            trial: {step: TrialReport(*report) for step, report in reports}
            for trial, reports in state["reports"].items()
        }


def _plain(space: WeightSpace) -> dict[str, Any]:
    """A space as plain data."""
    return {
        "reference": space.reference,
        "names": list(space.names),
        "low": space.low.tolist(),
        "high": space.high.tolist(),
    }


def _is_loguniform(domain: object) -> bool:
    return isinstance(domain, Float) and isinstance(domain.get_sampler(), LogUniform)


def _bounds(name: str, value: Any) -> tuple[float, float]:
    if _is_loguniform(value):
        return value.lower, value.upper
    try:
        low, high = (float(bound) for bound in (() if isinstance(value, Domain) else value))  # a choice has a length
    except (TypeError, ValueError):
        raise ConfigError(f"weights.{name}: {value!r} is neither (low, high) nor tune.loguniform(low, high)") from None
    return low, high
