"""The methods of the held-out comparison: the policy, and what people use instead of it.

Each static method is a point in control space (mixture weights + hyper-parameters), so that every method runs through
the same inner loop, with the learning rate and L2 strength that were tuned for plain cross-entropy.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from palf_dist.config import PolicyConfig, RunConfig
from palf_dist.errors import ConfigError
from palf_dist.policies import CurriculumPolicy, HedgePolicy, OnlineLearnLoss, Policy, StaticPolicy, policy_spec
from palf_dist.policies.online_learnloss import PER_EXAMPLE
from palf_dist.policies.static import control_vector
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.family import evaluation_specs
from palf_dist.tasks.inputs import fits
from palf_dist.training_state import VALIDATION_FEATURES
from palf_dist.types import BASIS_LOSSES, DEFAULT_HYPERPARAMETERS, PAPER_BASIS

REFERENCE = "ce"
"""The method that all differences are taken against; it is part of every comparison."""

POLICY = "policy"
"""The method that the comparison is made for: the meta-learned policy, as it was trained to be used."""

TRAINVAL, CE_TRAINVAL, CE_BY_VALIDATION = "policy_trainval", "ce_trainval", "ce_by_validation"

KAPPA = 0.1
"""Of the shield of ``policy_shielded``: of the descent that cross-entropy's own gradient gives, a tenth is kept."""

TRAININGS = 20
"""Of each task by TuneLoss: as many as ``CE_BY_VALIDATION`` takes with the default grid."""

TRUE_LABELS = "ce_true_labels"

ORACLES = (TRUE_LABELS, "static_oracle", "static_oracle_left_out")
"""Rows that know what nobody does: bounds, not methods. The last two are of ``derived.PICKS``, and read test labels."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison. Controls that are not named keep ``types.DEFAULT_HYPERPARAMETERS``."""

    name: str
    label: str  # as tables and plots print it
    alpha: Mapping[str, float] = field(default_factory=dict)  # weights of the basis losses, of a static method
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    early_stopping: bool = False  # theta of the best accuracy on the noisy validation rows instead of the last
    schedule: Callable[[], Policy] | None = None  # makes the policy of a method that changes its weights on its own
    uses_policy: bool = False  # the meta-learned one
    control: Literal["shuffled", "schedule"] | None = None  # the meta-learned one, without what its state tells it
    shield: float | None = None  # kappa of a Lyapunov shield that the meta-learned one gets at use
    trains_on_validation: bool = False  # on the training and the validation rows together
    true_labels: bool = False  # on the training rows as they were before label noise
    by_validation: bool = False  # at all learning rates and L2 strengths of the grid, kept by the validation rows
    searched: int = 0  # trainings of the task in which TuneLoss looks for its mixture weights, by the validation rows
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of hyper-parameters, of a tuned static method
    by_name: bool = False  # compared only where it is asked for
    note: str = ""

    def __post_init__(self) -> None:
        kinds = (self.uses_policy, self.control is not None, bool(self.alpha), self.schedule is not None)
        assert sum(kinds) == 1, f"{self.name}: the learned policy, a control of it, mixture weights or a schedule"
        assert set(self.alpha) <= set(BASIS_LOSSES) and set(self.hyperparameters) <= set(DEFAULT_HYPERPARAMETERS)
        assert not self.alpha or abs(sum(self.alpha.values()) - 1) < 1e-9, f"{self.name}: alpha is not convex"
        assert set(self.grid) <= set(DEFAULT_HYPERPARAMETERS) and (not self.grid or self.is_static)
        assert self.shield is None or self.uses_policy

    @property
    def is_static(self) -> bool:
        """Whether it is a static loss, trained to the end, on the rows and with the values that all methods have."""
        fits_rows = self.early_stopping, self.by_validation, self.searched
        return bool(self.alpha) and not any((*fits_rows, self.trains_on_validation, self.true_labels))

    @property
    def points(self) -> list[dict[str, float]]:
        """The hyper-parameters to choose from; a method without a grid has one point, which sets none."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]

    def policy_of(self, config: PolicyConfig) -> PolicyConfig:
        """The section of the meta-learned policy as this method uses it: with its shield."""
        return config if self.shield is None else config.model_copy(update={"shield": self.shield})


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(POLICY, "meta-learned policy", uses_policy=True),
        Method(
            TRAINVAL,
            "policy, train + val",
            uses_policy=True,
            trains_on_validation=True,
            by_name=True,
            note="the policy on training and validation rows together, the labels of both as noisy as they are, in as "
            "many steps; to be compared with CE, train + val",
        ),
        Method(
            "policy_shielded",
            "policy, shielded",
            uses_policy=True,
            shield=KAPPA,
            by_name=True,
            note=f"the policy under a Lyapunov shield that it was not trained with, kappa {KAPPA:g}",
        ),
        Method(
            "policy_schedule",
            "own mean schedule",
            control="schedule",
            by_name=True,
            note="a control: the policy's controls at each refresh, averaged over meta-training tasks, for every task",
        ),
        Method(
            "policy_shuffled",
            "shuffled states",
            control="shuffled",
            by_name=True,
            note="a control: the policy sees the states of another held-out task of its group, at the same step",
        ),
        Method("ce", "tuned CE", {"ce": 1.0}, note="reference: learning rate and L2 were tuned for it"),
        Method("focal", "focal", {"focal": 1.0}),
        Method("label_smoothing", "label smoothing", {"label_smoothing": 1.0}),
        Method("symmetric_ce", "symmetric CE", {"symmetric_ce": 1.0}),
        Method(
            "info_nce",
            "InfoNCE alone",
            {"info_nce": 1.0},
            note="reads the features only: no gradient reaches the output layer, so near chance is expected",
        ),
        Method(
            "s5",
            "S5 (robust CE)",
            {"robust_ce": 1.0},
            {"la": 1.0, "e": 0.2, "ew": 0.6},
            note="static la = 1, e = 0.2, ew = 0.6, the constants that a policy starts from by default",
        ),
        Method("uniform", "uniform mixture", dict.fromkeys(PAPER_BASIS, 0.2), note="of the paper's five basis losses"),
        Method(
            "curriculum",
            "curriculum",
            schedule=CurriculumPolicy,
            note="by the clock: label smoothing, then cross-entropy, then focal",
        ),
        Method(
            "online_learnloss",
            "online LearnLoss",
            schedule=OnlineLearnLoss,
            note="re-learns the weights of the per-example losses every 10 steps from the run's own validation loss",
        ),
        Method(
            "tuneloss",
            "TuneLoss",
            dict.fromkeys(PER_EXAMPLE, 1 / len(PER_EXAMPLE)),
            searched=TRAININGS,
            by_name=True,
            note=f"constant weights of the per-example losses, found for each task in {TRAININGS} trainings of it, by "
            "the final accuracy on its own validation rows, which are as noisy as the training rows",
        ),
        Method(
            "hedge",
            "Hedge",
            schedule=HedgePolicy,
            by_name=True,
            note="exponentiated-gradient weights of the per-example losses, by the run's own training losses",
        ),
        Method("ce_rce", "0.1 CE + RCE", {"symmetric_ce": 1.0}, {"a": 0.1, "b": 1.0}),
        Method("generalised_ce", "generalised CE", {"generalised_ce": 1.0}, by_name=True, note="q = 0.7"),
        Method("mae", "MAE", {"mae": 1.0}, by_name=True),
        Method("elr", "ELR", {"elr": 1.0}, by_name=True, note="early-learning regularisation, lam = 3"),
        Method(
            "bootstrap",
            "bootstrapping",
            {"bootstrap": 1.0},
            by_name=True,
            note="label .8, the example's own averaged prediction .2",
        ),
        Method(
            "ce_early_stopping",
            "CE, early stopping",
            {"ce": 1.0},
            early_stopping=True,
            note="stopped on the validation rows, which are as noisy as the training rows",
        ),
        Method(
            CE_TRAINVAL,
            "CE, train + val",
            {"ce": 1.0},
            trains_on_validation=True,
            by_name=True,
            note="tuned CE on training and validation rows together, the labels of both as noisy as they are, in as "
            "many steps",
        ),
        Method(
            TRUE_LABELS,
            "oracle: true labels",
            {"ce": 1.0},
            true_labels=True,
            by_name=True,
            note="tuned CE on the same training rows without their label noise: no method, but what the noise costs CE",
        ),
        Method(
            CE_BY_VALIDATION,
            "CE, by validation",
            {"ce": 1.0},
            by_validation=True,
            by_name=True,
            note="learning rate and L2 by the final accuracy on the task's own validation rows, which are as noisy as "
            "the training rows, of all pairs of the grid; it costs the training of all: 20 for each task by default",
        ),
    )
}


TUNED: tuple[tuple[str, str, Mapping[str, Sequence[float]]], ...] = (
    ("focal", "focal, tuned", {"gamma": (0.1, 0.5, 1.0, 2.0, 5.0)}),
    ("label_smoothing", "smoothing, tuned", {"eps": (0.02, 0.05, 0.1, 0.2, 0.4)}),
    ("symmetric_ce", "symmetric CE, tuned", {"a": (0.03, 0.1, 0.3, 1.0), "b": (1.0, 3.0, 10.0)}),
    ("generalised_ce", "GCE, tuned", {"q": (0.3, 0.5, 0.7, 0.85, 1.0)}),
    ("elr", "ELR, tuned", {"lam": (0.3, 1.0, 3.0, 7.0, 15.0)}),
    ("bootstrap", "bootstrapping, tuned", {"beta": (0.2, 0.4, 0.6, 0.8, 0.95)}),
    ("s5", "S5, tuned", {"la": (0.0, 0.5, 1.0), "e": (0.2, 0.4, 0.6), "ew": (0.3, 0.6)}),
)
"""The tuned baselines: a static method, the label of what becomes of it, and what its hyper-parameters are chosen from.
None has more points than cross-entropy has pairs of learning rate and L2 strength by default. la says how far S5 goes
to the task's target prior: 0 not at all."""

METHODS |= {
    f"{name}_tuned": replace(
        METHODS[name],
        name=f"{name}_tuned",
        label=label,
        grid=grid,
        by_name=True,
        note=f"{', '.join(grid)} tuned on meta-training tasks",
    )
    for name, label, grid in TUNED
}


LEARNED: dict[str, Method] = {
    kind: Method(name, label, uses_policy=True, note=f"of runs with policy.kind {kind}, beside those of the policy")
    for kind, name, label in (
        ("schedule", "learned_schedule", "learned schedule (t/T only)"),
        ("constant", "learned_constant", "learned constants"),
        ("maml", "maml_loss", "MAML-Loss"),
    )
}
"""Baselines that are meta-trained too, by ``policy.kind``: methods where their runs are joined with those of another
policy."""


def is_claimed(method: str) -> bool:
    """Whether a row of the comparison is a method to be chosen, rather than an oracle or a control."""
    return method not in ORACLES and not (method in METHODS and METHODS[method].control)


def is_baseline(method: str) -> bool:
    """Whether a row is a method that people could use instead of the policy: not the policy in another use either."""
    return is_claimed(method) and not (method in METHODS and METHODS[method].uses_policy)


def baseline_policy(method: Method, tuned: Mapping[str, float] | None = None) -> Policy:
    """The policy of a method that is not meta-learned, with the hyper-parameters that were tuned for it."""
    assert not (method.uses_policy or method.control), f"{method.name} sets its controls by its policy file"
    if method.schedule is not None:
        return method.schedule()
    return StaticPolicy(control_vector(method.alpha, {**method.hyperparameters, **(tuned or {})}))


def select_methods(names: Iterable[str] | None = None) -> tuple[Method, ...]:
    """The named methods in the order of ``METHODS``, always with the reference; None selects all but those that are
    compared by name only.

    Raises ConfigError for an unknown name.
    """
    usual = (name for name, method in METHODS.items() if not method.by_name)
    wanted = set(usual if names is None else names) | {REFERENCE}
    for name in sorted(wanted - set(METHODS)):
        nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"evaluation.methods: unknown method {name!r}; did you mean {nearest!r}? Known: {', '.join(METHODS)}"
        )
    return tuple(method for method in METHODS.values() if method.name in wanted)


def tuned_together(names: Iterable[str] | None = None) -> tuple[Method, ...]:
    """The methods of a comparison that are measured on tasks of the training datasets before it: all static losses, so
    that the best of them can be told, where one of them is to be tuned; else none."""
    static = tuple(method for method in select_methods(names) if method.is_static)
    return static if any(method.grid for method in static) else ()


def check_methods(config: RunConfig, datasets: Mapping[str, EncodedDataset]) -> None:
    """Raises ConfigError for methods that the held-out tasks do not allow, before any work starts."""
    methods = select_methods(config.evaluation.methods)
    for method in methods:
        if method.uses_policy and (problem := _misfit(method, config.policy)):
            raise ConfigError(f"evaluation.methods: {method.name} {problem}; leave the method out")
    if any(method.control == "shuffled" for method in methods):
        alone = [specs[0] for specs in evaluation_specs(config, datasets) if len(specs) == 1]
        if alone:
            raise ConfigError(
                f"evaluation.methods: policy_shuffled needs two tasks in each group, but one of {alone[0].dataset} is "
                "alone; change tasks.group_size or evaluation.seeds, or leave the method out"
            )
    training = [datasets[source.name] for source in config.data.train]
    tuned = tuned_together(config.evaluation.methods)
    for index, architecture in enumerate(config.tasks.architectures if tuned else ()):
        if not any(fits(architecture, dataset) for dataset in training):
            raise ConfigError(
                f"evaluation.methods: tasks.architectures.{index} ({architecture.kind}) can read none of the training "
                "datasets, so no baseline can be tuned for it; leave out the tuned ones or this architecture"
            )


def _misfit(method: Method, config: PolicyConfig) -> str:
    """What keeps a policy from being used as the method asks for; empty where nothing does."""
    spec = policy_spec(config)
    if method.trains_on_validation:
        if spec.kind == "maml":
            return "trains on the validation rows, and a policy of policy.kind maml adapts by its loss on them"
        if read := [name for name in spec.features if name in VALIDATION_FEATURES]:
            return f"trains on the validation rows, and policy.features read them ({', '.join(read)})"
    if method.shield is not None:
        if spec.shield is not None:
            return f"is the policy under a shield, and it was trained under one (policy.shield {spec.shield:g})"
        if REFERENCE not in spec.basis:
            return f"mixes towards {REFERENCE}, which policy.basis leaves out ({', '.join(spec.basis)})"
    return ""
