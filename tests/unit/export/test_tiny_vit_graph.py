"""The parts of MobileSAM's encoder graph against its authors' code, with random weights.

test_exporter.py exports the whole, which is compared with theirs.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.support.export_helpers import random_mobile_sam, relative
from torch import nn

from sam3rt_export.graphs.operators import folded_conv
from sam3rt_export.graphs.tiny_vit import (
    PatchMerging,
    TinyViTArchitecture,
    WindowAttention,
    _offset_indexes,
)


@pytest.fixture(scope="module")
def official() -> nn.Module:
    """MobileSAM in its authors' code."""
    return random_mobile_sam()


@torch.no_grad()
def test_folded_convolution_equals_convolution_and_batch_norm(official: Any) -> None:
    layer = official.image_encoder.patch_embed.seq[0]
    tensors = {f"x.{name}": tensor for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 3, 10, 14)
    folded = folded_conv(tensors, "x.", stride=2)
    assert relative(folded(x), layer(x)) < 1e-5
    unfolded = nn.functional.conv2d(x, tensors["x.c.weight"], stride=2, padding=1)
    assert relative(folded(x), unfolded) > 0.05, "the batch statistics do not matter here"


@pytest.mark.parametrize(("stage", "stride"), [(0, 2), (1, 2), (2, 1)])
@torch.no_grad()
def test_patch_merging(official: Any, stage: int, stride: int) -> None:
    layer = official.image_encoder.layers[stage].downsample
    tensors = layer.state_dict()
    x = torch.randn(1, layer.conv1.c.in_channels, *layer.input_resolution)
    rows, columns = layer.input_resolution[0] // stride, layer.input_resolution[1] // stride
    expected = layer(x).transpose(1, 2).reshape(1, -1, rows, columns)
    assert relative(PatchMerging(tensors, "", stride)(x), expected) < 1e-5


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_position_biases_are_numbered_as_in_the_original(window: int) -> None:
    cells = list(itertools.product(range(window), range(window)))
    numbers: dict[tuple[int, int], int] = {}
    expected = []
    for a in cells:
        for b in cells:
            offset = (abs(a[0] - b[0]), abs(a[1] - b[1]))
            if offset not in numbers:
                numbers[offset] = len(numbers)
            expected.append(numbers[offset])
    assert _offset_indexes(window).flatten().tolist() == expected


@pytest.mark.parametrize("stage", [1, 2, 3])
@torch.no_grad()
def test_window_attention(official: Any, stage: int) -> None:
    arch = TinyViTArchitecture()
    layer = official.image_encoder.layers[stage].blocks[0].attn
    window = arch.windows[stage]
    attention = WindowAttention(layer.state_dict(), "", arch.heads[stage], window)
    x = torch.randn(3, window * window, layer.qkv.in_features)
    assert relative(attention(x), layer(x)) < 1e-5
