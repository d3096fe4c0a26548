"""Inner models: G small networks of one architecture, evaluated together on one flat theta [G, P]."""

from __future__ import annotations

from palf_dist.architecture_config import Architecture, ConvConfig, MLPConfig, ResNetConfig, TransformerConfig
from palf_dist.inner_models.architectures import conv, mlp, resnet, transformer
from palf_dist.inner_models.module import from_factory
from palf_dist.inner_models.shapes import InputShape
from palf_dist.types import InnerModel

__all__ = ["InputShape", "build_model"]


def build_model(architecture: Architecture, input_shape: InputShape, num_classes: int) -> InnerModel:
    """The inner model of ``architecture`` for inputs of ``input_shape`` and C = ``num_classes`` (padded) classes.

    Raises ConfigError where the architecture cannot read such inputs, UnsupportedModuleError for a user's module
    whose second derivatives are wrong or missing.
    """
    if isinstance(architecture, MLPConfig):
        return mlp(architecture, input_shape, num_classes)
    if isinstance(architecture, ConvConfig):
        return conv(architecture, input_shape, num_classes)
    if isinstance(architecture, ResNetConfig):
        return resnet(architecture, input_shape, num_classes)
    if isinstance(architecture, TransformerConfig):
        return transformer(architecture, input_shape, num_classes)
    return from_factory(architecture, input_shape, num_classes)
