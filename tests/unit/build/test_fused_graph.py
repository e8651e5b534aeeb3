"""Tests of `sam3rt_build.fused_graph`: the fused graph computes what the plain one does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tests.support.helpers import noise

from sam3rt import Prompts, SegmentationModel
from sam3rt.accuracy.record import load_record
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt.geometry import preprocess
from sam3rt.prompts import PackedPrompts, decoder_inputs
from sam3rt_build.fused_graph import fuse
from sam3rt_build.graph_files import load_graph, save_graph
from sam3rt_build.graph_patterns import DOMAIN
from sam3rt_build.typed_graph import Role


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    # As it is written: ONNX Runtime's own fusions would hide ours.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def both(bundle: Bundle, role: Role, folder: Path) -> tuple[Any, Any, dict[str, int]]:
    """Sessions of the plain graph and of the fused one, and what was fused."""
    model = load_graph(bundle, role)
    counts = fuse(model)
    save_graph(model, folder / "fused.onnx")
    return session(bundle.path / f"{role}.onnx"), session(folder / "fused.onnx"), counts


def check_equal(plain: Any, fused: Any, feed: dict[str, NDArray[Any]]) -> None:
    for a, b in zip(plain.run(None, feed), fused.run(None, feed), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 2e-6 * max(1, np.abs(a).max()) * 8


@pytest.mark.parametrize("count", [1, 2])
def test_a_fused_encoder_computes_the_same(tiny_sam3: Path, tmp_path: Path, count: int) -> None:
    bundle = open_bundle(tiny_sam3)
    plain, fused, counts = both(bundle, "encoder", tmp_path)
    # Two blocks; the sum after the last one is not normalized. The neck has a GELU, too.
    assert counts == {
        "RotaryEmbedding": 4,
        "MultiHeadAttention": 2,
        "SkipLayerNormalization": 3,
        "BiasGelu": 3,
    }
    pixels = np.concatenate(
        [preprocess(bundle.manifest.image, noise(9, 12, seed=s))[0] for s in range(count)]
    )
    check_equal(plain, fused, {"pixel_values": pixels})


def test_nothing_of_an_attention_is_left(tiny_sam3: Path) -> None:
    model = load_graph(open_bundle(tiny_sam3), "encoder")
    before = Counter(node.op_type for node in model.graph)
    fuse(model)
    after = Counter(node.op_type for node in model.graph)
    assert before["Softmax"] == before["Erf"] - 1 == 2
    assert {after[name] for name in ("Softmax", "Concat", "Erf", "Div")} == {0}
    # Of each block: the products of the scores, two rotations' splits, and the values' bias.
    assert before["MatMul"] - after["MatMul"] == 2 * 2
    assert before["Split"] - after["Split"] == 2 * 2
    # Sums left: the biases of queries and keys.
    sums = {node.name for node in model.graph if node.op_type == "Add"}
    assert {name for name in sums if ".attention" in str(name)} == {
        f"blocks.{block}.attention.{part}/Add_fused_{count}"
        for block in (0, 1)
        for part, count in (("q", 1), ("k", 5))
    }
    # Four transposes of each block's heads, and that of its keys, are gone.
    assert before["Transpose"] - after["Transpose"] == 2 * 5
    assert model.graph.opset_imports[DOMAIN] == 1
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("own_masks", [False, True])
def test_a_fused_decoder_computes_the_same(
    tiny_sam3: Path, tmp_path: Path, own_masks: bool
) -> None:
    bundle = open_bundle(tiny_sam3)
    plain, fused, counts = both(bundle, "decoder", tmp_path)
    assert set(counts) == {"SkipLayerNormalization"}
    rng = np.random.default_rng(0)
    objects = 3
    size = bundle.manifest.prompts.mask_size
    packed = PackedPrompts(
        rng.uniform(0, 8, (objects, 2, 2)).astype(np.float32),
        np.array([[1, 0], [2, 3], [1, -10]], np.int64),
        rng.standard_normal((objects, *size), np.float32) if own_masks else None,
    )
    feed = dict(decoder_inputs(packed, np.zeros((1, 1, *size), np.float32)))
    for spec in bundle.manifest.encoder.outputs:
        feed[spec.name] = rng.standard_normal((1, *spec.shape[1:]), np.float32)  # type: ignore[arg-type]
    check_equal(plain, fused, feed)


def test_what_looks_otherwise_stays(tmp_path: Path) -> None:
    """MobileSAM's attentions have biases, and its Q, K and V are cut out of one product."""
    bundle = open_bundle(default_bundle_path())
    plain, fused, counts = both(bundle, "encoder", tmp_path)
    assert "MultiHeadAttention" not in counts
    pixels, _ = preprocess(bundle.manifest.image, load_record(bundle).images()[0])
    check_equal(plain, fused, {"pixel_values": pixels})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: a["blocks.0.attention/Softmax_0"], id="softmax over another axis"),
        pytest.param(lambda a: a["blocks.0.attention/Transpose_2"], id="keys turned otherwise"),
    ],
)
def test_an_attention_of_another_kind_stays(tiny_sam3: Path, change: Any) -> None:
    model = load_graph(open_bundle(tiny_sam3), "encoder")
    node = change({node.name: node for node in model.graph})
    if node.op_type == "Softmax":
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
    else:
        node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3])
    assert fuse(model)["MultiHeadAttention"] == 1


def test_a_rotation_with_unlike_halves_stays(tiny_sam3: Path) -> None:
    model = load_graph(open_bundle(tiny_sam3), "encoder")
    value = model.graph.initializers["blocks.0.attention.cos"]
    assert value.const_value is not None
    table = value.const_value.numpy().copy()
    table[..., 0] += 1
    value.const_value = ir.tensor(table, name=value.name)
    assert fuse(model)["MultiHeadAttention"] == 1


def test_another_activation_is_no_gelu(tiny_sam3: Path) -> None:
    model = load_graph(open_bundle(tiny_sam3), "encoder")
    erf = next(node for node in model.graph if node.name == "blocks.0/Erf_0")
    divide = erf.inputs[0].producer()  # type: ignore[union-attr]
    assert divide is not None
    weight = divide.inputs[1]
    assert weight is not None
    other = ir.Value(
        name="other", const_value=ir.tensor(np.float32(1.5), name="other"), type=weight.type
    )
    model.graph.initializers["other"] = other
    divide.replace_input_with(1, other)
    assert fuse(model)["BiasGelu"] == 2


def test_masks_of_a_fused_model_are_the_same(
    tiny_sam3: Path, tiny_model: SegmentationModel, tmp_path: Path
) -> None:
    """Features of the fused encoder, decoded by the runtime."""
    bundle = open_bundle(tiny_sam3)
    _, fused, _ = both(bundle, "encoder", tmp_path)
    image = noise(9, 12)
    pixels, where = preprocess(bundle.manifest.image, image)
    maps = fused.run(None, {"pixel_values": pixels})
    embedding = tiny_model.encode(image)
    for expected, found in zip(embedding.features.numpy(), maps, strict=True):
        assert np.abs(expected - found).max() < 1e-4
    prompts = Prompts(point_coords=[[4.0, 4.0]], point_labels=[1])
    expected = tiny_model.decode(embedding, prompts).low_res_masks
    features = tiny_model.backend.upload(maps)
    from sam3rt.embedding import ImageEmbedding

    other = ImageEmbedding(
        features,
        where,
        bundle.manifest.fingerprint,
        tuple(s.name for s in bundle.manifest.encoder.outputs),
    )
    assert np.abs(tiny_model.decode(other, prompts).low_res_masks - expected).max() < 1e-3
