"""EfficientViT as a graph, batch normalizations folded.

Its attention has no softmax: sums over all pixels, and one division by such a sum. In FP16 the sums
lose the small shares, and the 1e-15 that keeps the division from 0/0 is itself 0. Precision
recipes keep the module ``linear_attention`` in FP32, as the original does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .operators import conv2d, count_children, normalized_conv, regroup

_LEAST_SUM = 1e-15


def conv_layer(
    tensors: Mapping[str, Tensor], prefix: str, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution with its normalization, or with a bias and none."""
    if prefix + "conv.bias" in tensors:
        weight, bias = tensors[prefix + "conv.weight"], tensors[prefix + "conv.bias"]
        return conv2d(weight, bias, stride, groups)
    return normalized_conv(tensors, prefix + "conv.", prefix + "norm.", stride, groups)


class InvertedBottleneck(nn.Module):
    """Widen (unless it is left out, as in the stem), mix depthwise, narrow."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, stride: int = 1) -> None:
        super().__init__()
        convs: list[nn.Module] = []
        if prefix + "inverted_conv.conv.weight" in tensors:
            convs += [conv_layer(tensors, prefix + "inverted_conv."), nn.Hardswish()]
        width = tensors[prefix + "depth_conv.conv.weight"].shape[0]
        convs += [conv_layer(tensors, prefix + "depth_conv.", stride, width), nn.Hardswish()]
        self.layers = nn.Sequential(*convs, conv_layer(tensors, prefix + "point_conv."))
        self.shortcut = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class LinearAttention(nn.Module):
    """ReLU attention: for each group of channels ``(v kT) q / (sum(k)T q)``, over all pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, qkv: Tensor, pixels: int) -> Tensor:
        """float32 [B, groups * 3 * dim, H, W] to float32 [B, groups, dim, H * W]."""
        groups = qkv.shape[1] // (3 * self.dim)
        q, k, v = regroup(qkv, -1, groups, 3 * self.dim, pixels).split([self.dim] * 3, dim=2)
        q, k = torch.relu(q), torch.relu(k)
        mixed = torch.matmul(torch.matmul(v, k.transpose(2, 3)), q)
        total = torch.matmul(k.sum(dim=3, keepdim=True).transpose(2, 3), q)
        # The original adds the 1e-15, which changes no FP32 number above 1e-8. Optimizers of ONNX
        # graphs take such an addition for one of zero and drop it; they leave a limit alone.
        return mixed / torch.clamp(total, min=_LEAST_SUM)


class MultiScaleAttention(nn.Module):
    """Linear attention on the map and on a blurred copy of it (LiteMLA of the original)."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, side: int) -> None:
        super().__init__()
        self.side = side
        self.qkv = conv2d(tensors[prefix + "qkv.conv.weight"])
        blur, mix = tensors[prefix + "aggreg.0.0.weight"], tensors[prefix + "aggreg.0.1.weight"]
        dim = mix.shape[1]
        self.blur = conv2d(blur, groups=len(blur))
        self.mix = conv2d(mix, groups=len(mix) // dim)
        self.linear_attention = LinearAttention(dim)
        self.project = conv_layer(tensors, prefix + "proj.")

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        both = torch.cat([qkv, self.mix(self.blur(qkv))], dim=1)
        y = self.linear_attention(both, self.side**2)
        y = regroup(y, -1, self.project.in_channels, self.side, self.side)
        return x + self.project(y)


class EfficientViTTrunk(nn.Module):
    """Normalized pixels to the last stage's map.

    Args:
        tensors: parameters in EfficientViT's own naming, which tells depths and widths.
        prefix: what they stand below.
        image_size: side of the square input, pixels.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, image_size: int) -> None:
        super().__init__()
        stem = prefix + "input_stem.op_list."
        self.stem = conv_layer(tensors, stem + "0.", stride=2)
        self.stem_blocks = nn.Sequential(
            *(
                InvertedBottleneck(tensors, f"{stem}{i}.main.")
                for i in range(1, count_children(tensors, stem))
            )
        )
        side = -(-image_size // 2)
        self.stages = nn.ModuleList()
        for stage in range(count_children(tensors, prefix + "stages.")):
            side = -(-side // 2)
            blocks = f"{prefix}stages.{stage}.op_list."
            layers: list[nn.Module] = [InvertedBottleneck(tensors, blocks + "0.main.", stride=2)]
            for i in range(1, count_children(tensors, blocks)):
                context = f"{blocks}{i}.context_module.main."
                if context + "qkv.conv.weight" in tensors:
                    layers.append(MultiScaleAttention(tensors, context, side))
                    layers.append(InvertedBottleneck(tensors, f"{blocks}{i}.local_module.main."))
                else:
                    layers.append(InvertedBottleneck(tensors, f"{blocks}{i}.main."))
            self.stages.append(nn.Sequential(*layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32 [B, 3, S, S] to float32 [B, C, side, side]; each stride rounds up."""
        x: Tensor = self.stem_blocks(F.hardswish(self.stem(pixel_values)))
        for stage in self.stages:
            x = stage(x)
        return x
