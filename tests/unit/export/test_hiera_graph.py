"""SAM 2's image encoder as a graph: its parts, and the whole of it against transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.support.export_helpers import canonical_tensors, relative, sam2_state
from torch import Tensor
from torch.nn import functional as F

from sam3rt_export.checkpoint_keys import SAM2_TRUNK
from sam3rt_export.graphs.hiera import (
    HieraArchitecture,
    HieraGraph,
    Positions,
    plan_blocks,
    pool,
    reorder,
    rows_of_windows,
    windows_of_rows,
)
from sam3rt_export.references.transformers_sam2 import Sam2Reference, build_sam2_model
from sam3rt_export.sources.sam2 import PUBLISHED


def hiera(**changes: object) -> HieraArchitecture:
    """A small encoder of 64 pixels, whose maps are 16, 8, 4 and 2 tokens wide."""
    plain = HieraArchitecture(
        image_size=64,
        depths=(1, 2, 3, 1),
        widths=(8, 16, 32, 64),
        heads=(1, 2, 4, 8),
        windows=(4, 2, 4, 2),
        global_blocks=(4,),
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def tensors_of(architecture: HieraArchitecture) -> dict[str, Tensor]:
    return canonical_tensors(sam2_state(architecture), "a tiny SAM 2")


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "window"), [(8, 2), (8, 4), (8, 8), (8, 1), (6, 3)])
def test_window_order_and_back(side: int, window: int) -> None:
    rows = torch.arange(2 * side * side * 3).reshape(2, side * side, 3)
    windows = windows_of_rows(rows, side, window)
    first = rows.reshape(2, side, side, 3)[:, :window, :window].reshape(2, window * window, 3)
    assert torch.equal(windows[:, : window * window], first)
    assert torch.equal(rows_of_windows(windows, side, window), rows)


@pytest.mark.parametrize("old", [1, 2, 4, 8])
@pytest.mark.parametrize("new", [1, 2, 4, 8])
def test_any_order_to_any_other(old: int, new: int) -> None:
    rows = torch.arange(64)[None, :, None]
    listed = windows_of_rows(rows, 8, old)
    assert torch.equal(reorder(listed, 8, old, new), windows_of_rows(rows, 8, new))


@pytest.mark.parametrize("window", [2, 4, 8])
def test_pooling_is_the_largest_of_each_cell(window: int) -> None:
    rows = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0))
    pooled = pool(windows_of_rows(rows, 8, window), window).reshape(2, 16, 3)
    image = F.max_pool2d(rows.transpose(1, 2).reshape(2, 3, 8, 8), 2)
    expected = windows_of_rows(image.flatten(2).transpose(1, 2), 4, window // 2)
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize(("grid", "window"), [(3, 4), (7, 8), (14, 8)])
def test_positions_are_the_references(grid: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(1, 6, grid, grid, generator=generator)
    small = torch.randn(1, 6, window, window, generator=generator)
    tensors = {SAM2_TRUNK + "pos_embed": large, SAM2_TRUNK + "pos_embed_window": small}
    found = Positions(tensors, 32)()
    expected = F.interpolate(large, size=(32, 32), mode="bicubic")
    expected = expected + small.tile(1, 1, 32 // window, 32 // window)
    expected = windows_of_rows(expected.flatten(2).transpose(1, 2), 32, window)
    assert relative(found, expected) < 1e-6


def test_few_blocks_move_tokens() -> None:
    moving = {
        size: sum(b.order != b.inner for stage in plan_blocks(arch) for b in stage)
        for size, arch in PUBLISHED.values()
    }
    # From the second stage's windows to the third's; to rows, for windows that do not tile the map.
    assert moving == dict.fromkeys(("tiny", "small", "base_plus", "large"), 1)


# --- the whole ------------------------------------------------------------------------------------

ARCHITECTURES = {
    "windows that tile": hiera(),
    "windows that do not, as in tiny": hiera(image_size=128, windows=(4, 2, 6, 3)),
    "all of them padded": hiera(windows=(4, 6, 6, 3)),
    "windows as large as the map": hiera(windows=(4, 8, 4, 2)),
    "global from the start": hiera(global_blocks=(0, 2)),
    "windows of one": hiera(windows=(4, 2, 2, 1), depths=(1, 2, 3, 2)),
    "nothing global": hiera(global_blocks=()),
    "two heads, deeper": hiera(depths=(2, 3, 4, 3), heads=(2, 4, 8, 16), global_blocks=(6, 8)),
    "another epsilon": hiera(layer_norm_eps=1e-3),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_encoder_equals_transformers(name: str) -> None:
    architecture = ARCHITECTURES[name]
    tensors = tensors_of(architecture)
    side = architecture.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = Sam2Reference(build_sam2_model(architecture, tensors)).encode(pixels)
    found = HieraGraph(architecture, tensors).eval()(pixels)
    assert [tuple(f.shape[1:]) for f in found] == [
        (4, side // 4, side // 4),
        (8, side // 8, side // 8),
        (32, side // 16, side // 16),
    ]
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


KINDS = [
    "trunk.pos_embed",
    "trunk.pos_embed_window",
    "trunk.patch_embed.proj.bias",
    "trunk.blocks.1.proj.weight",
    "trunk.blocks.2.norm1.bias",
    "trunk.blocks.3.attn.qkv.weight",
    "trunk.blocks.4.attn.qkv.bias",
    "trunk.blocks.5.attn.proj.bias",
    "trunk.blocks.6.norm2.weight",
    "trunk.blocks.6.mlp.layers.0.bias",
    "trunk.blocks.0.mlp.layers.1.weight",
    *(f"neck.convs.{level}.conv.{leaf}" for level in range(4) for leaf in ("weight", "bias")),
]


@torch.no_grad()
def test_every_kind_of_parameter_reaches_the_features() -> None:
    architecture = hiera(image_size=128, windows=(4, 2, 6, 3))
    tensors = tensors_of(architecture)
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    plain = HieraGraph(architecture, tensors)(pixels)
    for kind in KINDS:
        name = f"image_encoder.{kind}"
        generator = torch.Generator().manual_seed(2)
        moved = tensors[name] + 0.1 * torch.randn(tensors[name].shape, generator=generator)
        changed = HieraGraph(architecture, {**tensors, name: moved})(pixels)
        assert max(relative(a, b) for a, b in zip(changed, plain, strict=True)) > 1e-4, name
