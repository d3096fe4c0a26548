"""The inner models of a configuration: which architecture, and how large."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from palf_dist.sections import Count, Section

Side = Annotated[int, Field(strict=True, ge=4, description="images are resized to this side")]
Vocabulary = Annotated[int, Field(strict=True, ge=2, description="hash buckets of words; 0 is padding")]
Length = Annotated[int, Field(strict=True, ge=2, description="words kept of each text, of its first 256")]


class MLPConfig(Section):
    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Count, ...] = Field(default=(64,), min_length=1)
    embedding: Count = Field(default=4, description="width of the embedding of each categorical column")
    image_size: Side | None = Field(default=None, description="images are resized to this side; none: left as they are")
    words: Annotated[int, Field(strict=True, ge=2)] | None = Field(
        default=None, description="hash buckets of the words of texts, each a column; none: texts are not read"
    )


class ConvConfig(Section):
    kind: Literal["conv"] = "conv"
    channels: tuple[Count, ...] = Field(default=(8, 16), min_length=1)
    image_size: Side = 8
    groups: Count = Field(default=4, description="groups of GroupNorm; must divide every entry of channels")

    @model_validator(mode="after")
    def _divides(self) -> ConvConfig:
        _check_groups(self.groups, "channels", self.channels)
        return self


class ResNetConfig(Section):
    """Residual conv net with GroupNorm. ResNet-18 for images of 32 x 32 pixels is ``widths: [64, 128, 256, 512]``,
    ``blocks: [2, 2, 2, 2]``, ``image_size: 32``."""

    kind: Literal["resnet"] = "resnet"
    widths: tuple[Count, ...] = Field(
        default=(8, 16), min_length=1, description="channels of each stage; from one to the next the image halves"
    )
    blocks: tuple[Count, ...] = Field(default=(1, 1), min_length=1, description="residual blocks of each stage")
    image_size: Side = 8
    groups: Count = Field(default=4, description="groups of GroupNorm; must divide every entry of widths")

    @model_validator(mode="after")
    def _fits(self) -> ResNetConfig:
        _check_groups(self.groups, "widths", self.widths)
        if len(self.blocks) != len(self.widths):
            raise ValueError(
                f"blocks {list(self.blocks)} and widths {list(self.widths)} must have one entry for each stage"
            )
        return self


class TransformerConfig(Section):
    """Pre-norm encoder. Six layers of the usual size are ``width: 512``, ``heads: 8``, ``feedforward: 2048``,
    ``layers: 6``."""

    kind: Literal["transformer"] = "transformer"
    width: Count = 32
    heads: Count = 2
    feedforward: Count = 64
    layers: Count = 1
    vocabulary: Vocabulary = 2048
    length: Length = 32

    @model_validator(mode="after")
    def _divides(self) -> TransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class ModuleConfig(Section):
    """A user's nn.Module: ``factory`` names a function(input_shape, num_classes) -> nn.Module returning
    (logits, features) or logits alone. Slower: its second derivatives go through torch.func."""

    kind: Literal["module"] = "module"
    factory: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:function")
    reads: Literal["numeric", "image", "tokens"] = "numeric"
    image_size: Side = 8
    vocabulary: Vocabulary = 2048
    length: Length = 32


Architecture = Annotated[
    MLPConfig | ConvConfig | ResNetConfig | TransformerConfig | ModuleConfig, Field(discriminator="kind")
]


def _check_groups(groups: int, field: str, widths: tuple[int, ...]) -> None:
    if any(width % groups for width in widths):
        raise ValueError(f"groups ({groups}) must divide every entry of {field} {list(widths)}")
