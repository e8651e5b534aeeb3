"""Operators written the way ONNX Runtime and TensorRT recognize them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import folding


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, ``x/2 (1 + erf(x / sqrt 2))``, in the order ONNX Runtime fuses to one kernel.

    ONNX's own Gelu operator came with opset 20; these graphs stay at an opset that every
    TensorRT from 10.3 on reads.
    """
    return x * (torch.erf(x / math.sqrt(2.0)) + 1.0) * 0.5


def regroup(x: Tensor, *shape: int) -> Tensor:
    """``x.reshape(shape)`` that stays as written in the exported graph.

    The tracer turns the reshape of a permuted tensor into one with every size spelled out, and
    computes sizes it does not know from whichever input has them. ``view`` keeps the -1.
    """
    return x.contiguous().view(shape)


def split_heads(x: Tensor, tokens: int, heads: int, head_dim: int) -> Tensor:
    """[B, T, heads * d] to [groups, heads, tokens, d]; a group is ``tokens`` of a row's tokens."""
    return regroup(x, -1, tokens, heads, head_dim).permute(0, 2, 1, 3)


def channels_last(maps: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h * w, C], without computing with B."""
    return regroup(maps, -1, maps.shape[1], maps.shape[2] * maps.shape[3]).transpose(1, 2)


def interleave_cells(cells: Tensor, side: int) -> Tensor:
    """[B, side^2, (row, column, channel) of a 2x2 cell] to [B, (2 side)^2, channel].

    With channels last, whole runs of them move.
    """
    channels = cells.shape[-1] // 4
    y = regroup(cells, -1, side, side, 2, 2 * channels).permute(0, 1, 3, 2, 4)
    return regroup(y, -1, 4 * side * side, channels)


def layer_norm(tensors: Mapping[str, Tensor], prefix: str, eps: float) -> nn.LayerNorm:
    """A normalization over the last axis.

    It holds ``prefix + weight`` and ``prefix + bias`` of ``tensors`` without copying them.
    """
    weight = tensors[prefix + "weight"]
    module = nn.LayerNorm(weight.shape[0], eps=eps, device="meta")
    module.weight = nn.Parameter(weight)
    module.bias = nn.Parameter(tensors[prefix + "bias"])
    return module


def conv3x3(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A same-size 3x3 convolution that holds the given tensors without copying them."""
    outputs, inputs = weight.shape[:2]
    module = nn.Conv2d(inputs, outputs, 3, padding=1, device="meta")
    module.weight = nn.Parameter(weight)
    module.bias = nn.Parameter(bias)
    return module


def conv2d(
    weight: Tensor, bias: Tensor | None = None, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution with an odd kernel and half of it as padding, in FP32."""
    outputs, inputs, kernel, _ = weight.shape
    module = nn.Conv2d(
        inputs * groups, outputs, kernel, stride, kernel // 2, groups=groups, device="meta"
    )
    module.weight = nn.Parameter(weight.float())
    module.bias = None if bias is None else nn.Parameter(bias.float())
    return module


def normalized_conv(
    tensors: Mapping[str, Tensor], conv: str, norm: str, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias and the batch normalization after it, as one convolution.

    Args:
        tensors: parameters.
        conv: prefix of the convolution.
        norm: prefix of the normalization.
        stride: of the convolution.
        groups: of the convolution.
    """
    scale, shift = folding.batch_norm(tensors, norm)
    weight = tensors[conv + "weight"].double() * scale[:, None, None, None]
    return conv2d(weight, shift, stride, groups)


def folded_conv(
    tensors: Mapping[str, Tensor], prefix: str, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """:func:`normalized_conv` where the two are called ``c`` and ``bn``."""
    return normalized_conv(tensors, prefix + "c.", prefix + "bn.", stride, groups)


class Linear(nn.Module):
    """``x @ matrix + bias``; the matrix is [inputs, outputs] and may have batch axes."""

    def __init__(self, matrix: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.float())
        self.bias = nn.Parameter(bias.float())

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.matrix) + self.bias


def count_children(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many consecutive integers 0, 1, ... follow ``prefix`` in the tensor names."""
    children = (name[len(prefix) :].split(".", 1)[0] for name in tensors if name.startswith(prefix))
    found = {int(child) for child in children if child.isdecimal()}
    count = len(found)
    if found != set(range(count)):
        raise KeyError(f"tensor names under {prefix!r} are not numbered 0..{count - 1}")
    return count
