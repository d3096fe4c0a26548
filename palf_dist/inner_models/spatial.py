"""Linear maps over positions: the patches that turn a convolution into a Linear layer, and mean pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palf_dist.inner_models.layers import LinearMap, Params


class Patches(LinearMap):
    """Square patches of channels-last images, around every ``stride``-th pixel and zero-padded (im2col): [G, B, H, W,
    channels] to [G, B, H', W', side^2 channels], ``side`` odd; a Linear layer on them is the convolution."""

    def __init__(self, stride: int, side: int = 3) -> None:
        self.stride, self.side, self.margin = stride, side, side // 2

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        return self.push(x.shape, x), x.shape

    def push(self, tape: Any, x_dot: Tensor) -> Tensor:
        padded = F.pad(x_dot, (0, 0, *4 * (self.margin,)))
        patches = padded.unfold(2, self.side, self.stride).unfold(3, self.side, self.stride)
        # [G, B, H', W', channels, side, side]
        return patches.permute(0, 1, 2, 3, 5, 6, 4).flatten(4)

    def pull(self, tape: Any, dy: Tensor) -> Tensor:
        return _summed(dy, tape[2:4], self.stride, self.side)


@torch.library.custom_op("palf_dist::summed_patches", mutates_args=())
def _summed(patches: Tensor, size: Sequence[int], stride: int, side: int) -> Tensor:
    """The images [G, B, *size, channels] that are the sum of the patches [G, B, H', W', side^2 channels], each where it
    was taken (col2im). An operator, which inductor calls as it is: of additions to slices it makes passes over whole
    images, which took half the time of a compiled conv net."""
    images, padded = _padded(patches, size, side)
    padded.zero_()
    for tap, part in enumerate(patches.split(padded.shape[-1], -1)):
        top, left = divmod(tap, side)
        down, right = top + stride * patches.shape[2], left + stride * patches.shape[3]
        padded[:, :, top:down:stride, left:right:stride] += part
    return images


@_summed.register_fake
def _(patches: Tensor, size: Sequence[int], stride: int, side: int) -> Tensor:
    return _padded(patches, size, side)[0]


def _padded(patches: Tensor, size: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
    """Images to be filled, without and with their margins."""
    (height, width), margin = size, side // 2
    shape = *patches.shape[:2], height + 2 * margin, width + 2 * margin, patches.shape[-1] // side**2
    padded = patches.new_empty(shape)
    return padded[:, :, margin : margin + height, margin : margin + width], padded


class MeanPool(LinearMap):
    """Mean over the positions of a row, [G, B, ..., width] to [G, B, width]: all of them, or those of ``mask``.
    A row without a real position gives zeros."""

    def forward(self, params: Params, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        weights: float | Tensor
        if mask is None:
            weights = 1 / x.shape[2:-1].numel()
        else:
            real = mask.to(x.dtype)
            weights = (real / real.sum(-1, keepdim=True).clamp(min=1))[..., None]
        tape = x.shape, weights
        return self.push(tape, x), tape

    def push(self, tape: Any, x_dot: Tensor) -> Tensor:
        _, weights = tape
        return (x_dot.flatten(2, -2) * weights).sum(2)

    def pull(self, tape: Any, dy: Tensor) -> Tensor:
        shape, weights = tape
        positions = dy.unsqueeze(2).expand(-1, -1, shape[2:-1].numel(), -1)
        return (positions * weights).reshape(shape)
