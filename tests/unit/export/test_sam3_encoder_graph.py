"""SAM 3's encoder graph on tiny models, and what its equality with others does not show."""

from __future__ import annotations

import pytest
import torch
from tests.support.export_helpers import (
    DECODER,
    NECK,
    NO_MEMORY,
    TRUNK,
    TinySizes,
    relative,
    stored_ropes,
    tiny_tensors,
)
from torch.nn import functional as F

from sam3rt_export.graphs import folding
from sam3rt_export.graphs.operators import gelu, layer_norm
from sam3rt_export.graphs.sam3_encoder import (
    Sam3EncoderGraph,
    axial_rope,
)
from sam3rt_export.references.transformers_sam3 import TransformersReference, build_tracker_model
from sam3rt_export.sources.sam3_architecture import read_architecture

# --- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_gelu_is_torchs_exact_one(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.linspace(-12.0, 12.0, 10001, dtype=dtype)
    assert float((gelu(x) - F.gelu(x)).abs().max()) < tolerance
    assert float((gelu(x) - F.gelu(x, approximate="tanh")).abs().max()) > 1e-4


def test_layer_norm_holds_the_given_tensors() -> None:
    weight, bias, x = torch.randn(6), torch.randn(6), torch.randn(4, 6)
    module = layer_norm({"n.weight": weight, "n.bias": bias}, "n.", 0.5)
    assert module.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(module(x), F.layer_norm(x, (6,), weight, bias, 0.5))


def test_folding_costs_one_rounding_of_the_folded_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 8, 3, 3), (256,), (4, 256, 1, 1), (4,))
    weight, bias, outer, outer_bias = (torch.randn(shape, generator=generator) for shape in shapes)
    merged, merged_bias = folding.pointwise_after_conv(weight, bias, outer, outer_bias)
    exact = torch.tensordot(outer.double()[:, :, 0, 0], weight.double(), dims=1)
    assert ((merged - exact).abs() <= exact.abs() * 2**-23).all()
    exact_bias = outer.double()[:, :, 0, 0] @ bias.double() + outer_bias.double()
    assert ((merged_bias - exact_bias).abs() <= exact_bias.abs() * 2**-23).all()


# --- rotary positions -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side", "scale"), [("window", 24, 1.0), ("global_", 72, 24 / 72)])
def test_axial_rope_is_the_references_stored_table(name: str, side: int, scale: float) -> None:
    cos, sin = axial_rope(side, 64, 10000.0, scale)
    stored = stored_ropes()[name]
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == stored.shape
    # Angles reach 24 radians, where one FP32 step is 2e-6.
    assert float((cos - stored.real).abs().max()) < 1e-5
    assert float((sin - stored.imag).abs().max()) < 1e-5


# --- the whole encoder ----------------------------------------------------------------------------

GEOMETRIES = {
    "default": TinySizes(),
    "positions as large as the grid": TinySizes(pretrain=4),
    "positions cropped while tiled": TinySizes(pretrain=3),
    "positions larger than the grid": TinySizes(pretrain=5),
    "three windows per side": TinySizes(grid=6, window=2, pretrain=2),
    "first block global": TinySizes(global_blocks=(0,)),
    "deeper": TinySizes(depth=5, global_blocks=(2, 4)),
    "one token per window": TinySizes(grid=3, window=1, pretrain=3),
}


@pytest.mark.parametrize("sizes", GEOMETRIES.values(), ids=list(GEOMETRIES))
@torch.no_grad()
def test_encoder_equals_transformers(sizes: TinySizes) -> None:
    tensors = tiny_tensors(sizes)
    architecture = read_architecture(tensors)
    encoder = Sam3EncoderGraph(architecture, tensors).eval()
    reference = TransformersReference(build_tracker_model(architecture, tensors))
    side = architecture.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    for name, actual, expected in zip(
        ("s0", "s1", "embed"), encoder(pixels), reference.encode(pixels), strict=True
    ):
        assert relative(actual, expected) < 1e-5, name


@pytest.mark.parametrize(
    "name",
    [
        NO_MEMORY,
        TRUNK + "pos_embed",
        TRUNK + "patch_embed.proj.weight",
        TRUNK + "ln_pre.bias",
        TRUNK + "blocks.0.attn.qkv.bias",
        TRUNK + "blocks.1.mlp.fc2.weight",
        NECK + "0.dconv_2x2_0.weight",
        NECK + "0.dconv_2x2_1.bias",
        NECK + "1.dconv_2x2.weight",
        NECK + "2.conv_3x3.bias",
        DECODER + "conv_s0.weight",
        DECODER + "conv_s1.bias",
    ],
)
@torch.no_grad()
def test_every_kind_of_parameter_reaches_the_features(name: str) -> None:
    tensors = tiny_tensors()
    architecture = read_architecture(tensors)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = Sam3EncoderGraph(architecture, tensors)(pixels)
    changed = tensors | {name: tensors[name] + torch.randn(tensors[name].shape)}
    after = Sam3EncoderGraph(architecture, changed)(pixels)
    assert any(relative(b, a) > 1e-3 for a, b in zip(before, after, strict=True))
