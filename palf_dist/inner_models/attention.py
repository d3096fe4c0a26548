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
        y = self._join([torch.bmm(attention, value)], x.shape)
        return y, (query, key, value, attention)

    # A_bar = O_bar V',  V_bar = A' O_bar,  S_bar = s J(A_bar),  Q_bar = S_bar K,  K_bar = S_bar' Q
    # with the softmax's symmetric Jacobian J(u) = A (u - sum of A u).
    def backward(self, params: Params, tape: Any, dy: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        query, _, value, attention = tape
        (dy_heads,) = self._split(dy, 1)
        d_attention = torch.bmm(dy_heads, value.transpose(1, 2))
        d_scores, _ = _softmax_jacobian(attention, d_attention)
        d_scores.mul_(query.shape[-1] ** -0.5)
        return self._join([torch.bmm(*pair) for pair in _factors(tape, d_scores, dy_heads)], dy.shape), []

    # S. = s (Q. K' + Q K.'),  A. = J(S.),  O. = A. V + A V.
    def tangent(self, params: Params, tape: Any, v: Params, x_dot: Tensor | None) -> tuple[Tensor, Any]:
        assert x_dot is not None
        query, key, value, attention = tape
        query_dot, key_dot, value_dot = self._split(x_dot, 3)
        scores_dot = torch.bmm(query_dot, key.transpose(1, 2)).baddbmm_(query, key_dot.transpose(1, 2))
        attention_dot, _ = _softmax_jacobian(attention, scores_dot.mul_(query.shape[-1] ** -0.5))
        heads_dot = torch.bmm(attention_dot, value).baddbmm_(attention, value_dot)
        return self._join([heads_dot], x_dot.shape), (query_dot, key_dot, value_dot, attention_dot)

    # The product rule on each line of backward; with c = sum of A A_bar,
    # (S_bar). = s (A. (A_bar - c) + A ((A_bar). - c.)) = s (A. (A_bar - c) + J((A_bar).) - A sum of A. A_bar)
    def backward_tangent(
        self, params: Params, tape: Any, tangent_tape: Any, v: Params, dy: Tensor, dy_dot: Tensor
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        query, _, value, attention = tape
        _, _, value_dot, attention_dot = tangent_tape
        (dy_heads,), (dy_heads_dot,) = self._split(dy, 1), self._split(dy_dot, 1)
        d_attention = torch.bmm(dy_heads, value.transpose(1, 2))
        d_attention_dot = torch.bmm(dy_heads_dot, value.transpose(1, 2)).baddbmm_(dy_heads, value_dot.transpose(1, 2))
        d_scores, centred = _softmax_jacobian(attention, d_attention)
        d_scores_dot, _ = _softmax_jacobian(attention, d_attention_dot)
        d_scores_dot.addcmul_(attention_dot, centred)
        d_scores_dot.addcmul_(attention, (attention_dot * d_attention).sum(-1, keepdim=True), value=-1)
        for each in (d_scores, d_scores_dot):
            each.mul_(query.shape[-1] ** -0.5)

        dx = [torch.bmm(*pair) for pair in _factors(tape, d_scores, dy_heads)]
        dx_dot = [torch.bmm(*pair) for pair in _factors(tape, d_scores_dot, dy_heads_dot)]
        for each, pair in zip(dx_dot, _factors(tangent_tape, d_scores, dy_heads), strict=True):
            each.baddbmm_(*pair)
        return self._join(dx, dy.shape), self._join(dx_dot, dy.shape), []

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[G, B, L, parts * width] as ``parts`` tensors [G * B * heads, L, width of a head]."""
        tasks, rows, length, width = x.shape
        split = x.view(tasks, rows, length, parts, self.heads, width // (parts * self.heads))
        return split.permute(3, 0, 1, 4, 2, 5).reshape(parts, tasks * rows * self.heads, length, -1).unbind(0)

    def _join(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of ``_split``: parts [G * B * heads, L, width of a head] as one [G, B, L, parts * width]."""
        tasks, rows, length = shape[:3]
        split = [part.view(tasks, rows, self.heads, length, -1).transpose(2, 3) for part in parts]
        # inductor takes a stack of one to be contiguous and then a view of it, which it is not
        joined = split[0] if len(split) == 1 else torch.stack(split, 3)
        return joined.reshape(tasks, rows, length, -1)


def _factors(at: tuple[Tensor, ...], d_scores: Tensor, dy_heads: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Whose products are the cotangents of query, key and value; bilinear in (at, cotangents), so that their tangents
    are the sums of two such products."""
    query, key, _, attention = at
    return (d_scores, key), (d_scores.transpose(1, 2), query), (attention.transpose(1, 2), dy_heads)


def _softmax_jacobian(probabilities: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A (u - c) and u - c with c = sum of A u."""
    centred = u - (probabilities * u).sum(-1, keepdim=True)
    return probabilities * centred, centred
