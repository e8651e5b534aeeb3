"""TinyViT as a graph, batch normalizations folded: MobileSAM's encoder, and a trunk for others.

The attention scale is part of Q's weights, and the relative-position biases are constants.
Windows are padded before their normalization, as in the original, where the padding takes part
in the attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .operators import Linear, folded_conv, gelu, layer_norm, regroup

_LAYER_NORM_EPS = 1e-5
_NECK_NORM_EPS = 1e-6


@dataclass(frozen=True)
class TinyViTArchitecture:
    """Sizes of a TinyViT, by default MobileSAM's (``build_sam_vit_t`` of the original).

    Attributes:
        image_size: side of the square input, pixels.
        depths: blocks of each stage; the first stage is convolutional.
        heads: attention heads of each stage; the first entry is not used.
        windows: window side of each stage, tokens; the first entry is not used.
        last_stride: of the merge before the last stage. The others have 2.
    """

    image_size: int = 1024
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (2, 4, 5, 10)
    windows: tuple[int, ...] = (7, 7, 14, 7)
    last_stride: int = 1

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each stage's map, tokens. A convolution with stride 2 rounds up."""
        side = -(-self.image_size // 4)
        sides = [side]
        for stride in self.strides:
            side = -(-side // stride)
            sides.append(side)
        return tuple(sides)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the merges between the stages."""
        return (2,) * (len(self.depths) - 2) + (self.last_stride,)

    @property
    def grid(self) -> int:
        """Side of the last map, tokens."""
        return self.sides[-1]


class MBConv(nn.Module):
    """An inverted bottleneck."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        self.expand = folded_conv(tensors, prefix + "conv1.")
        hidden = self.expand.out_channels
        self.depthwise = folded_conv(tensors, prefix + "conv2.", groups=hidden)
        self.project = folded_conv(tensors, prefix + "conv3.")

    def forward(self, x: Tensor) -> Tensor:
        y = gelu(self.depthwise(gelu(self.expand(x))))
        return gelu(x + self.project(y))


class PatchMerging(nn.Module):
    """Shrinks the map between stages, unless its stride is 1."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        self.first = folded_conv(tensors, prefix + "conv1.")
        width = self.first.out_channels
        self.depthwise = folded_conv(tensors, prefix + "conv2.", stride=stride, groups=width)
        self.last = folded_conv(tensors, prefix + "conv3.")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(gelu(self.depthwise(gelu(self.first(x)))))


class WindowAttention(nn.Module):
    """Attention within one window, with a learned bias per offset."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = window * window
        weight, bias = tensors[prefix + "qkv.weight"], tensors[prefix + "qkv.bias"]
        self.width = weight.shape[1]
        self.head_dim = self.width // heads
        self.norm = layer_norm(tensors, prefix + "norm.", _LAYER_NORM_EPS)
        # The original's rows are ordered (head, q k v, channel); ours (q k v, head, channel).
        scale = torch.tensor([self.head_dim**-0.5, 1.0, 1.0])
        rows = weight.reshape(heads, 3, self.head_dim, -1).transpose(0, 1)
        rows = rows * scale[:, None, None, None]
        offsets = bias.reshape(heads, 3, self.head_dim).transpose(0, 1) * scale[:, None, None]
        self.qkv = Linear(rows.reshape(3 * self.width, -1).T, offsets.reshape(-1))
        self.out = Linear(tensors[prefix + "proj.weight"].T, tensors[prefix + "proj.bias"])
        # Gathered in the graph: the table is 200 times smaller than what it spreads to, and
        # runtimes do it once, when they load.
        self.biases = nn.Parameter(tensors[prefix + "attention_biases"])
        self.offsets: Tensor
        self.register_buffer("offsets", _offset_indexes(window).flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [windows, tokens, C] to the same shape."""
        qkv = regroup(self.qkv(self.norm(x)), -1, self.tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        biases = self.biases.index_select(1, self.offsets)
        biases = biases.reshape(1, self.heads, self.tokens, self.tokens)
        scores = torch.matmul(q, k.transpose(2, 3)) + biases
        mixed = torch.matmul(torch.softmax(scores, dim=-1), v).permute(0, 2, 1, 3)
        return self.out(regroup(mixed, -1, self.tokens, self.width))


def _offset_indexes(window: int) -> Tensor:
    """For each pair of a window's tokens, the index of its bias, int64 [tokens, tokens].

    Biases are numbered in the order in which row-major pairs first show an absolute offset.
    """
    cells = list(itertools.product(range(window), range(window)))
    numbers: dict[tuple[int, int], int] = {}
    rows = [
        [numbers.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(numbers)) for b in cells]
        for a in cells
    ]
    return torch.tensor(rows)


class TinyViTBlock(nn.Module):
    """Windowed attention, a depthwise convolution, an MLP."""

    def __init__(
        self, tensors: Mapping[str, Tensor], prefix: str, heads: int, window: int, side: int
    ) -> None:
        super().__init__()
        self.window, self.side = window, side
        self.attention = WindowAttention(tensors, prefix + "attn.", heads, window)
        self.width = self.attention.width
        self.local = folded_conv(tensors, prefix + "local_conv.", groups=self.width)
        self.mlp_norm = layer_norm(tensors, prefix + "mlp.norm.", _LAYER_NORM_EPS)
        self.fc1 = Linear(tensors[prefix + "mlp.fc1.weight"].T, tensors[prefix + "mlp.fc1.bias"])
        self.fc2 = Linear(tensors[prefix + "mlp.fc2.weight"].T, tensors[prefix + "mlp.fc2.bias"])

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, side, side, C] to the same shape."""
        x = x + self._windowed(x)
        x = self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.fc2(gelu(self.fc1(self.mlp_norm(x))))

    def _windowed(self, x: Tensor) -> Tensor:
        side, window, width = self.side, self.window, self.width
        count = -(-side // window)
        padding = count * window - side
        if padding:
            x = nn.functional.pad(x, (0, 0, 0, padding, 0, padding))
        x = regroup(x, -1, count, window, count, window, width).permute(0, 1, 3, 2, 4, 5)
        x = self.attention(regroup(x, -1, window * window, width))
        x = regroup(x, -1, count, count, window, window, width).permute(0, 1, 3, 2, 4, 5)
        x = regroup(x, -1, count * window, count * window, width)
        return x[:, :side, :side] if padding else x


class TinyViTTrunk(nn.Module):
    """Normalized pixels to the last stage's map.

    Args:
        architecture: sizes.
        tensors: parameters in TinyViT's own naming.
        prefix: what they stand below.
    """

    def __init__(
        self, architecture: TinyViTArchitecture, tensors: Mapping[str, Tensor], prefix: str
    ) -> None:
        super().__init__()
        arch = architecture
        self.stem1 = folded_conv(tensors, prefix + "patch_embed.seq.0.", stride=2)
        self.stem2 = folded_conv(tensors, prefix + "patch_embed.seq.2.", stride=2)
        self.convs = nn.Sequential(
            *(MBConv(tensors, f"{prefix}layers.0.blocks.{i}.") for i in range(arch.depths[0]))
        )
        self.merges = nn.ModuleList()
        self.stages = nn.ModuleList()
        for stage, stride in enumerate(arch.strides, 1):
            merge = f"{prefix}layers.{stage - 1}.downsample."
            self.merges.append(PatchMerging(tensors, merge, stride))
            blocks = (
                TinyViTBlock(
                    tensors,
                    f"{prefix}layers.{stage}.blocks.{i}.",
                    arch.heads[stage],
                    arch.windows[stage],
                    arch.sides[stage],
                )
                for i in range(arch.depths[stage])
            )
            self.stages.append(nn.Sequential(*blocks))

    def last_map(self, pixel_values: Tensor) -> Tensor:
        """float32 [B, 3, S, S] to float32 [B, C, side, side]."""
        x: Tensor = self.convs(self.stem2(gelu(self.stem1(pixel_values))))
        for merge, stage in zip(self.merges, self.stages, strict=True):
            x = stage(merge(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x

    def forward(self, pixel_values: Tensor) -> Any:
        """See :meth:`last_map`."""
        return self.last_map(pixel_values)


class TinyViTGraph(TinyViTTrunk):
    """Normalized, padded pixels to MobileSAM's one feature map."""

    def __init__(
        self, architecture: TinyViTArchitecture, tensors: Mapping[str, Tensor], prefix: str
    ) -> None:
        super().__init__(architecture, tensors, prefix)
        neck = prefix + "neck."
        self.project = nn.Parameter(tensors[neck + "0.weight"].flatten(1).T.contiguous())
        self.project_norm = layer_norm(tensors, neck + "1.", _NECK_NORM_EPS)
        weight = tensors[neck + "2.weight"]
        outputs, inputs = weight.shape[:2]
        self.mix = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, device="meta")
        self.mix.weight = nn.Parameter(weight)
        self.mix_norm = layer_norm(tensors, neck + "3.", _NECK_NORM_EPS)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """float32 [B, 3, S, S] to float32 [B, 256, S/16, S/16]."""
        x = self.last_map(pixel_values)
        x = self.project_norm(torch.matmul(x.permute(0, 2, 3, 1), self.project))
        x = self.mix_norm(self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return (x.permute(0, 3, 1, 2),)
