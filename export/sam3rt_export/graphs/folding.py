"""Exact algebra that merges neighbouring linear operators.

Every function takes and returns plain weight tensors, computes in float64 and rounds to
float32 once, so that folding costs no more than the rounding of the folded weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The default of PyTorch, which every model here keeps.
_BATCH_NORM_EPS = 1e-5


def batch_norm(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """A batch normalization in evaluation, ``x * scale + shift``, as float64 [C] and [C].

    Args:
        tensors: parameters.
        prefix: what ``weight``, ``bias``, ``running_mean`` and ``running_var`` stand below.
    """
    variance = tensors[prefix + "running_var"].double()
    scale = tensors[prefix + "weight"].double() / torch.sqrt(variance + _BATCH_NORM_EPS)
    return scale, tensors[prefix + "bias"].double() - tensors[prefix + "running_mean"] * scale


def pointwise_after_conv(
    weight: Tensor, bias: Tensor, outer_weight: Tensor, outer_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge ``conv1x1(conv(x))`` into one convolution.

    Args:
        weight: float32 [M, I, kH, kW], the inner convolution.
        bias: float32 [M].
        outer_weight: float32 [O, M, 1, 1], the pointwise convolution after it.
        outer_bias: float32 [O].

    Returns:
        float32 [O, I, kH, kW] and [O].
    """
    outer = outer_weight.double().flatten(1)
    merged = torch.einsum("om,mikl->oikl", outer, weight.double())
    merged_bias = outer @ bias.double() + outer_bias.double()
    return merged.float(), merged_bias.float()


def pointwise_after_transposed(
    weight: Tensor, bias: Tensor, outer_weight: Tensor, outer_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge ``conv1x1(conv_transpose(x))`` into one transposed convolution.

    Args:
        weight: float32 [I, M, kH, kW], the transposed convolution.
        bias: float32 [M].
        outer_weight: float32 [O, M, 1, 1].
        outer_bias: float32 [O].

    Returns:
        float32 [I, O, kH, kW] and [O].
    """
    swapped = weight.transpose(0, 1)
    merged, merged_bias = pointwise_after_conv(swapped, bias, outer_weight, outer_bias)
    return merged.transpose(0, 1), merged_bias


def transposed_2x2_as_matrix(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution with stride 2 is one matmul per input pixel.

    Its output pixels never overlap, so ``out[2y+i, 2x+j] = in[y, x] @ weight[:, :, i, j]``.

    Args:
        weight: float32 [I, O, 2, 2].
        bias: float32 [O].

    Returns:
        float32 matrix [I, 4*O] whose columns are ordered (i, j, o), and its bias [4*O].
    """
    inputs, outputs = weight.shape[:2]
    matrix = weight.permute(0, 2, 3, 1).reshape(inputs, 4 * outputs).contiguous()
    return matrix, bias.repeat(4)


def rope_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the output rows of a Q or K projection from pairs to halves within each head.

    The reference rotates neighbouring channels (2i, 2i+1) as one complex number. Applying one
    permutation to the channels of both Q and K leaves every dot product as it was, and with all
    real parts first the rotation needs no interleaving.

    Args:
        weight: float32 [heads*head_dim, ...], a projection's weight or bias.
        head_dim: channels per head, even.

    Returns:
        The same values, each head's rows ordered (real parts, imaginary parts).
    """
    rest = weight.shape[1:]
    split = weight.reshape(-1, head_dim // 2, 2, *rest)
    return split.transpose(1, 2).reshape(weight.shape)
