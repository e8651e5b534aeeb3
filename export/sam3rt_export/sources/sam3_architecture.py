"""Read a SAM 3's sizes off the shapes of its tensors."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint_keys import DECODER, NECK, NO_MEMORY, PROMPT, TRUNK
from ..errors import CheckpointError, ModelError
from ..graphs.sam3_encoder import Sam3Architecture, axial_rope

# The reference builds its ViT with nn.LayerNorm at eps=1e-5 (sam3/model/vitdet.py); no tensor
# says so. transformers' default of 1e-6 is visibly further from the reference's outputs.
REFERENCE_LAYER_NORM_EPS = 1e-5

# A table stored in BF16 is off by 0.004, one from another formula by whole radians.
_ROPE_TOLERANCE = 1e-2


def read_architecture(tensors: Mapping[str, Tensor]) -> Sam3Architecture:
    """Work out the architecture of tensors in ``sam3.pt`` naming.

    The rotary tables stored with each block tell windowed blocks from global ones: a table has
    one row per token that attends together, and half a head's channels as columns. Without any
    table, only the published size is known.

    Raises:
        ModelError: a needed tensor is missing or the shapes contradict each other.
    """
    embed_dim, _, patch_size, _ = _tensor(tensors, TRUNK + "patch_embed.proj.weight", 4).shape
    depth = _depth(tensors)
    positions = _tensor(tensors, TRUNK + "pos_embed", 3).shape[1] - 1
    pretrain_grid = _square_root(positions, "pos_embed")
    names = [f"{TRUNK}blocks.{i}.attn.freqs_cis" for i in range(depth)]
    if not any(name in tensors for name in names):
        if (embed_dim, depth, patch_size, pretrain_grid) != (1024, 32, 14, 24):
            raise ModelError(
                f"tensor {names[0]!r} is missing: without rotary tables only SAM 3's published "
                f"size is known, and this is width {embed_dim}, depth {depth}"
            )
        tensors = {**tensors, **_published_tables(names)}
    tables = [_tensor(tensors, name, 2) for name in names]
    sides = [
        _square_root(table.shape[0], f"blocks.{i}.attn.freqs_cis") for i, table in enumerate(tables)
    ]
    grid, window = max(sides), min(sides)
    if set(sides) - {grid, window}:
        raise ModelError(f"attention maps of more than two sizes: {sorted(set(sides))}")
    head_dim = 2 * tables[0].shape[1]
    if embed_dim % head_dim:
        raise ModelError(f"width {embed_dim} is not a multiple of the head size {head_dim}")
    decoder_mlp = _tensor(tensors, DECODER + "transformer.layers.0.mlp.lin1.weight", 2)
    architecture = Sam3Architecture(
        image_size=grid * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // head_dim,
        mlp_dim=_tensor(tensors, TRUNK + "blocks.0.mlp.fc1.weight", 2).shape[0],
        window=window,
        global_blocks=tuple(i for i, side in enumerate(sides) if side == grid),
        pretrain_grid=pretrain_grid,
        fpn_dim=_tensor(tensors, NECK + "2.conv_3x3.weight", 4).shape[0],
        decoder_mlp_dim=decoder_mlp.shape[0],
        mask_channels=_tensor(tensors, PROMPT + "mask_downscaling.6.weight", 4).shape[1],
        layer_norm_eps=REFERENCE_LAYER_NORM_EPS,
    )
    check_architecture(architecture)
    _check_rope(architecture, tables)
    _tensor(tensors, NO_MEMORY, 3)
    return architecture


def resized(architecture: Sam3Architecture, image_size: int | None) -> Sam3Architecture:
    """The same model for another input size.

    Windows keep their size, so that the size must be whole windows. Absolute positions are tiled
    over the grid and rotary ones of global blocks squeezed to a window's range, as for any size.

    Args:
        architecture: as it was trained.
        image_size: side of the input, pixels; ``None`` leaves it.

    Raises:
        CheckpointError: that is no size of this model.
    """
    if image_size is None:
        return architecture
    arch = architecture
    check_image_size(image_size, arch.patch_size * arch.window, arch.image_size)
    return dataclasses.replace(arch, image_size=image_size)


def check_image_size(image_size: int, step: int, trained: int) -> None:
    """Refuse an input size that is no multiple of a step, up to the size of the training.

    Raises:
        CheckpointError: naming the sizes that are accepted.
    """
    sizes = range(step, trained + 1, step)
    if image_size not in sizes:
        accepted = ", ".join(map(str, sizes))
        raise CheckpointError(f"image_size: got {image_size}, expected one of {accepted}")


def _published_tables(names: list[str]) -> dict[str, Tensor]:
    """The published SAM 3's tables: windows of 24 tokens, a grid of 72 in every eighth block."""
    windowed, everywhere = (
        torch.complex(*axial_rope(side, 64, 10000.0, 24 / side)) for side in (24, 72)
    )
    return {name: everywhere if i % 8 == 7 else windowed for i, name in enumerate(names)}


def check_architecture(architecture: Sam3Architecture) -> None:
    """Refuse what the encoder graph cannot express.

    Raises:
        ModelError: the windows do not tile the token grid, or a head cannot be rotated.
    """
    if architecture.grid % architecture.window:
        raise ModelError(
            f"windows of {architecture.window} tokens do not tile a grid of {architecture.grid}"
        )
    if architecture.head_dim % 4:
        raise ModelError(
            f"heads of {architecture.head_dim} channels: two-dimensional RoPE needs a multiple of 4"
        )


def _check_rope(architecture: Sam3Architecture, tables: list[Tensor]) -> None:
    for index, table in enumerate(tables):
        whole = index in architecture.global_blocks
        side = architecture.grid if whole else architecture.window
        cos, sin = axial_rope(
            side, architecture.head_dim, architecture.rope_theta, architecture.window / side
        )
        if table.shape != cos.shape or not torch.is_complex(table):
            raise ModelError(
                f"blocks.{index}.attn.freqs_cis is {table.dtype} {tuple(table.shape)}, "
                f"expected complex {tuple(cos.shape)}"
            )
        error = max(float((table.real - cos).abs().max()), float((table.imag - sin).abs().max()))
        if not error <= _ROPE_TOLERANCE:
            raise ModelError(
                f"blocks.{index}.attn.freqs_cis differs from SAM 3's axial RoPE by {error:.3g}: "
                "this checkpoint uses other rotary positions"
            )


def _depth(tensors: Mapping[str, Tensor]) -> int:
    numbers = set()
    for name in tensors:
        match = re.match(re.escape(TRUNK) + r"blocks\.(\d+)\.", name)
        if match:
            numbers.add(int(match.group(1)))
    if not numbers or numbers != set(range(len(numbers))):
        raise ModelError(f"transformer blocks are numbered {sorted(numbers)}")
    return len(numbers)


def _tensor(tensors: Mapping[str, Tensor], name: str, axes: int) -> Tensor:
    if name not in tensors:
        raise ModelError(
            f"tensor {name!r} is missing: this is no SAM 3 with an interactive tracker"
        )
    tensor = tensors[name]
    if tensor.ndim != axes or 0 in tensor.shape:
        raise ModelError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {axes} axes, none empty"
        )
    return tensor


def _square_root(count: int, what: str) -> int:
    side: int = math.isqrt(count)
    if side * side != count:
        raise ModelError(f"{what} covers {count} tokens, which is not a square")
    return side
