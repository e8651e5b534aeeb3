"""RepViT as a graph: batch normalizations and the branches of its token mixers are folded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import folding
from .operators import conv2d, count_children, folded_conv, gelu


def merged_mixer(tensors: Mapping[str, Tensor], prefix: str) -> nn.Conv2d:
    """``bn(conv_bn(x) + conv1(x) + x)``, all of it depthwise, as one 3x3 convolution."""
    scale, shift = folding.batch_norm(tensors, prefix + "conv.bn.")
    weight = tensors[prefix + "conv.c.weight"].double() * scale[:, None, None, None]
    weight[:, :, 1, 1] += tensors[prefix + "conv1.weight"][:, :, 0, 0] + 1.0
    bias = shift + tensors[prefix + "conv1.bias"]
    scale, shift = folding.batch_norm(tensors, prefix + "bn.")
    channels = len(scale)
    return conv2d(weight * scale[:, None, None, None], bias * scale + shift, groups=channels)


class SqueezeExcite(nn.Module):
    """Scales each channel by what a small network makes of all channels' means."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = (
            conv2d(tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"])
            for name in ("fc1", "fc2")
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(mean))))


class RepViTBlock(nn.Module):
    """A token mixer, which may shrink the map, and a channel mixer."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        mixer = prefix + "token_mixer."
        # The mixer's result takes the place of the stream that blocks add to: precision recipes
        # know it by its name.
        self.mixed: nn.Module = nn.Identity()
        if mixer + "0.conv.c.weight" in tensors:
            self.mixer = merged_mixer(tensors, mixer + "0.")
            if mixer + "1.fc1.weight" in tensors:
                self.mixed = SqueezeExcite(tensors, mixer + "1.")
        else:
            width = tensors[mixer + "0.c.weight"].shape[0]
            self.mixer = folded_conv(tensors, mixer + "0.", stride=2, groups=width)
            self.mixed = folded_conv(tensors, mixer + "2.")
        self.widen = folded_conv(tensors, prefix + "channel_mixer.m.0.")
        self.narrow = folded_conv(tensors, prefix + "channel_mixer.m.2.")

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(self.mixer(x))
        y: Tensor = self.narrow(gelu(self.widen(x)))
        return x + y


class RepViTTrunk(nn.Module):
    """Normalized pixels to the last stage's map.

    Args:
        tensors: parameters in RepViT's own naming, which tells depths and widths.
        prefix: what they stand below.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        features = prefix + "features."
        self.stem1 = folded_conv(tensors, features + "0.0.", stride=2)
        self.stem2 = folded_conv(tensors, features + "0.2.", stride=2)
        blocks = range(1, count_children(tensors, features))
        self.blocks = nn.Sequential(*(RepViTBlock(tensors, f"{features}{i}.") for i in blocks))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32 [B, 3, S, S] to float32 [B, C, side, side]; each stride rounds up."""
        x: Tensor = self.blocks(self.stem2(gelu(self.stem1(pixel_values))))
        return x
