"""A network under a fixed mixture of the basis losses: the inner loop of palf_dist, with one task.

The loss is linear in its weights: l = ce + sum_k w_k l_k + w_decay |theta|^2 / 2. The inner loop minimises l divided by
the sum of its mixture weights, so that alpha is in the simplex; weight decay, which is decoupled, is divided by it too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import InnerConfig
from palf_dist.inner_loop import InnerLoop, InnerState
from palf_dist.inner_models import build_model
from palf_dist.loss_head import Evaluation
from palf_dist.losses import LossContext
from palf_dist.policies import StaticPolicy
from palf_dist.policies.static import control_vector
from palf_dist.randomness import random_generator
from palf_dist.search.targets.config import REFERENCE, LossWeightsConfig, SoftmaxConfig
from palf_dist.search.targets.rows import SplitRows
from palf_dist.search.targets.snapshot import Snapshot
from palf_dist.tasks.family import epochs
from palf_dist.tasks.inputs import group_shape
from palf_dist.types import Rows, TaskGroup, TaskSpec

WEIGHT_DECAY = "weight_decay"


class NetworkTrainer:
    """Trains the configured network with given weights; the same weights give the same bits.

    e is the mean of 1 - p_y over the validation rows: unlike the cross-entropy, it does not rise with confidence alone.
    phi is the mean over the training rows of each basis loss (info_nce in batches of the training's size), at the
    default hyper-parameters and without the posterior weights of robust_ce, which are no function of the model alone;
    and for weight decay |theta|^2 / 2.
    """

    def __init__(self, config: LossWeightsConfig, data: SplitRows) -> None:
        assert not isinstance(config.model, SoftmaxConfig)
        self._training = training = config.training
        self.names = tuple(config.ranges)
        self._basis = (REFERENCE, *(name for name in self.names if name != WEIGHT_DECAY))
        count = min(config.snapshots, training.steps)
        self.steps = [round(training.steps * index / count) for index in range(1, count + 1)]
        shape = group_shape(config.model, [data.dataset])
        model = build_model(config.model, shape, data.classes)
        rows = {}
        for split, inputs in data.inputs(config.model).items():
            labels = torch.from_numpy(data.labels[split])[None]
            columns = tuple(torch.from_numpy(column)[None] for column in inputs)
            rows[split] = Rows(columns, labels, torch.ones_like(labels, dtype=torch.float32))
        keys = ("loss_weights", config.seed)
        size = len(data.labels["train"])
        noise = config.label_noise
        spec = TaskSpec(keys, data.dataset.name, size, noise.kind, noise.rate, 1.0, "train", 0, training.optimiser)
        order = epochs(size, training.steps, training.batch_size, random_generator(*keys, "batches"))
        self._rows = rows
        self.group = TaskGroup(
            specs=(spec,),
            model=model,
            theta0=model.init([random_generator(*keys, "init")]),
            train=rows["train"],
            validation=rows["validation"],
            meta_validation=rows["validation"],
            test=rows["test"],
            clean_train_labels=rows["train"].labels,
            batches=torch.from_numpy(order)[:, None],
            class_mask=torch.ones(1, data.classes, dtype=torch.bool),
            log_prior_ratio=torch.zeros(1, data.classes),
            learning_rate=torch.full((1, 1), training.learning_rate),
            weight_decay=torch.ones(1, 1),  # times the control wd
        )
        self._context = LossContext.create(self.group.class_mask, self.group.log_prior_ratio)

    def controls(self, weights: np.ndarray) -> Tensor:
        """Controls [U] that make the inner loop minimise l for weights [k]."""
        named = dict(zip(self.names, weights.tolist(), strict=True))
        decay = named.pop(WEIGHT_DECAY, None)
        total = 1.0 + sum(named.values())
        alpha = {REFERENCE: 1.0 / total} | {name: weight / total for name, weight in named.items()}
        return control_vector(alpha, {"wd": self._training.weight_decay if decay is None else decay / total})

    def train(self, weights: np.ndarray, start: dict[str, np.ndarray] | None = None) -> Iterator[Snapshot]:
        """Snapshots of a training with weights [k]: from the beginning, or from the model of an earlier snapshot, that
        one being given again first."""
        training = self._training
        inner = InnerConfig(
            steps=training.steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            ema=training.ema,
        )
        loop = InnerLoop(self.group, StaticPolicy(self.controls(weights)), inner)
        state = loop.start() if start is None else InnerState.from_arrays(start, torch.device("cpu"))
        for number, step in enumerate(self.steps, 1):
            if step >= state.step:
                loop.run(state, torch.zeros(0), step)
                yield self._snapshot(number, state)

    def misclassified(self, model: dict[str, np.ndarray], split: str) -> float:
        """Share of the rows of a split that the model of a snapshot gets wrong."""
        return self._misclassified(torch.from_numpy(model["theta"]), split)

    def features(self, theta: Tensor) -> np.ndarray:
        """phi [K] at theta [1, P]."""
        rows, size = self._rows["train"], self._training.batch_size
        logits, hidden, _ = self.group.model.forward(theta, rows.inputs)
        controls = control_vector({})[None]
        sums = dict.fromkeys(self._basis, 0.0)
        for first in range(0, rows.labels.shape[1], size):
            part = slice(first, first + size)
            at = Evaluation(
                self._basis, logits[:, part], rows.labels[:, part], hidden[:, part], controls, self._context
            )
            for name, value in at.values():
                sums[name] += float(value.double().sum())
        values = {name: total / rows.labels.shape[1] for name, total in sums.items()}
        values[WEIGHT_DECAY] = 0.5 * float(theta.double().square().sum())
        return np.array([values[name] for name in (REFERENCE, *self.names)])

    def error(self, theta: Tensor) -> float:
        """e at theta [1, P]."""
        rows = self._rows["validation"]
        p = torch.softmax(self.group.model.forward(theta, rows.inputs)[0].double(), -1)
        return float(1 - p.gather(2, rows.labels[:, :, None]).mean())

    def _snapshot(self, number: int, state: InnerState) -> Snapshot:
        with torch.no_grad():
            return Snapshot(
                number,
                last=number == len(self.steps),
                features=self.features(state.theta),
                error=self.error(state.theta),
                model=state.to_arrays(),
                misclassified=self._misclassified(state.theta, "validation"),
                cost=float(state.step),
            )

    def _misclassified(self, theta: Tensor, split: str) -> float:
        rows = self._rows[split]
        with torch.no_grad():
            logits = self.group.model.forward(theta, rows.inputs)[0]
        return float((logits.argmax(-1) != rows.labels).double().mean())
