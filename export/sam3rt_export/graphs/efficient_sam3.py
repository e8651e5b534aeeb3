"""EfficientSAM3's image encoders as graphs: a small trunk and a head under SAM 3's neck.

The original enlarges the head's map to SAM 3's grid and applies the neck to it. Enlarging mixes
pixels and the neck's first steps mix channels, both linear, so they may change places: the first
steps run on the small map, at a fifth of the cost. Bilinear weights sum to 1, so biases stay as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..checkpoint_keys import STUDENT
from .efficient_vit import EfficientViTTrunk
from .operators import conv3x3, gelu, normalized_conv, regroup
from .rep_vit import RepViTTrunk
from .sam3_neck import Sam3Neck
from .tiny_vit import TinyViTArchitecture, TinyViTTrunk

Backbone = Literal["repvit", "tinyvit", "efficientvit"]
_BACKBONE = STUDENT + "backbone.model."
_HEAD = STUDENT + "head."


@dataclass(frozen=True)
class StudentArchitecture:
    """Sizes of one EfficientSAM3 encoder.

    Attributes:
        backbone: family of its trunk.
        variant: what the authors call this size of it, or empty.
        image_size: side of the square input, pixels.
        grid: side of the grid that the neck works on, tokens.
        tiny_vit: sizes that are a TinyViT's alone, or ``None``.
    """

    backbone: Backbone
    variant: str
    image_size: int
    grid: int
    tiny_vit: TinyViTArchitecture | None = None


def bilinear(inputs: int, outputs: int) -> Tensor:
    """The matrix that enlarges an axis, with half-pixel centres, float32 [outputs, inputs]."""
    centre = (torch.arange(outputs, dtype=torch.float64) + 0.5) * inputs / outputs - 0.5
    distance = (centre.clamp(0, inputs - 1)[:, None] - torch.arange(inputs)).abs()
    return (1.0 - distance).clamp(min=0.0).float()


class Upsample(nn.Module):
    """Enlarges a square map with its channels last, by a matmul for each axis."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.matrix: Tensor
        self.register_buffer("matrix", bilinear(inputs, outputs), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs^2, C] to [B, outputs^2, C]."""
        channels = x.shape[-1]
        x = torch.matmul(self.matrix, regroup(x, -1, self.inputs, self.inputs * channels))
        x = torch.matmul(self.matrix, regroup(x, -1, self.inputs, channels))
        return regroup(x, -1, self.outputs**2, channels)


class EfficientSam3EncoderGraph(Sam3Neck):
    """Normalized pixels to the three feature maps the decoder reads.

    Args:
        architecture: sizes.
        tensors: parameters in ``sam3.pt`` naming.
    """

    def __init__(self, architecture: StudentArchitecture, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(architecture.grid, tensors)
        arch = architecture
        self.trunk: nn.Module
        if arch.tiny_vit is not None:
            self.trunk = TinyViTTrunk(arch.tiny_vit, tensors, _BACKBONE)
        elif arch.backbone == "repvit":
            self.trunk = RepViTTrunk(tensors, _BACKBONE)
        else:
            self.trunk = EfficientViTTrunk(tensors, _BACKBONE, arch.image_size)
        self.head1 = normalized_conv(tensors, _HEAD + "0.", _HEAD + "1.")
        self.head2 = conv3x3(tensors[_HEAD + "3.weight"], tensors[_HEAD + "3.bias"])
        # Five strides of 2.
        self.upsample = Upsample(-(-arch.image_size // 32), arch.grid)

    def to_grid(self, x: Tensor) -> Tensor:
        """See :class:`~.sam3_neck.Sam3Neck`."""
        enlarged: Tensor = self.upsample(x)
        return enlarged

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [B, 3, S, S] to float32 [B, 32, 4G, 4G], [B, 64, 2G, 2G], [B, 256, G, G]."""
        x = self.head2(gelu(self.head1(self.trunk(pixel_values))))
        return self.feature_maps(x.flatten(2).transpose(1, 2))
