"""The built-in architectures, as compositions of layers."""

from __future__ import annotations

from itertools import pairwise

from palf_dist.config import ConvConfig, MLPConfig, TransformerConfig
from palf_dist.errors import ConfigError
from palf_dist.inner_models.attention import SelfAttention
from palf_dist.inner_models.layered import LayeredModel
from palf_dist.inner_models.layers import Layer, Linear, ReLU, Residual, Sequential
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
    if shape.image is None:
        raise ConfigError("architecture conv needs images; the dataset has none: use mlp or transformer")
    height, width, image_channels = shape.image
    body: list[Layer] = []
    for entry, (inputs, outputs) in enumerate(pairwise((image_channels, *architecture.channels)), start=1):
        height, width = (height + 1) // 2, (width + 1) // 2
        if height * width * outputs == architecture.groups:
            raise ConfigError(
                f"architecture conv: after {entry} entries of channels {list(architecture.channels)} the "
                f"image is one pixel and each of the {architecture.groups} groups one number, which group norm turns "
                "into 0: use fewer groups, fewer entries or a larger image_size"
            )
        first = entry == 1
        blocks = (inputs,) * 9 if first else ()
        body += [
            Patches(stride=2),
            Linear(9 * inputs, outputs, RELU_GAIN, blocks, learned=0 if first else None),
            Normalise(architecture.groups),
            Scale(outputs),
            ReLU(),
        ]
    return LayeredModel(Data(), [*body, MeanPool()], Linear(architecture.channels[-1], num_classes))


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
        body += [Residual(Sequential([Normalise(), Scale(width), *part])) for part in (attend, feed)]
    return LayeredModel(Tokens(shape.vocabulary, shape.tokens, width), [*body, MeanPool()], Linear(width, num_classes))
