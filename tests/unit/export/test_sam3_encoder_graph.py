"""The parts of SAM 3's encoder graph, and the whole of it on tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.export_helpers import (
    DECODER,
    NECK,
    NO_MEMORY,
    TRUNK,
    TinySizes,
    relative,
    rope,
    rotate,
    stored_ropes,
    tiny_tensors,
)
from torch import Tensor
from torch.nn import functional as F

from sam3rt_export.graphs.operators import gelu, layer_norm, regroup
from sam3rt_export.graphs.sam3_encoder import (
    RotaryAttention,
    Sam3EncoderGraph,
    axial_rope,
    window_order,
)
from sam3rt_export.references.transformers_sam3 import TransformersReference, build_tracker_model
from sam3rt_export.sources.sam3_architecture import read_architecture

modest = settings(deadline=None, max_examples=30)


# --- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_gelu_is_torchs_exact_one(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.linspace(-12.0, 12.0, 10001, dtype=dtype)
    assert float((gelu(x) - F.gelu(x)).abs().max()) < tolerance
    assert float((gelu(x) - F.gelu(x, approximate="tanh")).abs().max()) > 1e-4


def test_regroup_of_a_permuted_tensor_is_its_reshape() -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).permute(0, 2, 1, 3)
    assert torch.equal(regroup(x, -1, 12, 5), x.reshape(2, 12, 5))


def test_layer_norm_holds_the_given_tensors() -> None:
    weight, bias, x = torch.randn(6), torch.randn(6), torch.randn(4, 6)
    module = layer_norm({"n.weight": weight, "n.bias": bias}, "n.", 0.5)
    assert module.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(module(x), F.layer_norm(x, (6,), weight, bias, 0.5))


# --- token order ----------------------------------------------------------------------------------


@modest
@given(st.integers(1, 5), st.integers(1, 6))
def test_window_order_lists_each_token_once_window_by_window(count: int, window: int) -> None:
    grid = count * window
    order = window_order(grid, window)
    assert sorted(order.tolist()) == list(range(grid * grid))
    rows, columns = order // grid, order % grid
    windows = (rows // window * count + columns // window).reshape(-1, window * window)
    assert (windows == windows[:, :1]).all(), "a group holds tokens of several windows"
    assert windows[:, 0].tolist() == list(range(count * count))
    inside = (rows % window * window + columns % window).reshape(-1, window * window)
    assert (inside == torch.arange(window * window)).all(), "a window is not row by row"


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


@modest
@given(st.integers(1, 7), st.integers(1, 6), st.sampled_from([1.0, 0.5]), st.floats(2.0, 1e6))
def test_axial_rope_turns_the_first_half_with_x_and_the_second_with_y(
    side: int, quarter: int, scale: float, theta: float
) -> None:
    cos, sin = axial_rope(side, 4 * quarter, theta, scale)
    for token in range(side * side):
        for channel in range(2 * quarter):
            position = (token % side if channel < quarter else token // side) * scale
            angle = position * theta ** (-(channel % quarter) / quarter)
            assert math.cos(angle) == pytest.approx(float(cos[token, channel]), abs=1e-5)
            assert math.sin(angle) == pytest.approx(float(sin[token, channel]), abs=1e-5)


def plain_rotary_attention(
    tensors: dict[str, Tensor], heads: int, table: Tensor, x: Tensor
) -> Tensor:
    """The reference's attention of one group after the other, in complex numbers."""
    tokens, width = table.shape[0], x.shape[-1]
    out = []
    for group in x.reshape(-1, tokens, width):
        qkv = F.linear(group, tensors["a.qkv.weight"], tensors["a.qkv.bias"])
        q, k, v = qkv.reshape(tokens, 3, heads, width // heads).permute(1, 2, 0, 3)
        q, k = rotate(q, table), rotate(k, table)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width // heads), dim=-1)
        mixed = (weights @ v).transpose(0, 1).reshape(tokens, width)
        out.append(F.linear(mixed, tensors["a.proj.weight"], tensors["a.proj.bias"]))
    return torch.cat(out).reshape(x.shape)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize(("side", "groups"), [(2, 4), (3, 1), (1, 5)], ids=["windows", "all", "1"])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotary_attention(heads: int, side: int, groups: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    head_dim, tokens = 8, side * side
    width = heads * head_dim
    tensors = {
        "a.qkv.weight": torch.randn(3 * width, width, generator=generator) / math.sqrt(width),
        "a.qkv.bias": torch.randn(3 * width, generator=generator),
        "a.proj.weight": torch.randn(width, width, generator=generator) / math.sqrt(width),
        "a.proj.bias": torch.randn(width, generator=generator),
    }
    table = rope(side, head_dim, 1.0)
    attention = RotaryAttention(tensors, "a.", heads, *axial_rope(side, head_dim, 10000.0, 1.0))
    x = torch.randn(batch, groups * tokens, width, generator=generator)
    expected = plain_rotary_attention(tensors, heads, table, x)
    assert relative(attention(x), expected) < 1e-5


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
