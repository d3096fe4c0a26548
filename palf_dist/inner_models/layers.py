"""Layers batched over G tasks: each has its forward pass, its two derivative passes and their directional derivatives
in one place, derived by hand. Architectures are compositions of these layers and hold no mathematics of their own.

Notation of the derivations: y = f(p, x); a bar is a cotangent (``dy``), a dot is the derivative along the direction in
which the parameters p move (``v``) and, through them, everything computed from p (``x_dot``, ``dy_dot``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Params = Sequence[Tensor]
"""Parameters of one layer, each [G, *shape]; views of theta, of the direction v, or gradients of the same shapes."""

NARROW = 16
"""Below this many outputs a batched product is two to three times faster when computed transposed (measured, CPU)."""


class Layer(Protocol):
    """One differentiable step, G tasks at a time; x and y are [G, B, ...]. Tapes are whatever a layer must remember.

    ``x_dot`` is None where the input is data, which does not move; ``dx`` is None where nobody needs it.
    """

    shapes: tuple[tuple[int, ...], ...] = ()

    def init(self, generator: np.random.Generator) -> list[np.ndarray]:
        """Initial parameters of one task."""
        return []

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        """y and the tape; no in-place operation, so that autograd can go through it. ``mask`` [G, B, L] is True on
        real positions of a sequence, None where every position is real."""
        ...

    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of <dy, y> with respect to x and to each parameter."""
        ...

    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        """Directional derivative of y and the tangent tape."""
        ...

    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """dx of ``backward``, its directional derivative, and that of each parameter's gradient."""
        ...


class Sequential(Layer):
    """Layers one after the other. The layers before the first one with parameters only see data: no derivatives."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self.shapes = tuple(shape for layer in layers for shape in layer.shapes)
        bounds = accumulate((len(layer.shapes) for layer in layers), initial=0)
        self._slices = [slice(start, stop) for start, stop in pairwise(bounds)]

    def init(self, generator: np.random.Generator) -> list[np.ndarray]:
        # A stream for each layer: the size of one layer does not change the draws of the next.
        streams = generator.spawn(len(self.layers))
        return [array for layer, stream in zip(self.layers, streams, strict=True) for array in layer.init(stream)]

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        tapes = []
        for layer, own in zip(self.layers, self._slices, strict=True):
            x, tape = layer.forward(params[own], x, mask)
            tapes.append(tape)
        return x, tapes

    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        dx: Tensor | None = dy
        grads: list[Tensor] = []
        for layer, own, remembered in zip(self.layers[::-1], self._slices[::-1], tape[::-1], strict=True):
            if dx is None:
                break
            dx, own_grads = layer.backward(params[own], remembered, dx)
            grads = own_grads + grads
        return dx, grads

    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        tangent_tapes = []
        for layer, own, remembered in zip(self.layers, self._slices, tape, strict=True):
            tangent_tape = None
            if x_dot is not None or layer.shapes:
                x_dot, tangent_tape = layer.tangent(params[own], remembered, v[own], x_dot)
            tangent_tapes.append(tangent_tape)
        assert x_dot is not None, "a chain of layers without parameters was given data"
        return x_dot, tangent_tapes

    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        dx: Tensor | None = dy
        dx_dot: Tensor | None = dy_dot
        grads: list[Tensor] = []
        for index in reversed(range(len(self.layers))):
            if dx is None or dx_dot is None:
                break
            own = self._slices[index]
            dx, dx_dot, own_grads = self.layers[index].backward_tangent(
                params[own], tape[index], tangent_tape[index], v[own], dx, dx_dot
            )
            grads = own_grads + grads
        return dx, dx_dot, grads


class Residual(Layer):
    """y = s(x) + f(x), with f = ``inner`` and s = ``shortcut``; no layers are the identity. x is learned, not data."""

    def __init__(self, inner: Sequence[Layer], shortcut: Sequence[Layer] = ()) -> None:
        self.inner, self.shortcut = Sequential(inner), Sequential(shortcut)
        self.shapes = self.inner.shapes + self.shortcut.shapes
        self._own = slice(len(self.inner.shapes)), slice(len(self.inner.shapes), None)

    def init(self, generator: np.random.Generator) -> list[np.ndarray]:
        return self.inner.init(generator) + self.shortcut.init(generator)

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        inner, shortcut = self._own
        y, inner_tape = self.inner.forward(params[inner], x, mask)
        passed, shortcut_tape = self.shortcut.forward(params[shortcut], x, mask)
        return passed + y, (inner_tape, shortcut_tape)

    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        inner, shortcut = self._own
        dx, grads = self.inner.backward(params[inner], tape[0], dy)
        passed, shortcut_grads = self.shortcut.backward(params[shortcut], tape[1], dy)
        assert dx is not None and passed is not None
        return passed + dx, grads + shortcut_grads

    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        inner, shortcut = self._own
        y_dot, inner_tape = self.inner.tangent(params[inner], tape[0], v[inner], x_dot)
        passed, shortcut_tape = self.shortcut.tangent(params[shortcut], tape[1], v[shortcut], x_dot)
        return passed + y_dot, (inner_tape, shortcut_tape)

    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        (inner, shortcut), (inner_tangent, shortcut_tangent) = self._own, tangent_tape
        dx, dx_dot, grads = self.inner.backward_tangent(params[inner], tape[0], inner_tangent, v[inner], dy, dy_dot)
        passed, passed_dot, shortcut_grads = self.shortcut.backward_tangent(
            params[shortcut], tape[1], shortcut_tangent, v[shortcut], dy, dy_dot
        )
        assert dx is not None and dx_dot is not None and passed is not None and passed_dot is not None
        return passed + dx, passed_dot + dx_dot, grads + shortcut_grads


class Linear(Layer):
    """y = x W' + b on the last axis; W [outputs, inputs] drawn from N(0, gain / inputs), b = 0. ``bias`` False: no b.

    ``data_blocks``: widths of the blocks of data columns that a first layer reads. Each block is drawn column by
    column from a stream of its own, other layers row by row: columns or classes that pad a task at the end of a block
    change no draw of the real ones (the scale is that of the padded width). ``learned``: how many leading columns of
    the input depend on parameters; the rest is data, whose derivatives are neither given nor taken. None: all of them.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        gain: float = 1.0,
        data_blocks: tuple[int, ...] = (),
        learned: int | None = None,
        bias: bool = True,
    ) -> None:
        assert not data_blocks or sum(data_blocks) == inputs, (data_blocks, inputs)
        self.shapes = ((outputs, inputs), (outputs,)) if bias else ((outputs, inputs),)
        self.bias = bias
        self.scale = math.sqrt(gain / inputs)
        self.data_blocks = data_blocks
        self.learned = inputs if learned is None else learned

    def init(self, generator: np.random.Generator) -> list[np.ndarray]:
        outputs, inputs = self.shapes[0]
        if self.data_blocks:
            streams = generator.spawn(len(self.data_blocks))
            blocks = [s.standard_normal((width, outputs)) for s, width in zip(streams, self.data_blocks, strict=True)]
            weight = np.concatenate(blocks).T
        else:
            weight = generator.standard_normal((outputs, inputs))
        return [self.scale * weight, *map(np.zeros, self.shapes[1:])]

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        rows = as_rows(x)
        y = as_shape(x.shape, _plus_product(self._bias(params), rows, params[0]))
        return y, (rows, x.shape)

    # x_bar = y_bar W,  W_bar = y_bar' x,  b_bar = sum of y_bar
    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        x, shape = tape
        rows = as_rows(dy)
        grads = [torch.bmm(rows.transpose(1, 2), x), *self._bias_gradient(rows)]
        return (as_shape(shape, torch.bmm(rows, self._learned(params[0]))) if self.learned else None), grads

    # y. = x V' + c + x. W'
    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        x, shape = tape
        y_dot = _plus_product(self._bias(v), x, v[0])
        rows = None
        if x_dot is not None:
            rows = as_rows(x_dot)
            y_dot = _plus_product(y_dot, rows, self._learned(params[0]))
        return as_shape(shape, y_dot), rows

    # (x_bar). = y_bar. W + y_bar V,  (W_bar). = y_bar.' x + y_bar' x.,  (b_bar). = sum of y_bar.
    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        x, shape = tape
        rows, rows_dot = as_rows(dy), as_rows(dy_dot)
        weight_dot = torch.bmm(rows_dot.transpose(1, 2), x)
        if tangent_tape is not None:
            self._learned(weight_dot).add_(torch.bmm(rows.transpose(1, 2), tangent_tape))
        grads = [weight_dot, *self._bias_gradient(rows_dot)]
        if not self.learned:
            return None, None, grads
        weight = self._learned(params[0])
        dx_dot = torch.bmm(rows_dot, weight).baddbmm_(rows, self._learned(v[0]))
        return as_shape(shape, torch.bmm(rows, weight)), as_shape(shape, dx_dot), grads

    def _bias(self, params: Params) -> Tensor | None:
        return params[1][:, None] if self.bias else None

    def _bias_gradient(self, dy: Tensor) -> list[Tensor]:
        return [dy.sum(1)] if self.bias else []

    def _learned(self, weight: Tensor) -> Tensor:
        """The columns of weight [G, outputs, inputs] that meet learned inputs."""
        return weight[..., : self.learned]


def as_rows(x: Tensor) -> Tensor:
    """[G, ..., width] as [G, n, width]."""
    return x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def as_shape(shape: torch.Size, rows: Tensor) -> Tensor:
    """[G, n, width] as [*shape[:-1], width]."""
    return rows if len(shape) == 3 else rows.contiguous().view(*shape[:-1], rows.shape[-1])


def _plus_product(base: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """base + x weight'; base [G, 1 or n, outputs], x [G, n, inputs], weight [G, outputs, inputs]. A narrow result has
    all values of one output side by side in memory, as the loss head's softmax wants those of few classes."""
    narrow = weight.shape[1] < NARROW
    left, right = (weight, x.transpose(1, 2)) if narrow else (x, weight.transpose(1, 2))
    if narrow and base is not None:
        base = base.transpose(1, 2)
    y = torch.bmm(left, right) if base is None else torch.baddbmm(base, left, right)
    return y.transpose(1, 2) if narrow else y


class LinearMap(Layer, Protocol):
    """Base of layers without parameters whose derivative is a map J fixed by the tape, so that both passes and both
    of their directional derivatives are J or its transpose: y. = J x.,  x_bar = J' y_bar,  (x_bar). = J' y_bar."""

    def push(self, tape: Any, x_dot: Tensor) -> Tensor:
        """J x_dot."""
        ...

    def pull(self, tape: Any, dy: Tensor) -> Tensor:
        """J' dy."""
        ...

    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        return self.pull(tape, dy), []

    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        assert x_dot is not None
        return self.push(tape, x_dot), None

    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        return self.pull(tape, dy), self.pull(tape, dy_dot), []


class ReLU(LinearMap):
    """y = max(x, 0); J = [y > 0]. The second derivative is zero, as autograd has it."""

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        y = torch.relu(x)
        return y, y

    def push(self, tape: Any, x_dot: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(x_dot, tape, 0)  # x_dot where y > 0, in one pass over memory

    def pull(self, tape: Any, dy: Tensor) -> Tensor:
        return self.push(tape, dy)
