"""What torch's cross-entropy is told besides logits and labels, for a mixture of any basis losses: class weights,
labels to ignore, smoothed and soft targets, dense predictions, and the reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from palf_dist.errors import ConfigError

PerClass = Sequence[float] | Tensor
"""One number for each class."""


@dataclass(frozen=True)
class LabelledRows:
    """The predictions of a batch that have a label, one row each: without those that are ignored."""

    z: Tensor  # [n, C] logits, float32 or float64
    labels: Tensor  # [n] int64; of a soft target its likeliest class
    targets: Tensor | None  # [n, C] distribution of the label times class weights; None: the label itself
    scale: Tensor | None  # [n] class weights, where they are not in ``targets``
    divisor: Tensor | None  # of the mean; None: n
    features: Tensor | None  # [n, D]
    index: Tensor | None  # [n] on the caller's device
    kept: Tensor | None  # [n] int64: which of all rows these are; None: all
    shape: torch.Size  # of the labels as they were given


class CrossEntropyArguments(nn.Module):
    """A module with the arguments of torch's cross-entropy: its attributes, which may be set later as there, mean what
    they mean to that."""

    weight: Tensor | None

    def __init__(self, weight: PerClass | None, ignore_index: int, reduction: str, label_smoothing: float) -> None:
        """
        Raises:
            ConfigError: one of them is out of range.
        """
        super().__init__()
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ConfigError(f"ignore_index: {ignore_index!r} is no whole number; give the label to leave out")
        _check_reduction(reduction)
        if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
            raise ConfigError(f"label_smoothing: {label_smoothing!r} is not between 0 and 1")
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.register_buffer("weight", None if weight is None else _class_weights(weight), persistent=False)

    def _plain(self, logits: Tensor, y: Tensor) -> Tensor:
        """torch's cross-entropy itself."""
        return functional.cross_entropy(
            logits,
            y.to(logits) if y.is_floating_point() else y.to(logits.device, torch.int64),
            None if self.weight is None else self.weight.to(logits),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _rows(self, logits: Tensor, y: Tensor, features: Tensor | None, index: Tensor | None) -> LabelledRows:
        """The rows that count. The device is that of the logits.

        Args:
            logits: [C], [n, C] or [n, C, d1, ...] floating point.
            y: labels of the same shape without C; or probabilities of the very same shape.
            features: [n, D] of [n, C] logits.
            index: of the labels' shape.

        Raises:
            ConfigError: the reduction is unknown, shapes do not fit, there is no row at all, or a label is out of range
                (not looked for on a GPU).
        """
        _check_reduction(self.reduction)
        shape = self._shape(logits, y, features, index)
        index = None if index is None else index.flatten()
        z = _by_class(logits if logits.dtype in (torch.float32, torch.float64) else logits.float())
        weight = None if self.weight is None else self.weight.to(z)
        if y.is_floating_point():
            targets = _by_class(y.to(z))
            smooth = self._smoothed(targets, weight)
            return LabelledRows(z, targets.argmax(1), smooth, None, None, features, index, None, shape)
        y, kept = y.flatten().to(torch.int64), None
        bounds = _label_bounds(y)
        if bounds is None or bounds[0] <= self.ignore_index <= bounds[1]:
            labelled = y != self.ignore_index
            if not labelled.all():  # a GPU is waited for here, if y is there: how many rows there are has to be known
                places = labelled.nonzero()[:, 0]
                kept = places.to(z.device)
                y, z = y[places], z[kept]
                features = None if features is None else features[kept]
                index = None if index is None else index[places.to(index.device)]
                bounds = _label_bounds(y)
        _check_labels(bounds, z.shape[1])
        y = y.to(z.device)
        scale = None if weight is None else weight[y]
        divisor = None if scale is None else scale.sum()
        if not self.label_smoothing:
            return LabelledRows(z, y, None, scale, divisor, features, index, kept, shape)
        smooth = self._smoothed(functional.one_hot(y, z.shape[1]).to(z), weight)
        return LabelledRows(z, y, smooth, None, divisor, features, index, kept, shape)

    def _reduced(self, values: Tensor, rows: LabelledRows) -> Tensor:
        """The loss of values [n], one of each row: of the labels' shape (0 where ignored), or their sum or mean."""
        if rows.scale is not None:
            values = values * rows.scale
        if self.reduction == "none":
            if rows.kept is not None:
                values = values.new_zeros(rows.shape.numel()).index_put((rows.kept,), values)
            return values.view(rows.shape)
        if self.reduction == "sum":
            return values.sum()
        return values.mean() if rows.divisor is None else values.sum() / rows.divisor

    def _smoothed(self, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Targets [n, C] after label smoothing, times the class weights."""
        smooth = (1 - self.label_smoothing) * targets + self.label_smoothing / targets.shape[1]
        return smooth if weight is None else smooth * weight

    def _shape(self, logits: Tensor, y: Tensor, features: Tensor | None, index: Tensor | None) -> torch.Size:
        """Of the labels; refuses what does not fit."""
        shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size()
        soft = y.is_floating_point()
        if not logits.dim() or y.shape != (logits.shape if soft else shape):
            raise ConfigError(
                f"logits {list(logits.shape)} and y {list(y.shape)} {y.dtype}: needs logits [n, C] or [n, C, d1, ...] "
                "and whole labels of that shape without C, or probabilities of that shape"
            )
        if soft and self.ignore_index >= 0:
            raise ConfigError(f"ignore_index: {self.ignore_index} is no label of probabilities; leave it out")
        if not shape.numel():
            raise ConfigError("y: the batch is empty; a loss needs at least one example")
        if index is not None and not isinstance(index, Tensor):
            raise ConfigError(f"index: {type(index).__name__} given; needs a tensor of whole row numbers {list(shape)}")
        if index is not None and (index.shape != shape or index.is_floating_point()):
            raise ConfigError(
                f"index: {list(index.shape)} {index.dtype} given; needs one whole row number per label, {list(shape)}"
            )
        if features is not None and (logits.dim() != 2 or len(features) != len(logits)):
            raise ConfigError(
                f"features: {list(features.shape)} given; needs [n, D] for logits [n, C], not {list(logits.shape)}"
            )
        classes = logits.shape[min(1, logits.dim() - 1)]
        if self.weight is not None and len(self.weight) != classes:
            raise ConfigError(f"weight: {len(self.weight)} classes given, but logits have {classes}")
        return shape


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """What keeps autocast out; nothing, which costs less, where it is off."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def _check_reduction(name: str) -> None:
    if name not in ("none", "mean", "sum"):
        raise ConfigError(f"reduction: {name!r} is unknown; give 'none', 'mean' or 'sum'")


def _label_bounds(y: Tensor) -> tuple[int, int] | None:
    """The least and the greatest of labels [n]; None of no label, and on a GPU: that would make every step wait for it,
    and its kernels check the range."""
    if not len(y) or y.device.type != "cpu":
        return None
    low, high = y.aminmax()
    return int(low), int(high)


def _check_labels(bounds: tuple[int, int] | None, classes: int) -> None:
    """Refuse, with a ConfigError, labels within such ``_label_bounds`` that are out of 0 .. classes - 1."""
    if bounds is not None and not 0 <= bounds[0] <= bounds[1] < classes:
        raise ConfigError(
            f"y: labels {bounds[0]} to {bounds[1]} given, but logits have {classes} classes; needs labels from 0 to "
            "classes - 1"
        )


def _by_class(a: Tensor) -> Tensor:
    """[C], [n, C] or [n, C, d1, ...] as [rows, C]."""
    return a if a.dim() == 2 else a[None] if a.dim() == 1 else a.movedim(1, -1).flatten(0, -2)


def _class_weights(values: PerClass) -> Tensor:
    problem = f"weight: {values!r} given; needs one finite number >= 0 for each class"
    try:
        weight = torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(problem) from error
    weight = weight.detach().clone() if weight.is_floating_point() else weight.float()
    if weight.dim() != 1 or not (weight.isfinite() & (weight >= 0)).all():
        raise ConfigError(problem)
    return weight
