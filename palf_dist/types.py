"""Frozen records that the other modules share.

Shape legend, used in all docstrings:
G tasks of a group | N rows of a split | B minibatch rows | C classes (padded to the widest task) | D features
K basis losses | U controls (mixture weights + loss hyper-parameters) | S state features | P inner parameters of one
task | T inner steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

FIRST_BASIS = ("ce", "focal", "label_smoothing", "symmetric_ce", "info_nce", "robust_ce")
BASIS_LOSSES = (*FIRST_BASIS, "generalised_ce", "mae", "elr", "bootstrap")
"""The basis losses l_k of equation (4), in the order of the mixture weights alpha. New ones come last."""

PAPER_BASIS = FIRST_BASIS[:5]
"""The five of the paper; the others are ours (METHODS part 6) or of other authors."""

FIRST_HYPERPARAMETERS = ("e", "la", "ew", "wd", "gamma", "eps", "a", "b", "tau")
HYPERPARAMETERS = (*FIRST_HYPERPARAMETERS, "q", "lam", "beta")
"""Loss hyper-parameters a policy may set: e assumed noise rate of the forward correction, la strength of the logit
adjustment, ew belief of the posterior weights, wd L2 multiplier, gamma focal exponent, eps label smoothing, a and b
of a CE + b RCE, tau temperature of info_nce, q exponent of the generalised cross-entropy, lam strength of the
early-learning regularisation, beta share of the given label in the bootstrapped one."""

CONTROLS = BASIS_LOSSES + HYPERPARAMETERS
"""Columns of every controls tensor [G, U]: alpha first, then the hyper-parameters. Files name them, never count them:
their numbers change with every new basis loss."""

FIRST_CONTROLS = FIRST_BASIS + FIRST_HYPERPARAMETERS
"""The columns before generalised_ce and those after it came."""

CONTROL_INDEX = {name: index for index, name in enumerate(CONTROLS)}
WD = CONTROL_INDEX["wd"]
NUM_BASIS = len(BASIS_LOSSES)
BASIS_PARTS = (slice(0, len(FIRST_BASIS)), slice(len(FIRST_BASIS), 9), slice(9, NUM_BASIS))
"""Columns of alpha that are summed by themselves, one part for each time that some came: mixtures of those before keep
the bits of their sums, however many come after them."""

AVERAGED_BASIS = ("elr", "bootstrap")
"""The basis losses that read the whole averaged predictions."""

DEFAULT_HYPERPARAMETERS = {
    "e": 0.2,
    "la": 1.0,
    "ew": 0.6,
    "wd": 1.0,
    "gamma": 2.0,
    "eps": 0.1,
    "a": 1.0,
    "b": 1.0,
    "tau": 0.2,
    "q": 0.7,
    "lam": 3.0,
    "beta": 0.8,
}
"""Values of the paper's basis losses, of S5 (METHODS part 6) for e, la, ew, and their authors' for q, lam and beta (of
hard bootstrapping)."""


Inputs = tuple[Tensor, ...]
"""What an inner model reads, one tensor per kind of column. mlp: (numeric [G, N, D] float32, categorical [G, N, J]
int64 codes, 0 = missing or unseen; J may be 0). conv, resnet: (images [G, N, H, W, channels] float32,).
transformer: (tokens [G, N, L] int64, 0 = padding,)."""


@dataclass(frozen=True)
class Rows:
    """One split of every task of a group, padded to the largest task."""

    inputs: Inputs  # each [G, N, ...]
    labels: Tensor  # [G, N] int64 (0 on padding)
    mask: Tensor  # [G, N] float32, 1 on real rows

    def batch(self, index: Tensor) -> tuple[Inputs, Tensor]:
        """Rows ``index`` [G, B] of each task: inputs [G, B, ...] and labels [G, B]."""
        tasks, rows = self.labels.shape
        flat = (index + rows * torch.arange(tasks, device=index.device)[:, None]).flatten()

        def gather(column: Tensor) -> Tensor:  # one index is several times faster than two
            return column.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape)

        return tuple(gather(column) for column in self.inputs), gather(self.labels)

    def pieces(self, size: int) -> list[Rows]:
        """The same rows, of every task ``size`` at a time."""
        columns = zip(*(column.split(size, 1) for column in (self.labels, self.mask, *self.inputs)), strict=True)
        return [Rows(tuple(inputs), labels, mask) for labels, mask, *inputs in columns]


@dataclass(frozen=True)
class TaskSpec:
    """What one task is: a dataset and the condition it is put in. Rebuilt from its keys anywhere."""

    keys: tuple[int | str, ...]  # the random-number keys of this task
    dataset: str
    train_size: int
    # "uniform": resampled over all k classes; "pair_flip": y -> y + 1 mod k; "class_dependent": a random transition
    # matrix of the task; "instance_dependent": rates and wrong labels depend on the inputs (tasks/corruptions.py)
    noise_kind: str
    noise_rate: float
    imbalance: float  # largest : smallest class frequency in training (1 = as the data is)
    target_prior: str  # "train": test rows have the training frequencies; "uniform": balanced test rows
    architecture: int  # index into config.tasks.architectures
    optimiser: str  # sgd | momentum | adam
    condition: str = ""  # its name in the held-out comparison; tasks of meta-training have none
    class_rows: int = 0  # classes with fewer rows in the dataset are left out (and those below splits.MIN_CLASS_ROWS)


@dataclass(frozen=True)
class TaskGroup:
    """G tasks that train side by side: same architecture, same optimiser, same number of inner steps."""

    specs: tuple[TaskSpec, ...]
    model: InnerModel
    theta0: Tensor  # [G, P] initial inner parameters
    train: Rows  # noisy labels
    validation: Rows  # as noisy as train
    meta_validation: Rows  # clean labels; test frequencies follow each task's target_prior
    test: Rows  # clean labels
    clean_train_labels: Tensor  # [G, N]; diagnostics only, never seen by a policy
    batches: Tensor  # [T, G, B] int64 training-row indices of every inner step
    class_mask: Tensor  # [G, C] bool, True on real classes
    log_prior_ratio: Tensor  # [G, C] log(pi_train / pi_target), 0 on padding and where target_prior is "train"
    learning_rate: Tensor  # [G, 1] peak learning rate
    weight_decay: Tensor  # [G, 1] L2 strength before the policy's multiplier
    first: int = 0  # where these tasks are part of a larger group: how many of it come before them

    @property
    def size(self) -> int:
        return len(self.specs)

    @property
    def num_classes(self) -> Tensor:
        """[G] float: number of real classes k of each task."""
        return self.class_mask.sum(1).to(self.theta0.dtype)

    @property
    def train_sizes(self) -> Tensor:
        """[G] float: number of real training rows n of each task."""
        return self.train.mask.sum(1)


class InnerModel(Protocol):
    """G inner models of one architecture, evaluated together; parameters are one flat tensor theta [G, P].

    ``forward`` and ``backward`` are the ordinary passes; ``tangent`` and ``backward_tangent`` are their directional
    derivatives along v [G, P], so that one forward-over-reverse pass gives H v (METHODS part 4). None of the four
    uses autograd; ``apply`` is the same function as ``forward`` for callers that do.
    """

    num_parameters: int
    feature_size: int

    def init(self, generators: list[np.random.Generator]) -> Tensor:
        """Initial parameters [G, P] float32, task g drawn from generators[g] only."""
        ...

    def apply(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Logits [G, n, C] and penultimate features [G, n, D], twice differentiable by autograd."""
        ...

    def forward(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
        """Logits, features and the tape that the other three methods need."""
        ...

    def backward(self, theta: Tensor, tape: Any, dlogits: Tensor, dfeatures: Tensor | None) -> Tensor:
        """Gradient [G, P] of <dlogits, logits> + <dfeatures, features>."""
        ...

    def tangent(self, theta: Tensor, tape: Any, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Directional derivatives of logits and features along v, and the tangent tape."""
        ...

    def backward_tangent(
        self,
        theta: Tensor,
        tape: Any,
        tangent_tape: Any,
        v: Tensor,
        dlogits: Tensor,
        dfeatures: Tensor | None,
        dlogits_tangent: Tensor,
        dfeatures_tangent: Tensor | None,
    ) -> Tensor:
        """Directional derivative [G, P] of ``backward`` when theta moves along v and the cotangents along theirs."""
        ...


@dataclass(frozen=True, order=True)
class Unit:
    """The key of one piece of work. With the run's configuration it determines the result bit for bit."""

    kind: str  # tune | calibrate | meta_gradient | select | evaluate
    outer_step: int
    group: int
    settings: str = ""  # canonical JSON of what else the kind needs (method name, learning rate, window, ...)


@dataclass
class Contribution:
    """What a unit returns. Only numpy and Arrow, so that Ray ships it without copies and without pickled code."""

    unit: Unit
    policy_version: int
    metrics: dict[str, float] = field(default_factory=dict)
    gradient: np.ndarray | None = None  # float64 [number of policy parameters]
    rows: list[dict[str, Any]] = field(default_factory=list)  # per-task results (tune, select, evaluate)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # e.g. feature sums of calibrate
    trajectory: Any = None  # pyarrow.Table with palf_dist.trajectory.SCHEMA
    carried: dict[str, np.ndarray] | None = None  # next inner state of the windowed estimators
    halvings: int = 0  # times that memory ran out and the tasks were done in twice as many parts
    seconds: float = 0.0


class UnitRunner(Protocol):
    """Runs units; the same object in process and inside a Ray worker."""

    def check(self) -> None:
        """Raises ConfigError where this place lacks what units need (memory, a compiler), as only it can tell."""
        ...

    def run(
        self,
        unit: Unit,
        policy: np.ndarray,
        policy_version: int,
        prepared: Mapping[str, Any],
        carried: dict[str, np.ndarray] | None = None,
        halvings: int = 0,
    ) -> Contribution:
        """``halvings``: how often this unit has run out of memory before, each time killing its worker."""
        ...
