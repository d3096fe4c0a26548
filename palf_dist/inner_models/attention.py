"""Softmax self-attention of many tasks at once; projections before and after it are ordinary Linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palf_dist.inner_models.layers import Layer, Params

PADDING_SCORE = -1e4
"""Added to attention scores of padding: exp of it is exactly 0, and a text of padding alone stays finite."""


class SelfAttention(Layer):
    """Softmax attention of a sequence with itself: x [G, B, L, 3 width] holds queries, keys and values; y [.., width].

    Per head S = s Q K' (+ padding), A = softmax(S), O = A V, s = 1 / sqrt(width of a head).
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        query, key, value = self._split(x, 3)
        scores = torch.bmm(query, key.transpose(1, 2)) * query.shape[-1] ** -0.5
        if mask is not None:
            tasks, rows, length = mask.shape
            padding = (~mask).to(x.dtype)[:, :, None, None, :] * PADDING_SCORE
            scores = (scores.view(tasks, rows, self.heads, length, length) + padding).view(scores.shape)
        attention = torch.softmax(scores, -1)
        y = self._join(torch.bmm(attention, value)[None], x.shape)
        return y, (query, key, value, attention)

    # A_bar = O_bar V',  V_bar = A' O_bar,  S_bar = J(A_bar),  Q_bar = s S_bar K,  K_bar = s S_bar' Q
    # with the softmax's symmetric Jacobian J(u) = A (u - sum of A u).
    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        _, _, value, attention = tape
        (dy_heads,) = self._split(dy, 1)
        d_attention = torch.bmm(dy_heads, value.transpose(1, 2))
        d_scores, _ = _softmax_jacobian(attention, d_attention)
        return self._cotangent_of_input(tape, d_scores, dy_heads, dy.shape), []

    # S. = s (Q. K' + Q K.'),  A. = J(S.),  O. = A. V + A V.
    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        assert x_dot is not None
        query, key, value, attention = tape
        query_dot, key_dot, value_dot = self._split(x_dot, 3)
        scores_dot = torch.bmm(query_dot, key.transpose(1, 2)).baddbmm_(query, key_dot.transpose(1, 2))
        attention_dot, _ = _softmax_jacobian(attention, scores_dot.mul_(query.shape[-1] ** -0.5))
        heads_dot = torch.bmm(attention_dot, value).baddbmm_(attention, value_dot)
        return self._join(heads_dot[None], x_dot.shape), (query_dot, key_dot, value_dot, attention_dot)

    # The product rule on each line of backward; with c = sum of A A_bar,
    # (S_bar). = A. (A_bar - c) + A ((A_bar). - c.) = A. (A_bar - c) + J((A_bar).) - A sum of A. A_bar
    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        _, _, value, attention = tape
        query_dot, key_dot, value_dot, attention_dot = tangent_tape
        (dy_heads,), (dy_heads_dot,) = self._split(dy, 1), self._split(dy_dot, 1)
        d_attention = torch.bmm(dy_heads, value.transpose(1, 2))
        d_attention_dot = torch.bmm(dy_heads_dot, value.transpose(1, 2)).baddbmm_(dy_heads, value_dot.transpose(1, 2))
        d_scores, centred = _softmax_jacobian(attention, d_attention)
        d_scores_dot, _ = _softmax_jacobian(attention, d_attention_dot)
        d_scores_dot.addcmul_(attention_dot, centred)
        d_scores_dot.addcmul_(attention, (attention_dot * d_attention).sum(-1, keepdim=True), value=-1)

        dx = self._cotangent_of_input(tape, d_scores, dy_heads, dy.shape)
        dx_dot = self._cotangent_of_input(tape, d_scores_dot, dy_heads_dot, dy.shape)
        moved = (query_dot, key_dot, value_dot, attention_dot)
        return dx, dx_dot.add_(self._cotangent_of_input(moved, d_scores, dy_heads, dy.shape)), []

    def _cotangent_of_input(
        self, at: tuple[Tensor, ...], d_scores: Tensor, dy_heads: Tensor, shape: Sequence[int]
    ) -> Tensor:
        """Last line of ``backward``; bilinear in (at, cotangents), so that its tangent is the sum of two such calls."""
        query, key, _, attention = at
        scaled = d_scores * query.shape[-1] ** -0.5
        parts = [torch.bmm(scaled, key), torch.bmm(scaled.transpose(1, 2), query)]
        parts.append(torch.bmm(attention.transpose(1, 2), dy_heads))
        return self._join(torch.stack(parts), shape)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[G, B, L, parts * width] as ``parts`` tensors [G * B * heads, L, width of a head]."""
        tasks, rows, length, width = x.shape
        split = x.view(tasks, rows, length, parts, self.heads, width // (parts * self.heads))
        return split.permute(3, 0, 1, 4, 2, 5).reshape(parts, tasks * rows * self.heads, length, -1).unbind(0)

    def _join(self, heads: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``_split``: [parts, G * B * heads, L, width of a head] to [G, B, L, parts * width]."""
        tasks, rows, length = shape[:3]
        split = heads.view(heads.shape[0], tasks, rows, self.heads, length, -1)
        return split.permute(1, 2, 4, 0, 3, 5).reshape(tasks, rows, length, -1)


def _softmax_jacobian(probabilities: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A (u - c) and u - c with c = sum of A u."""
    centred = u - (probabilities * u).sum(-1, keepdim=True)
    return probabilities * centred, centred
