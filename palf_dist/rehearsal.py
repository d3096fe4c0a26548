"""What a unit of work needs of memory, found by a rehearsal: the work itself, on two tasks and for a few steps, while
every storage is counted from its making to its end. The rest follows, as all that is kept grows by the task, by the
inner step and by the checkpoint. So it knows every architecture and estimator.

Where numbers would take long, the rehearsal is on "meta" tensors, which have sizes and hold none. What a library takes
inside an operation is not seen: a convolution's scratch memory, by processor, was 26 % on top of what is told once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from palf_dist.config import PolicyConfig, RunConfig
from palf_dist.evaluation.methods import baseline_policy, select_methods, tuned_together
from palf_dist.group_work import final_accuracy, measure, meta_gradient
from palf_dist.inner_loop import InnerLoop
from palf_dist.inner_models import build_model
from palf_dist.policies import LearnedPolicy, OnlineLearnLoss, Policy, StaticPolicy, make_policy, policy_spec
from palf_dist.policies.static import control_vector
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.family import evaluation_specs
from palf_dist.tasks.inputs import fits, group_shape, input_widths
from palf_dist.tasks.splits import META_VALIDATION_SHARE, TEST_SHARE, num_task_classes, train_capacity
from palf_dist.types import Rows, TaskGroup, TaskSpec

HEAP = 1.45
"""What the CPU's allocator takes for each byte that is kept from step to step: what is freed in between leaves holes
that it cannot fill (measured with glibc's). Autograd's graph keeps everything, and leaves none."""

TASKS = 2  # of a rehearsal: one task alone would hide copies that more of them need
CHEAP = 1e8  # multiplications in an inner step of one task, up to which numbers are quicker than none
STEPS = (2, 4)  # of a rehearsal, with a refresh at every second one

_META = torch.device("meta")
_TORCH: dict[type, torch.dtype] = {np.float32: torch.float32, np.int64: torch.int64}

Datasets = Mapping[str, EncodedDataset]


@dataclass(frozen=True)
class Work:
    """What a unit does, as far as it decides the memory it needs."""

    kind: str  # meta_gradient | train (tune, calibrate and select) | baseline (tune static losses) | evaluate
    architecture: int
    optimiser: str


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of a unit, beyond what is loaded."""

    data: float  # of each task of the group
    work: float  # of each task that is being worked at

    def total(self, tasks: int, parts: int = 1) -> float:
        """Of a group of ``tasks`` tasks that is done in ``parts`` parts."""
        return tasks * self.data + -(-tasks // parts) * self.work

    def parts(self, tasks: int, limit: float) -> int | None:
        """The fewest parts, doubling from one, with which it stays within ``limit`` bytes; None where none do."""
        parts = 1
        while self.total(tasks, parts) > limit:
            if parts >= tasks:
                return None
            parts = min(2 * parts, tasks)
        return parts


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: ``live`` now, ``peak`` at most. A number read off a meta tensor is 0
    or True, its copy to the CPU all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, Any] = {}  # by address, with the weak references that tell when they end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") not in (None, _META):
            result = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        else:
            result = func(*args, **kwargs)
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor):
                self._note(made)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to guard against compilation, torch would import its compiler, which takes seconds

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._storages:
            size = storage.nbytes()
            self._storages[address] = weakref.ref(storage, partial(self._ended, address, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _ended(self, address: int, size: int, _: object) -> None:
        del self._storages[address]
        self.live -= size


def works(config: RunConfig, datasets: Datasets) -> dict[Work, int]:
    """All the kinds of work of a run, and the tasks of the largest group of each."""
    tasks = config.tasks
    kinds = ["meta_gradient", "train"]
    if tuned_together(config.evaluation.methods):
        kinds.append("baseline")
    found: dict[Work, int] = {}
    for index, architecture in enumerate(tasks.architectures):
        if any(fits(architecture, datasets[source.name]) for source in config.data.train):
            for optimiser in tasks.optimisers:
                found |= {Work(kind, index, optimiser): tasks.group_size for kind in kinds}
    for specs in evaluation_specs(config, datasets):
        work = Work("evaluate", specs[0].architecture, specs[0].optimiser)
        found[work] = max(len(specs), found.get(work, 0))
    return found


def need(config: RunConfig, datasets: Datasets, work: Work) -> Need:
    """The memory that units of this kind need, for the widest and longest tasks there are."""
    sources = config.data.held_out if work.kind == "evaluate" else config.data.train
    architecture = config.tasks.architectures[work.architecture]
    used = [datasets[s.name] for s in sources if fits(architecture, datasets[s.name])]
    if work.kind == "meta_gradient":
        return _of_meta_gradient(config, used, work)
    body = _measure if work.kind == "evaluate" else _train
    peaks = [_rehearse(config, used, work, policy, body) for policy in _policies(config, work)]
    return Need(peaks[0].data, max(peak.work for peak in peaks))


def _of_meta_gradient(config: RunConfig, used: list[EncodedDataset], work: Work) -> Need:
    """From three rehearsals of the estimator: what it keeps grows by the inner step and by the checkpoint."""
    few, more = STEPS
    policy = _learned(config.policy)

    def peak(stop: int, every: int) -> Need:
        return _rehearse(config, used, work, policy, partial(_estimate, config, stop, every))

    shortest, longer, denser = peak(few, more), peak(more, more), peak(more, few)
    steps = min(config.inner.steps, config.estimator.window or config.inner.steps)
    by_step = max(0.0, longer.work - shortest.work) / (more - few)
    by_checkpoint = max(0.0, denser.work - longer.work)
    checkpoints = -(-steps // config.outer_loss.every)
    kept = (steps - few) * by_step + (checkpoints - 1) * by_checkpoint
    return Need(shortest.data, shortest.work + kept * (1.0 if config.estimator.kind == "unroll" else HEAP))


def _rehearse(
    config: RunConfig,
    used: list[EncodedDataset],
    work: Work,
    policy: Policy,
    body: Callable[[InnerLoop, Tensor], float],
) -> Need:
    """What ``body`` takes on two tasks without numbers, for each; it returns the bytes that it knows to come on top."""
    policy.refresh = STEPS[0]
    with Meter() as meter:
        group = _widest_group(config, used, work)
        data = meter.live
        # what is compiled keeps no more than what is not, and what it makes is not seen
        loop = InnerLoop(group, policy, config.inner.model_copy(update={"compile": False}))
        phi = torch.from_numpy(policy.initial()).to(group.theta0.device)
        more = body(loop, phi)
    return Need(data / TASKS, (meter.peak - data + more) / TASKS)


def _estimate(config: RunConfig, stop: int, every: int, loop: InnerLoop, phi: Tensor) -> float:
    """One stretch of the estimator. Pairs of perturbations come one after the other, but what pes carries of each."""
    outer = config.outer_loss.model_copy(update={"every": every})
    one = config.estimator.model_copy(update={"pairs": 1})
    shorter = config.model_copy(update={"outer_loss": outer, "estimator": one})
    carried = meta_gradient(shorter, loop, phi, 0, stop, ("rehearsal",), None).carried or {}
    of_one_pair = sum(array.nbytes for name, array in carried.items() if name.startswith("estimator/"))
    return HEAP * (config.estimator.pairs - 1) * of_one_pair


def _train(loop: InnerLoop, phi: Tensor) -> float:
    loop.steps = STEPS[0]
    final_accuracy(loop, phi, early_stopping=True)
    return 0.0


def _measure(loop: InnerLoop, phi: Tensor) -> float:
    loop.steps = STEPS[0]
    measure(loop, phi, early_stopping=True)
    return 0.0


def _learned(policy: PolicyConfig) -> LearnedPolicy:
    spec = policy_spec(policy)
    return make_policy(spec, [0.0] * len(spec.features), [1.0] * len(spec.features))


def _policies(config: RunConfig, work: Work) -> list[Policy]:
    """The policies that models are trained under; all static ones in one, with every basis loss that any of them
    has."""
    if work.kind == "train":
        return [_learned(config.policy)]
    methods = select_methods(config.evaluation.methods)
    basis = {name for method in methods for name in method.alpha}
    found: list[Policy] = [StaticPolicy(control_vector(dict.fromkeys(basis, 1 / len(basis)), {}))]
    if work.kind == "baseline":
        return found
    found += [baseline_policy(method) for method in methods if method.schedule is not None]
    if any(method.searched for method in methods):
        found.append(OnlineLearnLoss())  # reads the snapshots that the search is told
    learned = (method.policy_of(config.policy) for method in methods if method.uses_policy or method.control)
    return found + [_learned(policy) for policy in dict.fromkeys(learned)]


def _widest_group(config: RunConfig, used: list[EncodedDataset], work: Work) -> TaskGroup:
    """Tasks as wide and as long as any of these datasets makes them; of ones."""
    tasks, inner = config.tasks, config.inner
    architecture = tasks.architectures[work.architecture]
    shape = group_shape(architecture, used)
    classes = max(map(num_task_classes, used))
    model = build_model(architecture, shape, classes)
    low, high = tasks.train_size
    train = max(low, min(high, max(train_capacity(dataset, tasks) for dataset in used)))
    if work.kind == "evaluate" and config.evaluation.suite_conditions:
        names = {dataset.name: dataset for dataset in used}
        held_out = config.data.model_copy(
            update={"held_out": tuple(source for source in config.data.held_out if source.name in names)}
        )
        groups = evaluation_specs(config.model_copy(update={"data": held_out}), names)
        train = max(spec.train_size for specs in groups for spec in specs)
    validation = max(2, round(tasks.validation_share * train))
    if work.kind == "evaluate" and any(m.trains_on_validation for m in select_methods(config.evaluation.methods)):
        train += validation
    most = max(dataset.rows for dataset in used)

    products = model.num_parameters * inner.batch_size * prod(shape.image or (max(shape.tokens, 1),))
    device = "cpu" if products < CHEAP else "meta"

    def ones(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(*size, dtype=dtype, device=device)

    def split(rows: int) -> Rows:
        inputs = (ones(TASKS, rows, *w, dtype=_TORCH[kind]) for w, kind in input_widths(shape))
        return Rows(tuple(inputs), ones(TASKS, rows, dtype=torch.int64), ones(TASKS, rows))

    spec = TaskSpec(
        ("rehearsal",), used[0].name, train, "uniform", 0.0, 1.0, "train", work.architecture, work.optimiser
    )
    return TaskGroup(
        specs=(spec,) * TASKS,
        model=model,
        theta0=ones(TASKS, model.num_parameters),
        train=split(train),
        validation=split(validation),
        meta_validation=split(min(tasks.meta_validation_size, round(META_VALIDATION_SHARE * most))),
        test=split(min(tasks.test_size, round(TEST_SHARE * most))),
        clean_train_labels=ones(TASKS, train, dtype=torch.int64),
        batches=ones(inner.steps, TASKS, inner.batch_size, dtype=torch.int64),
        class_mask=ones(TASKS, classes, dtype=torch.bool),
        log_prior_ratio=ones(TASKS, classes),
        learning_rate=ones(TASKS, 1),
        weight_decay=ones(TASKS, 1),
    )
