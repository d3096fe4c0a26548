"""Stems: how an inner model reads its inputs. A stem is linear in its parameters, so that three methods are enough:
its tangent is its forward pass with the direction v for parameters, and its gradient does not depend on them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from palf_dist.inner_models.layers import Params
from palf_dist.types import Inputs


class Stem(Protocol):
    """Inputs [G, B, ...] to the first x of the layers, and the mask [G, B, L] of real positions for sequences."""

    shapes: tuple[tuple[int, ...], ...] = ()

    def init(self, generator: np.random.Generator) -> list[np.ndarray]:
        """Initial parameters of one task."""
        return []

    def forward(self, params: Params, inputs: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        """x, mask, tape."""
        ...

    def tangent(self, tape: Any, v: Params) -> Tensor | None:
        """Directional derivative of the leading columns of x that are not data; None where all are."""
        ...

    def backward(self, tape: Any, dx: Tensor | None) -> list[Tensor]:
        """Gradients of <dx, x>; with the derivative of dx, the directional derivatives of those gradients."""
        ...


class Data(Stem):
    """The first input as it is: numeric columns or channels-last images."""

    def forward(self, params: Params, inputs: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        return inputs[0], None, None

    def tangent(self, tape: Any, v: Params) -> Tensor | None:
        return None

    def backward(self, tape: Any, dx: Tensor | None) -> list[Tensor]:
        return []


class Columns(Stem):
    """Embeddings of the categorical columns, then the numeric columns: [G, B, J * width + D]."""

    def __init__(self, categories: int, width: int) -> None:
        self.shapes = ((categories, width),)

    def init(self, generator: np.random.Generator) -> list[np.ndarray]:
        # A categorical column starts with the norm of one standardised numeric column.
        categories, width = self.shapes[0]
        return [generator.standard_normal((categories, width)) / np.sqrt(width)]

    def forward(self, params: Params, inputs: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        numeric, codes = inputs
        x = torch.cat([_embed(params[0], codes).flatten(2), numeric], -1)
        return x, None, codes

    def tangent(self, tape: Any, v: Params) -> Tensor | None:
        return _embed(v[0], tape).flatten(2)

    def backward(self, tape: Any, dx: Tensor | None) -> list[Tensor]:
        assert dx is not None
        return [_embedding_gradient(tape, dx, *self.shapes[0])]


class Tokens(Stem):
    """Embedding of each word plus a learned vector for its position: [G, B, L, width]. Token 0 is padding."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        self.shapes = ((vocabulary, width), (length, width))

    def init(self, generator: np.random.Generator) -> list[np.ndarray]:
        # A position shifts the meaning of a word little until training says otherwise.
        words, positions = (generator.standard_normal(shape) for shape in self.shapes)
        return [words, 0.02 * positions]

    def forward(self, params: Params, inputs: Inputs) -> tuple[Tensor, Tensor | None, Any]:
        tokens = inputs[0]
        return _embed(params[0], tokens) + params[1][:, None], tokens != 0, tokens

    def tangent(self, tape: Any, v: Params) -> Tensor | None:
        return _embed(v[0], tape) + v[1][:, None]

    def backward(self, tape: Any, dx: Tensor | None) -> list[Tensor]:
        assert dx is not None
        return [_embedding_gradient(tape, dx, *self.shapes[0]), dx.sum(1)]


def _embed(table: Tensor, codes: Tensor) -> Tensor:
    """Rows ``codes`` [G, B, J] of the tables [G, categories, width]: [G, B, J, width], zeros for code 0."""
    rows = _joint_rows(codes, table.shape[1]).flatten()
    chosen = table.flatten(0, 1).index_select(0, rows).view(*codes.shape, table.shape[2])
    return chosen * (codes != 0).unsqueeze(-1)


def _joint_rows(codes: Tensor, categories: int) -> Tensor:
    """Rows of the tables of all tasks joined to one: one index is several times faster than two."""
    return codes + categories * torch.arange(codes.shape[0], device=codes.device)[:, None, None]


def _embedding_gradient(codes: Tensor, dx: Tensor, categories: int, width: int) -> Tensor:
    """Gradient [G, categories, width] of ``_embed``; dx [G, B, J, width] or [G, B, J * width]."""
    tasks = codes.shape[0]
    grad = dx.new_zeros(tasks * categories, width)
    grad.index_add_(0, _joint_rows(codes, categories).flatten(), dx.reshape(-1, width))
    grad = grad.view(tasks, categories, width)
    grad[:, 0] = 0
    return grad
