"""Normalisation without its affine part, and the affine part: group norm and layer norm are the two in a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from palf_dist.inner_models.layers import Layer, Params, as_rows


class Scale(Layer):
    """y = gamma x + beta on the last axis: the affine part of a normalisation, kept apart from it."""

    def __init__(self, width: int) -> None:
        self.shapes = ((width,), (width,))

    def init(self, generator: np.random.Generator) -> list[np.ndarray]:
        return [np.ones(self.shapes[0]), np.zeros(self.shapes[1])]

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        rows = as_rows(x)
        return torch.addcmul(params[1][:, None], rows, params[0][:, None]).view(x.shape), rows

    # x_bar = gamma y_bar,  gamma_bar = sum of x y_bar,  beta_bar = sum of y_bar
    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        rows = as_rows(dy)
        return (rows * params[0][:, None]).view(dy.shape), [(tape * rows).sum(1), rows.sum(1)]

    # y. = gamma x. + gamma. x + beta.
    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        assert x_dot is not None
        rows = as_rows(x_dot)
        y_dot = torch.addcmul(v[1][:, None], tape, v[0][:, None]).addcmul_(rows, params[0][:, None])
        return y_dot.view(x_dot.shape), rows

    # (x_bar). = gamma y_bar. + gamma. y_bar,  (gamma_bar). = sum of x y_bar. + x. y_bar,  (beta_bar). = sum of y_bar.
    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        rows, rows_dot = as_rows(dy), as_rows(dy_dot)
        gamma = params[0][:, None]
        dx_dot = (rows_dot * gamma).addcmul_(rows, v[0][:, None])
        grads = [(tape * rows_dot).addcmul_(tangent_tape, rows).sum(1), rows_dot.sum(1)]
        return (rows * gamma).view(dy.shape), dx_dot.view(dy.shape), grads


class Normalise(Layer):
    """x_hat = (x - mean) r,  r = (variance + eps)^-1/2: layer norm of the last axis, or group norm of images.

    ``groups`` None normalises each position's channels; otherwise mean and variance of a row are shared by all its
    positions and by each group's channels.
    """

    EPS = 1e-5

    def __init__(self, groups: int | None = None) -> None:
        self.groups = groups

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, x.shape[-1])  # [G, B, positions, channels]

    def _averaging(self, rows: Tensor) -> Tensor | None:
        """[G, channels, channels] that makes of sums over positions each channel's mean over its group and them; None
        for layer norm."""
        if self.groups is None:
            return None
        tasks, _, positions, channels = rows.shape
        size = channels // self.groups
        blocks = torch.eye(self.groups, dtype=rows.dtype, device=rows.device)
        return torch.kron(blocks, rows.new_full((size, size), 1 / (positions * size))).expand(tasks, -1, -1)

    def _mean(self, rows: Tensor, averaging: Tensor | None) -> Tensor:
        """Mean that each entry is normalised with, [G, B, positions, 1] or [G, B, 1, channels]."""
        if averaging is None:
            return rows.mean(-1, keepdim=True)
        # Positions first, then the few channels of a group: one reduction over both axes and broadcasting by group are
        # five to ten times slower. A product, because inductor would take a mean over a group anew at each position.
        return torch.bmm(rows.sum(2), averaging).unsqueeze(2)

    def _project(self, x_hat: Tensor, averaging: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
        """Pi(a) and mean(x_hat a); outside autograd only."""
        correlation = self._mean(x_hat * a, averaging)
        return (a - self._mean(a, averaging)).addcmul_(x_hat, correlation, value=-1), correlation

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        rows = self._rows(x)
        averaging = self._averaging(rows)
        centred = rows - self._mean(rows, averaging)
        r = torch.rsqrt(self._mean(centred * centred, averaging) + self.EPS)
        x_hat = centred * r
        return x_hat.view(x.shape), (x_hat, r, averaging)

    # The Jacobian is r Pi with the symmetric Pi(a) = a - mean(a) - x_hat mean(x_hat a), so that forward and backward
    # derivative are the same map: x_hat. = r Pi(x.),  x_bar = r Pi(y_bar).
    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        x_hat, r, averaging = tape
        return self._project(x_hat, averaging, self._rows(dy))[0].mul_(r).view(dy.shape), []

    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        assert x_dot is not None
        x_hat, r, averaging = tape
        projected, correlation = self._project(x_hat, averaging, self._rows(x_dot))
        x_hat_dot = projected.mul_(r)
        return x_hat_dot.view(x_dot.shape), (x_hat_dot, -r * r * correlation)  # r. = -r^2 mean(x_hat x.)

    # (x_bar). = r. Pi(y_bar) + r Pi(y_bar.) - r (x_hat. mean(x_hat y_bar) + x_hat mean(x_hat. y_bar))
    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        x_hat, r, averaging = tape
        x_hat_dot, r_dot = tangent_tape
        rows = self._rows(dy)
        projected, correlation = self._project(x_hat, averaging, rows)
        projected_dot, _ = self._project(x_hat, averaging, self._rows(dy_dot))
        projected_dot.addcmul_(x_hat_dot, correlation, value=-1)
        projected_dot.addcmul_(x_hat, self._mean(x_hat_dot * rows, averaging), value=-1)
        dx_dot = projected_dot.mul_(r).addcmul_(projected, r_dot)
        return projected.mul_(r).view(dy.shape), dx_dot.view(dy.shape), []
