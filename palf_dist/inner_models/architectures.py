"""The built-in architectures, as compositions of layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from palf_dist.architecture_config import ConvConfig, MLPConfig, ResNetConfig, TransformerConfig
from palf_dist.errors import ConfigError
from palf_dist.inner_models.attention import SelfAttention
from palf_dist.inner_models.layered import LayeredModel
from palf_dist.inner_models.layers import Layer, Linear, ReLU, Residual
from palf_dist.inner_models.normalisation import Normalise, Scale
from palf_dist.inner_models.shapes import InputShape
from palf_dist.inner_models.spatial import MeanPool, Patches
from palf_dist.inner_models.stems import Columns, Data, Stem, Tokens

RELU_GAIN = 2.0  # He initialisation: half of the units are off


def mlp(architecture: MLPConfig, shape: InputShape, num_classes: int) -> LayeredModel:
    """[embeddings ++ numeric] -> (Linear, ReLU) for each entry of ``hidden`` -> features -> Linear."""
    if shape.numeric + shape.categorical == 0:
        raise ConfigError("architecture mlp needs at least one numeric or categorical column; the dataset has none")
    embedded = shape.categorical * architecture.embedding
    blocks = tuple(width for width in (embedded, shape.numeric) if width)
    stem: Stem = Columns(shape.categories, architecture.embedding) if embedded else Data()
    first, *rest = pairwise((embedded + shape.numeric, *architecture.hidden))
    body: list[Layer] = [Linear(*first, RELU_GAIN, blocks, learned=embedded), ReLU()]
    for widths in rest:
        body += [Linear(*widths, RELU_GAIN), ReLU()]
    return LayeredModel(stem, body, Linear(architecture.hidden[-1], num_classes))


def conv(architecture: ConvConfig, shape: InputShape, num_classes: int) -> LayeredModel:
    """(3 x 3 convolution of stride 2, group norm, ReLU) per entry of ``channels`` -> mean -> features -> Linear."""
    height, width, image_channels = _image("conv", shape)
    channels, groups = architecture.channels, architecture.groups
    body: list[Layer] = []
    for entry, (inputs, outputs) in enumerate(pairwise((image_channels, *channels)), start=1):
        height, width = (height + 1) // 2, (width + 1) // 2
        _check_groups(f"conv: after {entry} entries of channels", channels, height * width * outputs, groups)
        body += [*_convolution(inputs, outputs, groups, stride=2, data=entry == 1, bias=True), ReLU()]
    return LayeredModel(Data(), [*body, MeanPool()], Linear(channels[-1], num_classes))


def resnet(architecture: ResNetConfig, shape: InputShape, num_classes: int) -> LayeredModel:
    """3 x 3 convolution, group norm, ReLU -> stages of residual blocks -> mean -> features -> Linear.

    The net of He et al. (2016) for small images, its first convolution of stride 1 and without max pooling. Group norm
    stands in the place of batch norm, which carries state and makes a row's loss depend on the rows beside it.
    """
    height, width, image_channels = _image("resnet", shape)
    widths, groups = architecture.widths, architecture.groups
    body = [*_convolution(image_channels, widths[0], groups, data=True), ReLU()]
    for stage, (inputs, outputs) in enumerate(pairwise((widths[0], *widths)), start=1):
        stride = 1 if stage == 1 else 2
        height, width = -(-height // stride), -(-width // stride)
        _check_groups(f"resnet: after {stage} entries of widths", widths, height * width * outputs, groups)
        body += [_block(inputs, outputs, groups, stride), ReLU()]
        for _ in range(architecture.blocks[stage - 1] - 1):
            body += [_block(outputs, outputs, groups), ReLU()]
    return LayeredModel(Data(), [*body, MeanPool()], Linear(widths[-1], num_classes))


def _block(inputs: int, outputs: int, groups: int, stride: int = 1) -> Residual:
    """Convolution, norm, ReLU, convolution, norm; beside it the identity, or a 1 x 1 convolution and norm where the
    size changes."""
    inner = [*_convolution(inputs, outputs, groups, stride), ReLU(), *_convolution(outputs, outputs, groups)]
    same = stride == 1 and inputs == outputs
    return Residual(inner, () if same else _convolution(inputs, outputs, groups, stride, side=1))


def _convolution(
    inputs: int, outputs: int, groups: int, stride: int = 1, side: int = 3, data: bool = False, bias: bool = False
) -> list[Layer]:
    """Convolution and group norm. ``data``: the first layer, which reads the images."""
    taps = side * side
    blocks, learned = ((inputs,) * taps, 0) if data else ((), None)
    return [
        Patches(stride, side),
        Linear(taps * inputs, outputs, RELU_GAIN, blocks, learned, bias),
        Normalise(groups),
        Scale(outputs),
    ]


def _image(kind: str, shape: InputShape) -> tuple[int, int, int]:
    if shape.image is None:
        raise ConfigError(f"architecture {kind} needs images; the dataset has none: use mlp or transformer")
    return shape.image


def _check_groups(after: str, widths: Sequence[int], numbers: int, groups: int) -> None:
    if numbers == groups:
        raise ConfigError(
            f"architecture {after} {list(widths)} the image is one pixel and each of the {groups} groups one number, "
            "which group norm turns into 0: use fewer groups, fewer entries or a larger image_size"
        )


def transformer(architecture: TransformerConfig, shape: InputShape, num_classes: int) -> LayeredModel:
    """Words + positions -> pre-norm encoder blocks -> mean over real words -> features -> Linear.

    The feed-forward part uses ReLU, as the original transformer did: its second derivative is zero.
    """
    if shape.tokens == 0:
        raise ConfigError("architecture transformer needs texts; the dataset has none: use mlp or conv")
    width = architecture.width
    body: list[Layer] = []
    for _ in range(architecture.layers):
        attend: list[Layer] = [Linear(width, 3 * width), SelfAttention(architecture.heads), Linear(width, width)]
        feed: list[Layer] = [
            Linear(width, architecture.feedforward, RELU_GAIN),
            ReLU(),
            Linear(architecture.feedforward, width),
        ]
        body += [Residual([Normalise(), Scale(width), *part]) for part in (attend, feed)]
    return LayeredModel(Tokens(shape.vocabulary, shape.tokens, width), [*body, MeanPool()], Linear(width, num_classes))
