"""Sizes read off the shapes of a checkpoint, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.support.export_helpers import (
    DECODER,
    NECK,
    NO_MEMORY,
    PROMPT,
    TRUNK,
    Mutation,
    TinySizes,
    keys,
    rope,
    small_tensors,
    stored_ropes,
    tiny_tensors,
)
from torch import Tensor

from sam3rt_export.errors import CheckpointError, tensors_of
from sam3rt_export.graphs.sam3_encoder import Sam3Architecture
from sam3rt_export.sources.sam3 import source_from_tensors
from sam3rt_export.sources.sam3_architecture import check_architecture, read_architecture

ROPE_0 = TRUNK + "blocks.0.attn.freqs_cis"
ROPE_1 = TRUNK + "blocks.1.attn.freqs_cis"

SMALL = Sam3Architecture(
    image_size=1008,
    patch_size=14,
    embed_dim=128,
    depth=4,
    num_heads=2,
    mlp_dim=592,
    window=24,
    global_blocks=(1, 3),
    pretrain_grid=24,
    fpn_dim=256,
    decoder_mlp_dim=2048,
    decoder_heads=8,
    mask_channels=16,
    rope_theta=10000.0,
    layer_norm_eps=1e-5,
)


def published_tensors() -> dict[str, Tensor]:
    """Names and shapes of the published SAM 3's interactive part, in almost no memory."""
    wider = {128: 1024, 384: 3072, 592: 4736, 64: 512, 32: 256}
    ropes = stored_ropes()
    tensors = {}
    for name, small in keys().items():
        shape = small
        if name.startswith((TRUNK, NECK)):
            shape = tuple(wider.get(side, side) for side in shape)
        if name.startswith(TRUNK + "blocks.") and not name.startswith(TRUNK + "blocks.0."):
            continue
        blocks = range(32) if name.startswith(TRUNK + "blocks.") else range(1)
        for block in blocks:
            own = name.replace("blocks.0.", f"blocks.{block}.")
            tensors[own] = torch.empty(1).expand(shape)
            if own.endswith("freqs_cis"):
                tensors[own] = ropes["global_" if block in (7, 15, 23, 31) else "window"]
    return tensors


def test_the_small_model() -> None:
    architecture = read_architecture(small_tensors())
    assert architecture == SMALL
    assert (architecture.grid, architecture.head_dim) == (72, 64)


def test_the_published_size() -> None:
    expected = dataclasses.replace(
        SMALL,
        embed_dim=1024,
        depth=32,
        num_heads=16,
        mlp_dim=4736,
        global_blocks=(7, 15, 23, 31),
    )
    architecture = read_architecture(published_tensors())
    assert architecture == expected
    assert (architecture.grid, architecture.head_dim) == (72, 64)


def test_the_published_size_needs_no_rotary_tables() -> None:
    tensors = published_tensors()
    expected = read_architecture(tensors)
    assert read_architecture({n: t for n, t in tensors.items() if "freqs_cis" not in n}) == expected


def test_other_sizes_need_their_rotary_tables() -> None:
    tensors = {n: t for n, t in tiny_tensors().items() if "freqs_cis" not in n}
    with pytest.raises(CheckpointError, match=r"freqs_cis.*published size.*width 16, depth 2"):
        read_architecture(tensors)


@pytest.mark.parametrize(
    "sizes",
    [
        TinySizes(),
        TinySizes(grid=6, window=3, pretrain=4, depth=5, global_blocks=(0, 4)),
        TinySizes(grid=6, window=2, depth=12, global_blocks=(2, 5, 8, 11)),
    ],
)
def test_other_sizes(sizes: TinySizes) -> None:
    architecture = read_architecture(tiny_tensors(sizes))
    assert architecture.grid == sizes.grid
    assert architecture.image_size == 2 * sizes.grid
    assert architecture.window == sizes.window
    assert architecture.depth == sizes.depth
    assert architecture.global_blocks == sizes.global_blocks
    assert architecture.pretrain_grid == sizes.pretrain
    assert (architecture.embed_dim, architecture.num_heads, architecture.mlp_dim) == (16, 2, 24)
    assert (architecture.fpn_dim, architecture.decoder_mlp_dim) == (32, 24)


@pytest.mark.parametrize(
    "name",
    [
        TRUNK + "patch_embed.proj.weight",
        TRUNK + "pos_embed",
        ROPE_1,
        TRUNK + "blocks.0.mlp.fc1.weight",
        NECK + "2.conv_3x3.weight",
        DECODER + "transformer.layers.0.mlp.lin1.weight",
        PROMPT + "mask_downscaling.6.weight",
        NO_MEMORY,
    ],
)
def test_a_missing_tensor_is_named(name: str) -> None:
    tensors = tiny_tensors()
    del tensors[name]
    with pytest.raises(CheckpointError) as caught:
        read_architecture(tensors)
    assert repr(name) in str(caught.value)


def renumber(old: int, new: int) -> Mutation:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"{TRUNK}blocks.{old}.")]:
            tensors[name.replace(f"blocks.{old}.", f"blocks.{new}.")] = tensors.pop(name)

    return change


def replace(name: str, tensor: Tensor) -> Mutation:
    return lambda tensors: tensors.update({name: tensor})


def drop_blocks(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.startswith(TRUNK + "blocks.")]:
        del tensors[name]


def third_size(tensors: dict[str, Tensor]) -> None:
    extra = {n.replace("blocks.0.", "blocks.2."): t for n, t in tensors.items() if "blocks.0." in n}
    tensors |= extra | {TRUNK + "blocks.2.attn.freqs_cis": rope(3, 8, 1.0)}


REFUSALS: dict[str, tuple[Mutation, str]] = {
    "blocks with a gap": (renumber(1, 2), r"numbered \[0, 2\]"),
    "blocks from one": (renumber(0, 7), r"numbered \[1, 7\]"),
    "no blocks": (drop_blocks, r"numbered \[\]"),
    "a table that is no square": (replace(ROPE_0, rope(3, 8, 1.0)[:5]), "5 tokens.*not a square"),
    "positions that are no square": (
        replace(TRUNK + "pos_embed", torch.zeros(1, 6, 16)),
        "pos_embed covers 5 tokens.*not a square",
    ),
    "three attention sizes": (third_size, r"more than two sizes: \[2, 3, 4\]"),
    "another frequency base": (
        replace(ROPE_1, rope(4, 8, 0.5, theta=500.0)),
        "blocks.1.*other rotary positions",
    ),
    "unscaled global positions": (
        replace(ROPE_1, rope(4, 8, 1.0)),
        "blocks.1.*other rotary positions",
    ),
    "y before x": (
        replace(ROPE_0, rope(2, 8, 1.0).roll(2, dims=1)),
        "blocks.0.*other rotary positions",
    ),
    "turned the other way": (
        replace(ROPE_0, rope(2, 8, 1.0).conj().resolve_conj()),
        "blocks.0.*other rotary positions",
    ),
    "a table with NaN": (
        replace(ROPE_0, torch.full((4, 4), complex(float("nan"), 0.0))),
        "blocks.0.*other rotary positions",
    ),
    "a real table": (replace(ROPE_0, rope(2, 8, 1.0).real.contiguous()), "expected complex"),
    "tables of two head sizes": (replace(ROPE_1, rope(4, 16, 0.5)), "blocks.1.*expected complex"),
    "a width that is no multiple of the head": (
        lambda t: t.update({ROPE_0: rope(2, 12, 1.0), ROPE_1: rope(4, 12, 0.5)}),
        "width 16 is not a multiple of the head size 12",
    ),
    "windows that do not tile": (
        lambda t: t.update({ROPE_0: rope(3, 8, 1.0), ROPE_1: rope(4, 8, 0.75)}),
        "windows of 3 tokens do not tile a grid of 4",
    ),
    "heads that cannot be rotated": (
        lambda t: t.update(
            {ROPE_0: torch.ones(4, 1, dtype=torch.complex64), ROPE_1: torch.ones(16, 1) + 0j}
        ),
        "heads of 2 channels",
    ),
    "a patch embedding of other rank": (
        replace(TRUNK + "patch_embed.proj.weight", torch.zeros(16, 3, 2)),
        "patch_embed.*expected 4",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_contradictions_are_refused(change: Mutation, message: str) -> None:
    tensors = tiny_tensors()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        read_architecture(tensors)


MALFORMED: dict[str, tuple[str, Tensor]] = {
    "a table without columns": (ROPE_0, torch.zeros(4, 0, dtype=torch.complex64)),
    "a table of one axis": (ROPE_0, torch.zeros(4, dtype=torch.complex64)),
    "a table without axes": (ROPE_0, torch.zeros((), dtype=torch.complex64)),
    "a table without rows": (ROPE_0, torch.zeros(0, 4, dtype=torch.complex64)),
    "positions of one axis": (TRUNK + "pos_embed", torch.zeros(5)),
    "positions without any": (TRUNK + "pos_embed", torch.zeros(1, 0, 16)),
    "an MLP weight without axes": (TRUNK + "blocks.0.mlp.fc1.weight", torch.zeros(())),
    "a neck weight without axes": (NECK + "2.conv_3x3.weight", torch.zeros(())),
    "a mask weight of one axis": (PROMPT + "mask_downscaling.6.weight", torch.zeros(32)),
    "an empty patch embedding": (TRUNK + "patch_embed.proj.weight", torch.zeros(16, 3, 0, 0)),
}


@pytest.mark.parametrize(("name", "tensor"), MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_tensors_are_refused_as_such(name: str, tensor: Tensor) -> None:
    """A checkpoint is untrusted: whatever its shapes, the answer is a refusal, not a crash."""
    with pytest.raises(CheckpointError), tensors_of("test"):
        source_from_tensors(tiny_tensors() | {name: tensor})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"window": 5}, "do not tile"), ({"embed_dim": 132}, "66 channels")],
)
def test_architectures_that_the_graph_cannot_express(changes: dict[str, int], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_architecture(dataclasses.replace(SMALL, **changes))
    check_architecture(SMALL)
