"""Units of work: pure functions of (configuration, unit key, policy), so that any worker can do or redo any of them.

Kinds: ``tune`` measures plain cross-entropy at one learning rate and L2 strength, or a static loss at one choice of its
hyper-parameters; ``calibrate`` collects the statistics that normalise the state features; ``meta_gradient`` is the
inner run of one task group with its meta-gradient; ``select`` scores the policy on fresh tasks of the training
datasets; ``evaluate`` runs one method on one group of held-out tasks, at one learning rate and L2 strength.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from palf_dist.compilation import check_compiler
from palf_dist.config import RunConfig
from palf_dist.evaluation.controls import PolicyControls
from palf_dist.evaluation.methods import METHODS, REFERENCE, Method, baseline_policy, select_methods
from palf_dist.faults import fault_point
from palf_dist.group_work import (
    Stretch,
    at_refreshes,
    final_accuracy,
    in_parts,
    join,
    measure,
    meta_gradient,
    moments,
    part_of,
    policy_of,
)
from palf_dist.inner_loop import InnerLoop, InnerState, move_group
from palf_dist.memory import LEVERS, OutOfMemory, Plan, out_of_memory, release
from palf_dist.policies import LearnedPolicy, Policy, make_policy, policy_spec
from palf_dist.preparation import canonical, found_by_tuning, tuning_columns, validated_pairs
from palf_dist.rehearsal import Work
from palf_dist.task_search import searched
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.family import build_group, evaluation_specs, sample_specs
from palf_dist.trajectory import build_table
from palf_dist.types import Contribution, TaskGroup, TaskSpec, Unit

Result = TypeVar("Result")


def meta_gradient_units(config: RunConfig, outer_step: int) -> list[Unit]:
    """The units whose contributions make one outer step. Windowed estimators add which window of which inner run."""
    settings = ""
    if config.estimator.window is not None:
        run, window = divmod(outer_step, windows(config))
        settings = canonical({"run": run, "window": window})
    groups = range(config.meta_learner.groups_per_step)
    return [Unit("meta_gradient", outer_step, group, settings) for group in groups]


def windows(config: RunConfig) -> int:
    """Outer steps that an inner run takes."""
    return -(-config.inner.steps // (config.estimator.window or config.inner.steps))


def groups_seen(config: RunConfig) -> int:
    """Different groups of tasks that the meta-training takes its gradients on."""
    learner, pool = config.meta_learner, config.tasks.pool
    groups = -(-learner.outer_steps // windows(config)) * learner.groups_per_step
    return groups if pool is None else min(pool, groups)


def select_every(config: RunConfig) -> int:
    """Outer steps between two selection scores. Counted in inner runs, so that a run cut into windows has no more
    candidates for the best policy than one that is not."""
    return config.evaluation.select_every * windows(config)


def drawn_as(config: RunConfig, run: int, group: int) -> tuple[int, int]:
    """Which inner run and group of a meta-training without a pool has the tasks that this one trains on: the first
    ``tasks.pool`` groups of tasks in turn, so that a larger pool holds a smaller one."""
    pool, at_once = config.tasks.pool, config.meta_learner.groups_per_step
    return (run, group) if pool is None else divmod((run * at_once + group) % pool, at_once)


def select_units(config: RunConfig, outer_step: int) -> list[Unit]:
    """Units that score the policy on the same fresh tasks of the training datasets each time."""
    groups = -(-config.evaluation.select_tasks // config.tasks.group_size)
    return [Unit("select", outer_step, group) for group in range(groups)]


def evaluate_units(config: RunConfig, datasets: Mapping[str, EncodedDataset]) -> list[Unit]:
    """One unit per method and group of held-out tasks; of a method that is tuned on each of them, one per pair of
    learning rate and L2 strength besides, of which ``rows_of`` keeps one for each task."""
    groups = range(len(evaluation_specs(config, datasets)))
    methods = select_methods(config.evaluation.methods)
    settings = [
        canonical({"method": method.name} | pair)
        for method in methods
        for pair in (validated_pairs(config) if method.by_validation else [{}])
    ]
    return [Unit("evaluate", 0, group, each) for each in settings for group in groups]


def initial_policy(config: RunConfig) -> np.ndarray:
    """phi before meta-training, float32."""
    return _at_start(config).initial()


def learned_policy(config: RunConfig, prepared: Mapping[str, Any]) -> LearnedPolicy:
    """The policy of a run, with the calibrated normalisation of its state."""
    spec = policy_spec(config.policy)
    return make_policy(spec, torch.tensor(prepared["feature_mean"]), torch.tensor(prepared["feature_std"]))


class Runner:
    """Runs units of one configuration over datasets held in memory. Implements ``types.UnitRunner``."""

    def __init__(self, config: RunConfig, datasets: Mapping[str, EncodedDataset]) -> None:
        self.config, self.datasets = config, datasets
        gpu = torch.cuda.is_available() and config.distributed.gpus_per_worker != 0  # Ray hides those that are not ours
        self.device = torch.device("cuda" if gpu else "cpu")
        self._plan = Plan(config, datasets, self._gpu_memory() if gpu else inf)
        self._halvings = 0
        self._controls = PolicyControls(config, datasets, self._recorded)
        self._kinds: dict[str, Callable[..., Contribution]] = {
            "tune": self._tune,
            "calibrate": self._calibrate,
            "meta_gradient": self._meta_gradient,
            "select": self._select,
            "evaluate": self._evaluate,
        }

    def check(self) -> None:
        """Raises ConfigError where this GPU has less memory than units take (the driver knows the machines' memory), or
        where there is nothing to compile with."""
        if self.device.type == "cuda":
            self._plan.check()
        elif self.config.inner.compile:
            check_compiler()

    def run(
        self,
        unit: Unit,
        policy: np.ndarray,
        policy_version: int,
        prepared: Mapping[str, Any],
        carried: dict[str, np.ndarray] | None = None,
        halvings: int = 0,
    ) -> Contribution:
        """The contribution of ``unit`` under policy parameters ``policy``; equal arguments give equal bytes, unless
        memory runs out, which ``Contribution.halvings`` tells. Raises OutOfMemory where one task alone takes too much.

        ``halvings``: how often this unit ran out of memory before, each time killing its worker.
        """
        began = time.perf_counter()
        self._halvings = halvings
        fault_point("before_unit", unit)
        phi = torch.from_numpy(np.array(policy, np.float32)).to(self.device)
        settings = json.loads(unit.settings) if unit.settings else {}
        torch.set_flush_denormal(True)  # Adam's second moments of idle weights decay into denormals, which are slow
        try:
            contribution = self._kinds[unit.kind](unit, settings, phi, prepared, carried)
        finally:
            torch.set_flush_denormal(False)
        contribution.policy_version = policy_version
        contribution.halvings = self._halvings
        contribution.seconds = time.perf_counter() - began
        if fault_point("after_unit", unit) == "nan" and contribution.gradient is not None:
            contribution.gradient[:] = np.nan
        return contribution

    def _tune(
        self, unit: Unit, settings: dict[str, Any], phi: Tensor, prepared: Mapping[str, Any], _: object
    ) -> Contribution:
        config = self.config
        index = settings["architecture"]
        narrow = config.tasks.model_copy(
            update={"architectures": (config.tasks.architectures[index],), "optimisers": (settings["optimiser"],)}
        )
        number = settings["group"]
        narrowed = config.model_copy(update={"tasks": narrow})
        specs = sample_specs(narrowed, self.datasets, ("tune", config.seed, number), number)
        specs = tuple(replace(spec, architecture=index) for spec in specs)
        if "method" in settings:
            group = self._build(specs, prepared["reference"])
            policy = baseline_policy(METHODS[settings["method"]], settings["hyperparameters"])
            result = self._train(group, policy, phi, "baseline")
        else:
            chosen = {name: settings[name] for name in ("learning_rate", "weight_decay")}
            group = self._build(specs, {f"{index}/{settings['optimiser']}": chosen})
            result = self._train(group, baseline_policy(METHODS[REFERENCE]), phi)
        return Contribution(unit, 0, metrics={"accuracy": float(result.mean())})

    def _calibrate(
        self, unit: Unit, settings: dict[str, Any], phi: Tensor, prepared: Mapping[str, Any], _: object
    ) -> Contribution:
        group = self._group(("calibrate", self.config.seed, unit.group), prepared)
        policy = _at_start(self.config)
        untrained = torch.from_numpy(policy.initial()).to(phi)
        read = partial(at_refreshes, phi=untrained, read=lambda state: state.last_features)
        parts = self._in_parts("train", group, policy, lambda loop, _: read(loop))
        values = np.concatenate([refresh for part in parts for refresh in part])
        known = np.isfinite(values)
        values = np.where(known, values, 0.0)
        arrays = {"count": known.sum(0).astype(float), "sum": values.sum(0), "square": (values**2).sum(0)}
        return Contribution(unit, 0, arrays=arrays)

    def _meta_gradient(
        self,
        unit: Unit,
        settings: dict[str, Any],
        phi: Tensor,
        prepared: Mapping[str, Any],
        carried: dict[str, np.ndarray] | None,
    ) -> Contribution:
        config, window = self.config, self.config.estimator.window
        run, start, stop = unit.outer_step, 0, config.inner.steps
        if window is not None:
            run, start = settings["run"], settings["window"] * window
            stop = min(stop, start + window)
        run, number = drawn_as(config, run, unit.group)
        turn = run * config.meta_learner.groups_per_step + number
        group = self._group(("meta_gradient", config.seed, run, number), prepared, turn)
        policy = learned_policy(config, prepared)
        keys = (config.seed, unit.outer_step, unit.group)

        def stretch(loop: InnerLoop, part: TaskGroup) -> Stretch:
            fault_point("in_unit", unit)
            return meta_gradient(config, loop, phi, start, stop, keys, part_of(carried, part))

        parts = self._in_parts("meta_gradient", group, policy, stretch)
        whole = join(parts)
        estimate = whole.estimate
        return Contribution(
            unit,
            0,
            metrics={"outer_loss": estimate.outer_loss, **estimate.metrics},
            gradient=estimate.gradient,
            trajectory=build_table(unit, group.specs, estimate.records, policy.features),
            carried=whole.carried,
        )

    def _select(
        self, unit: Unit, settings: dict[str, Any], phi: Tensor, prepared: Mapping[str, Any], _: object
    ) -> Contribution:
        group = self._group(("select", self.config.seed, unit.group), prepared)
        ours = self._train(group, learned_policy(self.config, prepared), phi)
        reference = self._train(group, baseline_policy(METHODS[REFERENCE]), phi)
        return Contribution(unit, 0, metrics={"accuracy": float(ours.mean()), "reference": float(reference.mean())})

    def _evaluate(
        self, unit: Unit, settings: dict[str, Any], phi: Tensor, prepared: Mapping[str, Any], _: object
    ) -> Contribution:
        specs = evaluation_specs(self.config, self.datasets)[unit.group]
        method = METHODS[settings["method"]]
        policy = self._policy(method, unit.group, specs, phi, prepared)
        training = f"{specs[0].architecture}/{specs[0].optimiser}"
        rates = {name: settings.get(name, value) for name, value in prepared["reference"][training].items()}
        group = self._build(specs, {training: rates}, method.trains_on_validation)
        if method.true_labels:
            group = replace(group, train=replace(group.train, labels=group.clean_train_labels))
        parts = self._in_parts(
            "evaluate",
            group,
            policy,
            lambda loop, _: measure(searched(loop, phi, method.searched), phi, early_stopping=method.early_stopping),
        )
        measured = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        shields = {m.policy_of(self.config.policy).shield for m in select_methods(self.config.evaluation.methods)}
        if shields != {None}:  # every row has the column
            measured.setdefault("shield_share", np.full(len(specs), np.nan))
        chosen = rates | tuning_columns(method, specs[0], prepared)
        rows = [
            self._row(method, spec, {name: values[task].tolist() for name, values in measured.items()}) | chosen
            for task, spec in enumerate(specs)
        ]
        return Contribution(unit, 0, metrics={"accuracy": float(measured["accuracy"].mean())}, rows=rows)

    def _policy(
        self, method: Method, group: int, specs: Sequence[TaskSpec], phi: Tensor, prepared: Mapping[str, Any]
    ) -> Policy:
        """What sets the controls of one group of held-out tasks."""
        if not (method.uses_policy or method.control):
            return baseline_policy(method, found_by_tuning(method, specs[0], prepared).get("hyperparameters"))
        used = self.config.model_copy(update={"policy": method.policy_of(self.config.policy)})
        policy = learned_policy(used, prepared)
        if method.control is None:
            return policy
        return self._controls.schedule(method.control, group, specs, policy, phi, prepared)

    def _recorded(
        self, kind: str, specs: Sequence[TaskSpec], policy: LearnedPolicy, phi: Tensor, prepared: Mapping[str, Any]
    ) -> np.ndarray:
        """The controls [R, G, U] that the policy asks for, before the shield, in an inner run of these tasks; the
        group is gone when this returns, as the memory estimate knows of one at a time."""
        group = self._build(specs, prepared["reference"])

        def asked(state: InnerState) -> Tensor:
            assert state.features is not None
            return policy.controls(phi, state.features)

        return np.concatenate(self._in_parts(kind, group, policy, lambda loop, _: at_refreshes(loop, phi, asked)), 1)

    def _gpu_memory(self) -> float:
        """Bytes of this worker's share of its GPU."""
        share = min(1.0, self.config.distributed.gpus_per_worker or 1.0)
        return share * torch.cuda.get_device_properties(self.device).total_memory

    def _row(self, method: Method, spec: TaskSpec, measured: dict[str, Any]) -> dict[str, Any]:
        """The result of one task; what is not defined is None."""
        return {
            "method": method.name,
            "dataset": spec.dataset,
            "origin": self.datasets[spec.dataset].origin,
            "family": self.datasets[spec.dataset].family,
            "architecture": self.config.tasks.architectures[spec.architecture].kind,
            "noise_kind": spec.noise_kind,
            "noise_rate": spec.noise_rate,
            "condition": spec.condition,
            "target_prior": spec.target_prior,
            "seed": int(spec.keys[-1]),
            "train_size": spec.train_size,
            **{name: None if value != value else value for name, value in measured.items()},
            "curve_steps": moments(self.config.inner.steps),
        }

    def _group(self, keys: tuple[int | str, ...], prepared: Mapping[str, Any], turn: int | None = None) -> TaskGroup:
        """A group whose number, the last of ``keys``, is its turn too, unless another one is given."""
        specs = sample_specs(self.config, self.datasets, keys, int(keys[-1]) if turn is None else turn)
        return self._build(specs, prepared["reference"])

    def _build(
        self,
        specs: Sequence[TaskSpec],
        reference: Mapping[str, Mapping[str, float]],
        train_on_validation: bool = False,
    ) -> TaskGroup:
        group = build_group(self.config, self.datasets, specs, reference, train_on_validation)
        return move_group(group, device=self.device)

    def _train(self, group: TaskGroup, policy: Policy, phi: Tensor, kind: str = "train") -> np.ndarray:
        """Clean test accuracy [G] after a whole inner run under ``policy``."""
        return np.concatenate(self._in_parts(kind, group, policy, lambda loop, _: final_accuracy(loop, phi)))

    def _in_parts(
        self, kind: str, group: TaskGroup, policy: Policy, work: Callable[[InnerLoop, TaskGroup], Result]
    ) -> list[Result]:
        """``work`` on the inner runs of all tasks at once, or of a part of them after the other where that is what the
        memory takes; where it runs out all the same, anew in twice as many parts."""
        spec = group.specs[0]
        planned = self._plan.parts(Work(kind, spec.architecture, spec.optimiser), group.size)
        while True:
            parts = min(planned << self._halvings, group.size)
            try:
                some = in_parts(group, parts)
                return [work(InnerLoop(part, policy_of(policy, part), self.config.inner), part) for part in some]
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if parts == group.size:
                    raise OutOfMemory(
                        f"inner.steps: memory ran out with one of {group.size} tasks at a time ({kind}); {LEVERS}"
                    ) from error
            self._halvings += 1
            release(self.device)  # after the error, whose frames hold what the work had made


def _at_start(config: RunConfig) -> LearnedPolicy:
    """The run's policy before calibration. With its initial parameters it stays at its static starting point, whatever
    the state: an output layer of zero ignores it, and an adapting policy divides its sums by infinity."""
    spec = policy_spec(config.policy)
    usual = inf if spec.kind == "maml" else 1.0
    return make_policy(spec, torch.zeros(len(spec.features)), torch.full((len(spec.features),), usual))


def rows_of(contributions: Iterable[Contribution]) -> list[dict[str, Any]]:
    """Per-task rows in key order. Their ``seconds``, a task's share of its unit's, are all that another run of the same
    configuration may give otherwise: what else the machine had to do is in them.

    Of a method that trained a task several times the run with the best accuracy on its validation rows, of equals with
    the lowest loss there, and of these the first; with the seconds of all.
    """
    kept: dict[tuple[str, int, int], dict[str, Any]] = {}
    for item in sorted(contributions, key=lambda c: c.unit):
        for task, row in enumerate(item.rows):
            key, seconds = (row["method"], item.unit.group, task), item.seconds / len(item.rows)
            other = kept.get(key)
            best = other if other is not None and _rank(other) >= _rank(row) else row
            kept[key] = best | {"seconds": seconds + (other["seconds"] if other else 0.0)}
    return list(kept.values())


def _rank(row: Mapping[str, Any]) -> tuple[float, float]:
    """How good a run looks on the validation rows; worst where that is not known."""
    accuracy, loss = row["validation_accuracy"], row["validation_loss"]
    return (-inf if accuracy is None else accuracy, -inf if loss is None else -loss)
