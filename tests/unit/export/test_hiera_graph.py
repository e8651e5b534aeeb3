"""SAM 2's image encoder as a graph, against transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.support.export_helpers import canonical_tensors, relative, sam2_state
from torch import Tensor

from sam3rt_export.graphs.hiera import (
    HieraArchitecture,
    HieraGraph,
    plan_blocks,
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


def test_few_blocks_move_tokens() -> None:
    moving = {
        size: sum(b.order != b.inner for stage in plan_blocks(arch) for b in stage)
        for size, arch in PUBLISHED.values()
    }
    # From the second stage's windows to the third's; to rows, for windows that do not tile the map.
    assert moving == dict.fromkeys(("tiny", "small", "base_plus", "large"), 1)


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
