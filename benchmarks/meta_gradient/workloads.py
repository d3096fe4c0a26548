"""The workloads: task groups, policies and outer losses of which every contender computes the meta-gradient.

A to C are those of METHODS part 4 with the architectures that palf_dist has: the paper's five basis losses, a policy
6-32-5 that sets alpha alone, cross-entropy on clean rows after the last of 20 steps. D is a unit of meta-training: the
robust policy, 150 Adam steps, the soft error at six checkpoints; classes and rows are padded and priors shifted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palf_dist.architecture_config import Architecture, ConvConfig, MLPConfig, TransformerConfig
from palf_dist.config import InnerConfig, OuterLossConfig, PolicyConfig
from palf_dist.inner_loop import InnerLoop, InnerState, StepResult, move_group
from palf_dist.inner_models import InputShape, build_model
from palf_dist.policies import LearnedPolicy, policy_spec
from palf_dist.randomness import random_generator
from palf_dist.training_state import normalise
from palf_dist.types import Rows, TaskGroup, TaskSpec

PAPER = PolicyConfig(kind="palf", hidden=32)
SPREAD = 0.3  # of the policy's parameters around its starting point, where much of the gradient is zero


@dataclass(frozen=True)
class Workload:
    """What the tasks of a letter have in common."""

    title: str
    architecture: Architecture
    shape: InputShape
    classes: int
    rows: int  # of training
    outer_rows: int  # clean ones that the outer loss reads
    batch: int
    steps: int
    policy: PolicyConfig
    outer: OuterLossConfig
    learning_rate: dict[str, float]  # peak, by optimiser
    real: bool = False  # D: padding, shifted priors, weight decay; palf_dist reads the training state itself


def _small(title: str, architecture: Architecture, shape: InputShape, classes: int, batch: int) -> Workload:
    outer = OuterLossConfig(kind="cross_entropy", every=20)
    rates = {"sgd": 0.1, "adam": 0.005}
    return Workload(title, architecture, shape, classes, 20 * batch, 2 * batch, batch, 20, PAPER, outer, rates)


WORKLOADS = {
    "A": _small("MLP 64-64-10", MLPConfig(hidden=(64,)), InputShape(numeric=64), 10, 32),
    "B": _small(
        "conv net 16-32, 28 x 28",
        ConvConfig(channels=(16, 32), image_size=28, groups=4),
        InputShape(image=(28, 28, 1)),
        10,
        32,
    ),
    "C": _small(
        "transformer 64, one layer",
        TransformerConfig(width=64, heads=4, feedforward=128, layers=1, vocabulary=256, length=32),
        InputShape(tokens=32, vocabulary=256),
        4,
        16,
    ),
    "D": Workload(
        "MLP 64-64-10, whole inner run",
        MLPConfig(hidden=(64,)),
        InputShape(numeric=64),
        10,
        400,
        128,
        32,
        150,
        PolicyConfig(kind="robust"),
        OuterLossConfig(),
        {"adam": 0.02},
        real=True,
    ),
}


@dataclass(frozen=True)
class Case:
    """A workload with a number of tasks and an inner optimiser."""

    letter: str
    tasks: int
    optimiser: str

    @property
    def workload(self) -> Workload:
        return WORKLOADS[self.letter]

    def __str__(self) -> str:
        return f"{self.letter}, {self.tasks} task{'s' * (self.tasks > 1)}, {self.optimiser}"


CASES = (
    *(Case("A", tasks, optimiser) for tasks in (1, 8, 32) for optimiser in ("sgd", "adam")),
    *(Case(letter, 8, optimiser) for letter in ("B", "C") for optimiser in ("sgd", "adam")),
    Case("D", 48, "adam"),
)


class FedLoop(InnerLoop):
    """The inner loop with training states that are given, as the peers are given them."""

    states: Tensor  # raw [refreshes, G, S]

    def _read(self, state: InnerState, logits: Tensor, labels: Tensor) -> Tensor:
        return self.states[state.step // self.policy.refresh]


@dataclass(frozen=True)
class Problem:
    """One case in one floating-point type: the meta-gradient of ``outer`` at ``phi``."""

    case: Case
    loop: InnerLoop
    policy: LearnedPolicy
    phi: Tensor
    states: Tensor  # raw [refreshes, G, S]: those of a run in float64

    @property
    def group(self) -> TaskGroup:
        return self.loop.group

    @property
    def outer(self) -> OuterLossConfig:
        return self.case.workload.outer

    @property
    def normalised_states(self) -> Tensor:
        """What the policy's network reads, [refreshes, G, S]."""
        return normalise(self.states, self.policy.mean.to(self.states), self.policy.std.to(self.states))


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """The case in ``dtype``. Its numbers are those of float32, and its states those of the same run in float64."""
    group, draw = make_group(case), random_generator("phi", case.letter)
    spec = policy_spec(case.workload.policy)
    count = len(spec.features)
    exact = move_group(group, dtype=torch.float64)
    start = LearnedPolicy(spec, [0.0] * count, [1.0] * count)
    seen = _states(exact, start, torch.from_numpy(start.initial()).double()).nan_to_num().flatten(0, 1)
    policy = LearnedPolicy(spec, seen.mean(0), seen.std(0).clamp_min(0.1))
    phi = policy.initial() + SPREAD * draw.normal(size=policy.num_parameters).astype(np.float32)
    states = _states(exact, policy, torch.from_numpy(phi).double()).to(dtype)
    loop = (InnerLoop if case.workload.real else FedLoop)(move_group(group, dtype=dtype), policy, InnerConfig())
    if isinstance(loop, FedLoop):
        loop.states = states
    return Problem(case, loop, policy, torch.from_numpy(phi).to(dtype), states)


def _states(group: TaskGroup, policy: LearnedPolicy, phi: Tensor) -> Tensor:
    """Raw features [refreshes, G, S] of an inner run under the policy."""
    loop = InnerLoop(group, policy, InnerConfig())
    states: list[Tensor] = []

    def note(state: InnerState, result: StepResult) -> None:
        if result.refreshed:
            states.append(state.last_features)

    loop.run(loop.start(), phi, loop.steps, after_step=note)
    return torch.stack(states)


def make_group(case: Case) -> TaskGroup:
    """Tasks with a prototype of each class plus noise (words: some of a range of their class), a share of the training
    labels redrawn; in float32."""
    workload, size = case.workload, case.tasks
    draw = random_generator("meta-gradient benchmark", case.letter)
    classes = np.full(size, workload.classes)
    train_rows, ratio = np.full(size, workload.rows), np.zeros((size, workload.classes), np.float32)
    noise = np.full(size, 0.2)
    if workload.real:
        classes[size // 2 :] = draw.integers(2, workload.classes + 1, size - size // 2)
        train_rows = draw.integers(60, workload.rows + 1, size)
        train_rows[0] = workload.rows
        noise = np.where(draw.random(size) < 0.25, 0.0, draw.uniform(0.05, 0.6, size))
        for task in range(0, size, 2):  # half of them have an imbalance of 10 : 1 and are judged in balance
            prior = 10.0 ** -np.linspace(0, 1, classes[task])
            ratio[task, : classes[task]] = np.log(prior / prior.mean())
    inputs = _inputs(workload, size, draw)

    def split(count: int) -> Rows:
        labels = draw.integers(0, 1_000_000, (size, count)) % classes[:, None]
        return Rows((inputs(labels),), torch.from_numpy(labels), torch.ones(size, count))

    train, meta_validation = split(workload.rows), split(workload.outer_rows)
    redrawn = draw.random(train.labels.shape) < noise[:, None]
    wrong = draw.integers(0, 1_000_000, train.labels.shape) % classes[:, None]
    real = torch.from_numpy(np.arange(workload.rows) < train_rows[:, None])
    noisy = torch.where(torch.from_numpy(redrawn), torch.from_numpy(wrong), train.labels)
    model = build_model(workload.architecture, workload.shape, workload.classes)
    spec = TaskSpec((0,), "made up", workload.rows, "uniform", 0.2, 1.0, "train", 0, case.optimiser)
    few = Rows(tuple(column[:, :2] for column in train.inputs), noisy[:, :2], torch.ones(size, 2))
    return TaskGroup(
        specs=(spec,) * size,
        model=model,
        theta0=model.init([random_generator("theta", task) for task in range(size)]),
        train=Rows(train.inputs, torch.where(real, noisy, 0), real.float()),
        validation=few,
        meta_validation=meta_validation,
        test=few,
        clean_train_labels=train.labels,
        batches=_batches(workload, train_rows, draw),
        class_mask=torch.from_numpy(np.arange(workload.classes) < classes[:, None]),
        log_prior_ratio=torch.from_numpy(ratio),
        learning_rate=torch.full((size, 1), workload.learning_rate[case.optimiser]),
        weight_decay=torch.full((size, 1), 0.03 if workload.real else 0.0),
    )


def _batches(workload: Workload, train_rows: np.ndarray, draw: np.random.Generator) -> Tensor:
    """Training rows [T, G, B] of each step: every epoch in an order of its own, what is left over is left out."""
    need = workload.steps * workload.batch
    orders = []
    for rows in train_rows:
        epochs = -(-need // (rows // workload.batch * workload.batch))
        whole = [draw.permutation(rows)[: rows // workload.batch * workload.batch] for _ in range(epochs)]
        orders.append(np.concatenate(whole)[:need].reshape(workload.steps, workload.batch))
    return torch.from_numpy(np.stack(orders, 1))


def _inputs(workload: Workload, size: int, draw: np.random.Generator) -> Callable[[np.ndarray], Tensor]:
    """A function from labels [G, N] to inputs [G, N, ...] of these classes."""
    shape, task = workload.shape, np.arange(size)[:, None]
    if shape.tokens:
        words, share = shape.vocabulary - 1, (shape.vocabulary - 1) // workload.classes

        def texts(labels: np.ndarray) -> Tensor:
            full = (*labels.shape, shape.tokens)
            of_class = labels[..., None] * share + draw.integers(0, share, full)
            return torch.from_numpy(1 + np.where(draw.random(full) < 0.3, of_class, draw.integers(0, words, full)))

        return texts
    if shape.image is not None:
        coarse = draw.normal(size=(size, workload.classes, 8, 8, 1))
        prototypes = coarse.repeat(4, 2).repeat(4, 3)[:, :, 2:-2, 2:-2]
    else:
        prototypes = draw.normal(size=(size, workload.classes, shape.numeric))

    def numbers(labels: np.ndarray) -> Tensor:
        found = prototypes[task, labels]
        return torch.from_numpy((found + 1.5 * draw.normal(size=found.shape)).astype(np.float32))

    return numbers
