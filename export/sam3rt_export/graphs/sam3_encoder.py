"""SAM 3's image encoder as a graph that ONNX runtimes and TensorRT take well.

The arithmetic is that of the reference (``detector.backbone.vision_backbone`` with the
tracker's ``sam2_convs`` neck), rearranged without changing a result:

* Tokens stay in window order from the patch embedding to the neck. Attention does not care
  about the order of its tokens as long as the position tables share it, so windowed blocks
  need a reshape where the reference partitions and unpartitions.
* Q, K and V are a matmul each, so that none is cut out of a larger result; the softmax
  scale is part of Q's weights.
* RoPE is real-valued, on (real, imaginary) halves, in the form that runtimes have a kernel for.
* The neck (:mod:`.sam3_neck`) is folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint_keys import TRUNK
from . import folding
from .operators import Linear, gelu, layer_norm, regroup, split_heads
from .sam3_neck import Sam3Neck


@dataclass(frozen=True)
class Sam3Architecture:
    """Sizes of one SAM 3 interactive model.

    Attributes:
        image_size: side of the square input, pixels.
        patch_size: side of one token, pixels.
        embed_dim: width of the ViT.
        depth: transformer blocks.
        num_heads: attention heads per block.
        mlp_dim: hidden width of the ViT's MLPs.
        window: side of an attention window, tokens.
        global_blocks: indexes of the blocks that attend to the whole image.
        pretrain_grid: side of the learned position grid, tokens; it is tiled over the image.
        fpn_dim: channels of the neck and of the decoder.
        decoder_mlp_dim: hidden width of the decoder's MLPs.
        decoder_heads: attention heads of the two-way transformer.
        mask_channels: channels of the mask prompt before its last projection.
        rope_theta: frequency base of the rotary embedding.
        layer_norm_eps: epsilon of the ViT's normalizations.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    window: int
    global_blocks: tuple[int, ...]
    pretrain_grid: int
    fpn_dim: int
    decoder_mlp_dim: int
    decoder_heads: int = 8
    mask_channels: int = 16
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Channels per ViT attention head."""
        return self.embed_dim // self.num_heads


def window_order(grid: int, window: int) -> Tensor:
    """Row-major token indices of a ``grid`` x ``grid`` map, listed window by window.

    Returns:
        int64 [grid*grid].
    """
    index = torch.arange(grid * grid).reshape(grid // window, window, grid // window, window)
    return index.permute(0, 2, 1, 3).reshape(-1)


def axial_rope(side: int, head_dim: int, theta: float, scale: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of SAM 3's two-dimensional rotary embedding.

    The first half of a head's complex channels turns with x, the second with y
    (``compute_axial_cis`` of the reference).

    Args:
        side: the attention map is ``side`` x ``side`` tokens, row by row.
        head_dim: channels per head.
        theta: the frequency base, 10000 in SAM 3.
        scale: factor on the positions; global blocks are squeezed to the window's range.

    Returns:
        Two float32 [side*side, head_dim // 2].
    """
    frequencies = 1.0 / (
        theta ** (torch.arange(0, head_dim, 4)[: head_dim // 4].float() / head_dim)
    )
    position = torch.arange(side * side)
    x = (position % side).float() * scale
    y = torch.div(position, side, rounding_mode="floor").float() * scale
    angle = torch.cat([torch.outer(x, frequencies), torch.outer(y, frequencies)], dim=-1)
    return torch.cos(angle), torch.sin(angle)


class RotaryAttention(nn.Module):
    """Multi-head attention over groups of ``tokens`` tokens with rotary positions."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        prefix: str,
        heads: int,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        super().__init__()
        weight, bias = tensors[prefix + "qkv.weight"], tensors[prefix + "qkv.bias"]
        self.width = weight.shape[1]
        self.heads = heads
        self.head_dim = self.width // heads
        self.tokens = cos.shape[0]
        scale = self.head_dim**-0.5
        q, k, v = weight.chunk(3)
        q_bias, k_bias, v_bias = bias.chunk(3)

        def halves(rows: Tensor) -> Tensor:
            return folding.rope_halves(rows, self.head_dim)

        self.q = Linear(halves(q).T * scale, halves(q_bias) * scale)
        self.k = Linear(halves(k).T, halves(k_bias))
        self.v = Linear(v.T, v_bias)
        self.out = linear(tensors, prefix + "proj")
        # For either half, and for all groups and heads.
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.cat([cos, cos], dim=1)[None, None], persistent=False)
        self.register_buffer("sin", torch.cat([sin, sin], dim=1)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, T, C] with T a multiple of ``tokens``, to the same shape."""
        q, k = self.rotate(self.per_head(self.q(x))), self.rotate(self.per_head(self.k(x)))
        scores = torch.matmul(q, k.transpose(2, 3))
        mixed = torch.matmul(torch.softmax(scores, dim=-1), self.per_head(self.v(x)))
        return self.out(regroup(mixed.permute(0, 2, 1, 3), -1, x.shape[1], self.width))

    def per_head(self, x: Tensor) -> Tensor:
        return split_heads(x, self.tokens, self.heads, self.head_dim)

    def rotate(self, x: Tensor) -> Tensor:
        """Turn [groups, heads, tokens, (real, imaginary)] by each token's position.

        Written as OpenVINO recognizes it (its ``RoPEFusionGPTNEOX``) and fuses it to one pass.
        """
        real, imaginary = x.split([self.head_dim // 2] * 2, dim=-1)
        turned = torch.cat([imaginary * -1.0, real], dim=-1)
        return x * self.cos + turned * self.sin


class Block(nn.Module):
    """One pre-norm transformer block of the ViT."""

    def __init__(
        self, tensors: Mapping[str, Tensor], prefix: str, attention: RotaryAttention, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(tensors, prefix + "norm1.", eps)
        self.attention = attention
        self.norm2 = layer_norm(tensors, prefix + "norm2.", eps)
        self.fc1 = linear(tensors, prefix + "mlp.fc1")
        self.fc2 = linear(tensors, prefix + "mlp.fc2")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


def linear(tensors: Mapping[str, Tensor], name: str) -> Linear:
    """The linear layer ``name``, its weight transposed without copying."""
    return Linear(tensors[name + ".weight"].T, tensors[name + ".bias"])


class Sam3EncoderGraph(Sam3Neck):
    """Normalized pixels to the three feature maps the decoder reads.

    ``no_mem_embed`` and the decoder's ``conv_s0``/``conv_s1`` are already applied, as the
    reference predictor does once per image.
    """

    def __init__(self, architecture: Sam3Architecture, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(architecture.grid, tensors)
        arch = architecture
        self.window, self.width = arch.window, arch.embed_dim
        order = window_order(arch.grid, arch.window)

        self.patch = nn.Conv2d(
            3, arch.embed_dim, arch.patch_size, stride=arch.patch_size, bias=False, device="meta"
        )
        self.patch.weight = nn.Parameter(tensors[TRUNK + "patch_embed.proj.weight"])
        self.positions: Tensor
        self.register_buffer(
            "positions", self._tiled_positions(arch, tensors)[order][None], persistent=False
        )
        self.norm = layer_norm(tensors, TRUNK + "ln_pre.", arch.layer_norm_eps)

        windowed = axial_rope(arch.window, arch.head_dim, arch.rope_theta, 1.0)
        everywhere = axial_rope(arch.grid, arch.head_dim, arch.rope_theta, arch.window / arch.grid)
        everywhere = (everywhere[0][order], everywhere[1][order])
        self.blocks = nn.ModuleList()
        for index in range(arch.depth):
            prefix = f"{TRUNK}blocks.{index}."
            tables = everywhere if index in arch.global_blocks else windowed
            attention = RotaryAttention(tensors, prefix + "attn.", arch.num_heads, *tables)
            self.blocks.append(Block(tensors, prefix, attention, arch.layer_norm_eps))

    @staticmethod
    def _tiled_positions(arch: Sam3Architecture, tensors: Mapping[str, Tensor]) -> Tensor:
        """Absolute positions of the pretraining grid, repeated (not interpolated) over ours."""
        table = tensors[TRUNK + "pos_embed"][0, 1:]
        side = round(table.shape[0] ** 0.5)
        repeats = -(-arch.grid // side)
        tiled = table.reshape(side, side, -1).tile(repeats, repeats, 1)
        return tiled[: arch.grid, : arch.grid].reshape(arch.grid**2, -1)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [B, 3, S, S] to float32 [B, 32, 4G, 4G], [B, 64, 2G, 2G], [B, 256, G, G].

        The channel counts are SAM 3's; G is the token grid, S / patch size.
        """
        grid, window, count = self.grid, self.window, self.grid // self.window
        x = self.patch(pixel_values)
        x = regroup(x, -1, self.width, count, window, count, window)
        x = regroup(x.permute(0, 2, 4, 3, 5, 1), -1, grid * grid, self.width)
        x = self.norm(x + self.positions)
        for block in self.blocks:
            x = block(x)
        x = regroup(x, -1, count, count, window, window, self.width)
        x = regroup(x.permute(0, 1, 3, 2, 4, 5), -1, grid * grid, self.width)
        return self.feature_maps(x)
