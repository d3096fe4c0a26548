"""An inner model made of a stem, layers and a linear head, with one flat theta [G, P] of which they take views."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from palf_dist.inner_models.layers import Layer, Linear, Params, Sequential
from palf_dist.inner_models.stems import Stem
from palf_dist.types import Inputs

PartParams = tuple[Params, Params, Params]
"""Views of a flat [G, P] tensor: those of the stem, the body and the head."""


class Tape(NamedTuple):
    """What forward (or tangent) leaves behind: its views of theta (or v), and the tapes of the three parts."""

    params: PartParams
    stem: Any
    body: Any
    head: Any


class LayeredModel:
    """types.InnerModel of G tasks at a time: stem -> body -> features [G, B, D] -> head -> logits [G, B, C].

    theta holds stem, body and head in this order, each parameter row-major. The dtype of theta is that of every
    result. Tapes hold views of theta and v: do not change those in place before their tape has been used up.
    """

    def __init__(self, stem: Stem, body: Sequence[Layer], head: Linear) -> None:
        self.stem, self.body, self.head = stem, Sequential(body), head
        self.feature_size = head.shapes[0][1]
        self._parts: tuple[Stem | Layer, ...] = (self.stem, self.body, self.head)
        self._counts = [len(part.shapes) for part in self._parts]
        self._shapes = [shape for part in self._parts for shape in part.shapes]
        self._sizes = [prod(shape) for shape in self._shapes]
        self.num_parameters = sum(self._sizes)

    def init(self, generators: list[np.random.Generator]) -> Tensor:
        """Initial parameters [G, P] float32, task g drawn from streams spawned from generators[g] only."""
        tasks = []
        for generator in generators:
            streams = generator.spawn(len(self._parts))
            arrays = [a for part, stream in zip(self._parts, streams, strict=True) for a in part.init(stream)]
            tasks.append(np.concatenate([array.ravel() for array in arrays]))
        return torch.from_numpy(np.stack(tasks).astype(np.float32))

    def parameters(self, theta: Tensor) -> list[Tensor]:
        """Views [G, *shape] of theta [G, P], in order."""
        pieces = theta.split(self._sizes, 1)
        return [p if len(s) == 1 else p.view(-1, *s) for p, s in zip(pieces, self._shapes, strict=True)]

    def _split(self, theta: Tensor) -> PartParams:
        views = self.parameters(theta)
        stem, body, _ = self._counts
        return views[:stem], views[stem : stem + body], views[stem + body :]

    def apply(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Logits [G, B, C] and features [G, B, D]; autograd may go through it twice."""
        logits, features, _ = self._forward(theta, inputs)
        return logits, features

    @torch.no_grad()
    def forward(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tape]:
        """Logits [G, B, C], features [G, B, D] and the tape."""
        return self._forward(theta, inputs)

    def _forward(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tape]:
        stem, body, head = params = self._split(theta)
        columns = tuple(column.to(theta.dtype) if column.is_floating_point() else column for column in inputs)
        x, mask, stem_tape = self.stem.forward(stem, columns)
        features, body_tape = self.body.forward(body, x, mask)
        logits, head_tape = self.head.forward(head, features, None)
        return logits, features, Tape(params, stem_tape, body_tape, head_tape)

    @torch.no_grad()
    def backward(self, theta: Tensor, tape: Tape, dlogits: Tensor, dfeatures: Tensor | None) -> Tensor:
        """Gradient [G, P] of <dlogits, logits> + <dfeatures, features>."""
        _, body, head = tape.params
        dx, head_grads = self.head.backward(head, tape.head, dlogits)
        dx, body_grads = self.body.backward(body, tape.body, _plus(dx, dfeatures))
        return _flat(self.stem.backward(tape.stem, dx) + body_grads + head_grads)

    @torch.no_grad()
    def tangent(self, theta: Tensor, tape: Tape, v: Tensor) -> tuple[Tensor, Tensor, Tape]:
        """Directional derivatives of logits and features along v [G, P], and the tangent tape."""
        _, body, head = tape.params
        stem_v, body_v, head_v = directions = self._split(v)
        x_dot = self.stem.tangent(tape.stem, stem_v)
        features_dot, body_tape = self.body.tangent(body, tape.body, body_v, x_dot)
        logits_dot, head_tape = self.head.tangent(head, tape.head, head_v, features_dot)
        return logits_dot, features_dot, Tape(directions, None, body_tape, head_tape)

    @torch.no_grad()
    def backward_tangent(
        self,
        theta: Tensor,
        tape: Tape,
        tangent_tape: Tape,
        v: Tensor,
        dlogits: Tensor,
        dfeatures: Tensor | None,
        dlogits_tangent: Tensor,
        dfeatures_tangent: Tensor | None,
    ) -> Tensor:
        """Directional derivative [G, P] of ``backward`` as theta moves along v and the cotangents along theirs."""
        _, body, head = tape.params
        _, body_v, head_v = tangent_tape.params
        dx, dx_dot, head_grads = self.head.backward_tangent(
            head, tape.head, tangent_tape.head, head_v, dlogits, dlogits_tangent
        )
        dx, dx_dot = _plus(dx, dfeatures), _plus(dx_dot, dfeatures_tangent)
        _, dx_dot, body_grads = self.body.backward_tangent(body, tape.body, tangent_tape.body, body_v, dx, dx_dot)
        return _flat(self.stem.backward(tape.stem, dx_dot) + body_grads + head_grads)


def _plus(dx: Tensor | None, dfeatures: Tensor | None) -> Tensor:
    assert dx is not None, "the head reads features, never data"
    return dx if dfeatures is None else dx + dfeatures


def _flat(grads: list[Tensor]) -> Tensor:
    # Each product is written contiguously and copied once: writing it into a strided view of the flat gradient makes
    # the batched product fall back to one call per task.
    return torch.cat([grad.flatten(1) for grad in grads], 1)
