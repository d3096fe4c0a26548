"""Small synthetic task groups for the proofs: padded classes, padded rows, a shifted prior, noisy labels."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from palf_dist.architecture_config import (
    Architecture,
    ConvConfig,
    MLPConfig,
    ModuleConfig,
    ResNetConfig,
    TransformerConfig,
)
from palf_dist.inner_loop import move_group
from palf_dist.inner_models import build_model
from palf_dist.inner_models.shapes import InputShape
from palf_dist.randomness import random_generator
from palf_dist.types import Inputs, Rows, TaskGroup, TaskSpec


class Network(nn.Module):
    """A user's own module, which goes through torch.func."""

    def __init__(self, shape: InputShape, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(shape.numeric, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(self.first(x))
        return self.last(features), features


class Regression(nn.Module):
    """Softmax regression: its cross-entropy is convex."""

    def __init__(self, shape: InputShape, classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(shape.numeric, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(x), x


ARCHITECTURES: dict[str, tuple[Architecture, InputShape]] = {
    "mlp": (MLPConfig(hidden=(6,)), InputShape(numeric=5)),
    "mlp_deep_categorical": (MLPConfig(hidden=(6, 4), embedding=2), InputShape(numeric=3, categorical=2, categories=7)),
    "conv": (ConvConfig(channels=(4, 4), image_size=6, groups=2), InputShape(image=(6, 6, 1))),
    "resnet": (ResNetConfig(widths=(4, 8), image_size=5, groups=2), InputShape(image=(5, 5, 2))),
    "transformer": (
        TransformerConfig(width=8, heads=2, feedforward=8, layers=1, vocabulary=12, length=5),
        InputShape(tokens=5, vocabulary=12),
    ),
    "module": (ModuleConfig(factory="tests.groups:Network"), InputShape(numeric=5)),
    "linear": (ModuleConfig(factory="tests.groups:Regression"), InputShape(numeric=5)),
}


def random_inputs(shape: InputShape, size: int, rows: int, *keys: int | str) -> Inputs:
    draw = random_generator("inputs", *keys)
    if shape.image is not None:
        return (torch.from_numpy(draw.normal(size=(size, rows, *shape.image))),)
    if shape.tokens:
        return (torch.from_numpy(draw.integers(0, shape.vocabulary, (size, rows, shape.tokens))),)
    numeric = torch.from_numpy(draw.normal(size=(size, rows, shape.numeric)))
    codes = draw.integers(0, max(shape.categories, 1), (size, rows, shape.categorical))
    return numeric, torch.from_numpy(codes)


def make_group(
    name: str = "mlp",
    optimiser: str = "adam",
    *,
    size: int = 3,
    steps: int = 7,
    classes: int = 4,
    rows: int = 14,
    batch: int = 6,
    dtype: torch.dtype = torch.float64,
    learning_rate: float = 0.05,
) -> TaskGroup:
    """A group whose first task has one class less than the others (padding) and whose second has a shifted prior."""
    architecture, shape = ARCHITECTURES[name]
    model = build_model(architecture, shape, classes)
    draw = random_generator("group", name, optimiser, size, steps)
    k = torch.full((size,), classes)
    k[0] = classes - 1
    class_mask = torch.arange(classes)[None] < k[:, None]

    def split(which: str, count: int) -> Rows:
        labels = torch.from_numpy(draw.integers(0, 1_000_000, (size, count))) % k[:, None]
        mask = torch.ones(size, count)
        mask[-1, count - 2 :] = 0
        return Rows(random_inputs(shape, size, count, which), labels, mask)

    train = split("train", rows)
    ratio = torch.zeros(size, classes)
    ratio[1] = torch.linspace(-0.7, 0.7, classes)
    spec = TaskSpec((0,), "synthetic", rows, "uniform", 0.2, 1.0, "train", 0, optimiser)
    group = TaskGroup(
        specs=(spec,) * size,
        model=model,
        theta0=model.init([random_generator("theta", task) for task in range(size)]),
        train=train,
        validation=split("validation", 5),
        meta_validation=split("meta", 9),
        test=split("test", 8),
        clean_train_labels=train.labels,
        batches=torch.from_numpy(draw.permuted(draw.integers(0, rows - 2, (steps, size, batch)), axis=-1)),
        class_mask=class_mask,
        log_prior_ratio=ratio,
        learning_rate=torch.full((size, 1), learning_rate),
        weight_decay=torch.full((size, 1), 0.03),
    )
    return move_group(group, dtype=dtype)


def alone(group: TaskGroup, task: int) -> TaskGroup:
    """One task of a group, without the rows that only pad it."""

    def cut(rows: Rows) -> Rows:
        count = int(rows.mask[task].sum())
        part = [column[task : task + 1, :count] for column in (*rows.inputs, rows.labels, rows.mask)]
        return Rows(tuple(part[:-2]), *part[-2:])

    changed: dict = {"specs": group.specs[:1], "batches": group.batches[:, task : task + 1]}
    for item in fields(group):
        value = getattr(group, item.name)
        if isinstance(value, Rows):
            changed[item.name] = cut(value)
        elif isinstance(value, Tensor) and item.name != "batches":
            changed[item.name] = value[task : task + 1]
    return replace(group, **changed)
