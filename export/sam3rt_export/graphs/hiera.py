"""SAM 2's image encoder (Hiera with an FPN neck) as a graph.

The arithmetic is that of the reference (``sam2/modeling/backbones``), rearranged without changing a
result:

* Tokens stay in window order wherever the windows tile the map. A block that pools its queries
  halves the windows, and the next stage's windows are mostly those, so that few blocks move tokens.
* Where windows do not tile the map it is padded after the normalization, as in the reference: the
  padding takes part in the attention.
* Q, K and V are one matmul, or the 48 blocks of the largest model would have too many nodes. The
  softmax scale is part of Q's weights: pooling takes a maximum, which a positive factor passes.
* The neck's 1x1 convolutions and the decoder's ``conv_s0`` and ``conv_s1`` are one matmul a level.
  The coarsest level is added to the next by broadcasting, which is its upsampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint_keys import DECODER, NO_MEMORY, SAM2_NECK, SAM2_TRUNK
from . import folding
from .operators import Linear, gelu, layer_norm, regroup, split_heads
from .sam3_encoder import linear

# The patch convolution's, and how much smaller than the input the first stage is.
PATCH_STRIDE = 4
_PATCH_PADDING = 3


@dataclass(frozen=True)
class HieraArchitecture:
    """Sizes of one SAM 2 image encoder.

    Attributes:
        image_size: side of the square input, pixels.
        depths: blocks of each of the four stages.
        widths: channels of each stage.
        heads: attention heads of each stage.
        windows: side of each stage's attention windows, tokens. A stage's first block still has
            those of the stage before.
        global_blocks: indexes of the blocks that attend to the whole map.
        layer_norm_eps: epsilon of the normalizations.
    """

    image_size: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    global_blocks: tuple[int, ...]
    layer_norm_eps: float = 1e-6

    def side(self, stage: int) -> int:
        """Side of a stage's map, tokens."""
        return self.image_size // PATCH_STRIDE // 2**stage

    @property
    def grid(self) -> int:
        """Side of the image embedding, which is the third stage's."""
        return self.side(2)


@dataclass(frozen=True)
class BlockPlan:
    """Where one block stands.

    Attributes:
        heads: attention heads.
        side: side of the map that the block reads.
        window: side of its attention windows; ``side`` for the whole map.
        order: tokens come listed window by window, of windows of this side; ``side`` for row by
            row.
        pools: whether it halves the map; its windows are even then.
    """

    heads: int
    side: int
    window: int
    order: int
    pools: bool

    @property
    def padded(self) -> int:
        """Side of the map in whole windows."""
        return -(-self.side // self.window) * self.window

    @property
    def is_padded(self) -> bool:
        """Whether the windows do not tile the map."""
        return self.padded != self.side

    @property
    def inner(self) -> int:
        """The order in which the block works. Attention to a whole map takes any."""
        if self.window == self.side and not self.pools:
            return self.order
        return self.side if self.is_padded else self.window

    @property
    def side_out(self) -> int:
        """Side of the map that the block yields."""
        return self.side // 2 if self.pools else self.side

    @property
    def order_out(self) -> int:
        """The order of the tokens that it yields."""
        return self.inner // 2 if self.pools else self.inner


def plan_blocks(architecture: HieraArchitecture) -> list[list[BlockPlan]]:
    """The blocks of each stage."""
    arch = architecture
    order, index = arch.windows[0], 0
    stages = []
    for stage, depth in enumerate(arch.depths):
        blocks: list[BlockPlan] = []
        for position in range(depth):
            pools = stage > 0 and position == 0
            lagging = stage - 1 if pools else stage
            side = arch.side(lagging)
            window = side if index in arch.global_blocks else arch.windows[lagging]
            blocks.append(BlockPlan(arch.heads[stage], side, window, order, pools))
            order = blocks[-1].order_out
            index += 1
        stages.append(blocks)
    return stages


def reorder(x: Tensor, side: int, old: int, new: int) -> Tensor:
    """Tokens [B, side^2, C] of windows of one side, listed by windows of another."""
    if old == new:
        return x
    if old != side:
        x = rows_of_windows(x, side, old)
    return windows_of_rows(x, side, new) if new != side else x


def rows_of_windows(x: Tensor, side: int, window: int) -> Tensor:
    """Tokens [..., C] listed window by window, to row by row, [B, side^2, C]."""
    count, width = side // window, x.shape[-1]
    x = regroup(x, -1, count, count, window, window, width).permute(0, 1, 3, 2, 4, 5)
    return regroup(x, -1, side * side, width)


def windows_of_rows(x: Tensor, side: int, window: int) -> Tensor:
    """The inverse of :func:`rows_of_windows`."""
    count, width = side // window, x.shape[-1]
    x = regroup(x, -1, count, window, count, window, width).permute(0, 1, 3, 2, 4, 5)
    return regroup(x, -1, side * side, width)


def pool(x: Tensor, window: int) -> Tensor:
    """The largest of each 2x2 cell, of tokens [..., C] listed by windows of an even side.

    Returns:
        [windows, (window / 2)^2, C]. One axis at a time, which runtimes have fast kernels for.
    """
    half, width = window // 2, x.shape[-1]
    x = regroup(x, -1, half, 2, window * width).amax(dim=2)
    return regroup(regroup(x, -1, half, half, 2, width).amax(dim=3), -1, half * half, width)


class HieraAttention(nn.Module):
    """Multi-head attention among the tokens of one window; at a stage's start, queries pooled."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, plan: BlockPlan) -> None:
        super().__init__()
        self.heads, self.pools = plan.heads, plan.pools
        self.tokens = plan.window**2
        self.queries = self.tokens // 4 if plan.pools else self.tokens
        self.window = plan.window
        self.rows = self.queries if plan.is_padded else plan.side_out**2
        weight, bias = tensors[prefix + "qkv.weight"], tensors[prefix + "qkv.bias"]
        self.width = weight.shape[0] // 3
        self.head_dim = self.width // plan.heads
        scale = torch.ones(3 * self.width)
        scale[: self.width] = self.head_dim**-0.5
        self.qkv = Linear(weight.T * scale, bias * scale)
        self.out = linear(tensors, prefix + "proj")

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., C] in whole windows, to [..., rows, C']."""
        heads = self.heads
        qkv = split_heads(self.qkv(x), self.tokens, 3 * heads, self.head_dim)
        q, k, v = qkv.split([heads, heads, heads], dim=1)
        if self.pools:
            q = regroup(pool(q, self.window), -1, heads, self.queries, self.head_dim)
        mixed = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)), dim=-1), v)
        return self.out(regroup(mixed.permute(0, 2, 1, 3), -1, self.rows, self.width))


class HieraBlock(nn.Module):
    """One pre-norm transformer block; at a stage's start it widens and halves the map."""

    def __init__(
        self, tensors: Mapping[str, Tensor], prefix: str, plan: BlockPlan, eps: float
    ) -> None:
        super().__init__()
        self.plan = plan
        self.norm1 = layer_norm(tensors, prefix + "norm1.", eps)
        self.attention = HieraAttention(tensors, prefix + "attn.", plan)
        self.width = self.attention.width
        widens = prefix + "proj.weight" in tensors
        self.shortcut = linear(tensors, prefix + "proj") if widens else None
        self.norm2 = layer_norm(tensors, prefix + "norm2.", eps)
        self.fc1 = linear(tensors, prefix + "mlp.layers.0")
        self.fc2 = linear(tensors, prefix + "mlp.layers.1")

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, side^2, C] in order ``order``, to [B, side_out^2, C'] in ``order_out``."""
        plan = self.plan
        x = reorder(x, plan.side, plan.order, plan.inner)
        y = self.norm1(x)
        if self.shortcut is not None:
            x = self.shortcut(y)
            if plan.pools:
                x = regroup(pool(x, plan.inner), -1, plan.side_out**2, self.width)
        x = x + self._attend(y)
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))

    def _attend(self, y: Tensor) -> Tensor:
        plan = self.plan
        if not plan.is_padded:
            attended: Tensor = self.attention(y)
            return attended
        side, more = plan.side, plan.padded - plan.side
        y = nn.functional.pad(regroup(y, -1, side, side, y.shape[-1]), (0, 0, 0, more, 0, more))
        y = self.attention(windows_of_rows(y, plan.padded, plan.window))
        shrink = 2 if plan.pools else 1
        padded, side = plan.padded // shrink, plan.side_out
        y = rows_of_windows(y, padded, plan.window // shrink)
        y = regroup(y, -1, padded, padded, self.width)[:, :side, :side]
        return regroup(y, -1, side * side, self.width)


class Positions(nn.Module):
    """Positions of the first stage's tokens, in window order, [1, side^2, C].

    A small grid, enlarged bicubically, and one window's positions in every window. Computed in the
    graph: runtimes do it once, when they load, and the file stays free of a table of some 30 MB.
    """

    def __init__(self, tensors: Mapping[str, Tensor], side: int) -> None:
        super().__init__()
        grid, window = tensors[SAM2_TRUNK + "pos_embed"], tensors[SAM2_TRUNK + "pos_embed_window"]
        self.width, self.side, self.window = grid.shape[1], side, window.shape[-1]
        self.grid = nn.Parameter(grid[0])
        self.inside = nn.Parameter(window.flatten(2).transpose(1, 2).contiguous())
        # Interpolation is linear: along an axis, it is the matrix that the unit vectors become.
        units = torch.eye(grid.shape[-1])[None, :, :, None]
        enlarged = nn.functional.interpolate(units, size=(side, 1), mode="bicubic")
        self.enlarge: Tensor
        self.register_buffer("enlarge", enlarged[0, :, :, 0].T.contiguous(), persistent=False)

    def forward(self) -> Tensor:
        count, window = self.side // self.window, self.window
        x = torch.matmul(torch.matmul(self.enlarge, self.grid), self.enlarge.T)
        x = regroup(x, self.width, count, window, count, window).permute(1, 3, 2, 4, 0)
        x = regroup(x, count * count, window * window, self.width) + self.inside
        return regroup(x, 1, self.side**2, self.width)


class HieraGraph(nn.Module):
    """Normalized pixels to the three feature maps the decoder reads.

    ``no_mem_embed`` and the decoder's ``conv_s0``/``conv_s1`` are already applied, as the
    reference predictor does once per image.
    """

    def __init__(self, architecture: HieraArchitecture, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        arch = self.architecture = architecture
        weight = tensors[SAM2_TRUNK + "patch_embed.proj.weight"]
        self.patch = nn.Conv2d(
            3, weight.shape[0], weight.shape[-1], PATCH_STRIDE, _PATCH_PADDING, device="meta"
        )
        self.patch.weight = nn.Parameter(weight)
        self.patch.bias = nn.Parameter(tensors[SAM2_TRUNK + "patch_embed.proj.bias"])
        self.positions = Positions(tensors, arch.side(0))

        plans = plan_blocks(arch)
        self.blocks = nn.ModuleList(
            HieraBlock(tensors, f"{SAM2_TRUNK}blocks.{index}.", plan, arch.layer_norm_eps)
            for index, plan in enumerate(plan for stage in plans for plan in stage)
        )
        self.orders = [stage[-1].order_out for stage in plans]
        self._build_neck(tensors)

    def _build_neck(self, tensors: Mapping[str, Tensor]) -> None:
        def pair(name: str) -> tuple[Tensor, Tensor]:
            return tensors[name + ".weight"], tensors[name + ".bias"]

        def level(number: int) -> tuple[Tensor, Tensor]:
            return pair(f"{SAM2_NECK}{3 - number}.conv")  # the reference counts from the coarsest

        def as_matmul(weight: Tensor, bias: Tensor) -> Linear:
            return Linear(weight.flatten(1).T, bias)

        self.out0 = as_matmul(*folding.pointwise_after_conv(*level(0), *pair(DECODER + "conv_s0")))
        self.out1 = as_matmul(*folding.pointwise_after_conv(*level(1), *pair(DECODER + "conv_s1")))
        weight, bias = level(2)
        self.out2 = as_matmul(weight, bias + tensors[NO_MEMORY].flatten())
        self.project3 = as_matmul(*level(3))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [B, 3, S, S] to [B, 32, S/4, S/4], [B, 64, S/8, S/8], [B, 256, S/16, S/16].

        The channel counts are SAM 2's.
        """
        arch = self.architecture
        window = arch.windows[0]
        count = arch.side(0) // window
        x = regroup(self.patch(pixel_values), -1, arch.widths[0], count, window, count, window)
        x = regroup(x.permute(0, 2, 4, 3, 5, 1), -1, arch.side(0) ** 2, arch.widths[0])
        x = x + self.positions()
        stages = []
        ends = [sum(arch.depths[: stage + 1]) - 1 for stage in range(len(arch.depths))]
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in ends:
                stages.append(x)
        return (
            self._image(self.out0(stages[0]), 0),
            self._image(self.out1(stages[1]), 1),
            self._coarsest(stages[2], stages[3]),
        )

    def _image(self, x: Tensor, stage: int) -> Tensor:
        """Tokens of a stage [B, side^2, C] to [B, C, side, side]."""
        side, order, width = self.architecture.side(stage), self.orders[stage], x.shape[-1]
        count = side // order
        x = regroup(x, -1, count, count, order, order, width).permute(0, 5, 1, 3, 2, 4)
        return regroup(x, -1, width, side, side)

    def _coarsest(self, third: Tensor, fourth: Tensor) -> Tensor:
        side = self.architecture.side(3)
        x, above = self._image(self.out2(third), 2), self._image(self.project3(fourth), 3)
        width = x.shape[1]
        cells = regroup(x, -1, width, side, 2, side, 2)
        return regroup(cells + regroup(above, -1, width, side, 1, side, 1), -1, width, *x.shape[2:])
