"""What a user shows the drop-in loss besides its batches: the training rows, and the model's logits of the validation
rows. Both are read for the training state alone; no gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.training_state import NEIGHBOUR_FEATURES, VALIDATION_FEATURES, Observation, neighbour_agreement
from palf_dist.types import Rows

LabelledTensor = tuple[Tensor, Tensor]
"""Inputs or logits [N, ...] and labels [N]."""


class ShownRows:
    """What of these rows a policy with these ``features`` reads; ``missing`` says what is not there, a sentence each.
    Raises ConfigError for what is no function, and for training rows that do not fit together."""

    def __init__(
        self,
        features: Sequence[str],
        validation: Callable[[], LabelledTensor] | None,
        training_rows: LabelledTensor | None,
    ) -> None:
        if validation is not None and not callable(validation):
            raise ConfigError(
                f"validation: {type(validation).__name__} given; needs a function of no arguments that returns the "
                "model's logits [V, C] of the validation rows as they are now, and labels [V]"
            )
        reads = {
            name: [feature for feature in features if feature in known]
            for name, known in (("validation", VALIDATION_FEATURES), ("training_rows", NEIGHBOUR_FEATURES))
        }
        given = {"validation": validation, "training_rows": training_rows}
        self.missing = [
            f"no {name}: the policy reads {', '.join(read)}, held at the usual value; pass {name}="
            for name, read in reads.items()
            if read and given[name] is None
        ]
        self._validation = validation if reads["validation"] else None
        self._agreement = _agreement(training_rows) if training_rows is not None and reads["training_rows"] else None

    def agreement(self, like: Tensor) -> Tensor | None:
        """The feature ``neighbour_agreement`` [1], where ``like`` is and of its type."""
        return None if self._agreement is None else self._agreement.to(like)

    def added(self, observation: Observation, like: Tensor) -> Observation:
        """``observation`` with the validation rows as they are now; ``like`` [n, C] are the batch's logits. Raises
        ConfigError for rows that do not fit them."""
        if self._validation is None:
            return observation
        logits, labels, mask = validation_columns(self._validation, like)
        return replace(observation, validation_logits=logits, validation_labels=labels, validation_mask=mask)


def _agreement(training_rows: LabelledTensor) -> Tensor:
    """The feature of training inputs [N, ...] and labels [N]; these must fit together, and the inputs be numbers."""
    inputs, labels = _fitting("training_rows", training_rows)
    if not inputs.is_floating_point():
        raise ConfigError(
            f"training_rows: inputs are {inputs.dtype}; give the numbers that the model reads, as floating point, or "
            "leave it out"
        )
    found = neighbour_agreement(Rows((inputs.detach()[None],), labels[None], torch.ones_like(labels)[None].to(inputs)))
    assert found is not None
    return found


def validation_columns(validation: Callable[[], LabelledTensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [1, V, C], labels [1, V] and mask [1, V] as ``validation`` gives them now."""
    logits, labels = _fitting("validation", validation())
    classes = like.shape[1]
    if logits.dim() != 2 or logits.shape[1] != classes:
        raise ConfigError(
            f"validation: returned logits of shape {tuple(logits.shape)}, but those of the batch have {classes} "
            f"classes; return logits [V, {classes}] and labels [V]"
        )
    labels = labels.to(like.device, torch.int64)
    if ((labels < 0) | (labels >= classes)).any():
        raise ConfigError(f"validation: a label is outside of 0 to {classes - 1}; leave such rows out")
    mask = torch.ones_like(labels, dtype=like.dtype)
    return logits.detach().to(like)[None], labels[None], mask[None]


def _fitting(name: str, rows: LabelledTensor) -> LabelledTensor:
    if not (isinstance(rows, tuple) and len(rows) == 2 and all(isinstance(part, Tensor) for part in rows)):
        raise ConfigError(f"{name}: needs a pair of tensors, of which the second holds the labels")
    values, labels = rows
    if labels.dim() != 1 or values.dim() < 2 or len(values) != len(labels) or len(labels) < 2:
        raise ConfigError(
            f"{name}: shapes {tuple(values.shape)} and {tuple(labels.shape)} do not fit; needs [N, ...] and labels [N] "
            "of two rows or more"
        )
    if labels.is_floating_point():
        raise ConfigError(f"{name}: labels are {labels.dtype}; needs whole numbers")
    return values, labels
