"""Tests of `sam3rt.backends.openvino.graphs`: the decoder in parts."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13
from tests.support.helpers import noise

from sam3rt import Prompts, SegmentationModel, load_model
from sam3rt.backends.kept import KEPT_IMAGES
from sam3rt.backends.openvino import graphs
from sam3rt.backends.openvino.graphs import split

CLICK = Prompts([[5, 3]], [1])
PROMPTS = {
    "click": CLICK,
    "boxes": Prompts(box=[[1, 2, 6, 7], [0, 0, 3, 3], [4, 1, 7, 7]]),
    "one mask": Prompts([[5, 3]], [1], mask_input=np.linspace(-9, 9, 256).reshape(1, 16, 16)),
    "masks": Prompts(
        box=[[1, 2, 6, 7], [0, 0, 3, 3]], mask_input=np.linspace(-9, 9, 512).reshape(2, 1, 16, 16)
    ),
}


def parameter(name: str, *shape: int) -> Any:
    made = opset13.parameter(shape, np.float32)
    made.output(0).set_names({name})
    return made


def run(model: Any, values: dict[str, Any]) -> dict[str, Any]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = {name for port in compiled.inputs for name in port.get_names()}
    request = compiled.create_infer_request()
    request.infer({name: value for name, value in values.items() if name in given})
    return {
        port.get_any_name(): np.array(request.get_tensor(port).data) for port in compiled.outputs
    }


def named_inputs(model: Any) -> set[str]:
    return {name for port in model.inputs for name in port.get_names()}


# --- cutting a graph ------------------------------------------------------------------------------


def whole() -> Any:
    """``z = (relu(x) + 1) @ transpose(2 relu(x)) + y + sum(x)``."""
    x, y = parameter("x", 2, 3), parameter("y", 2, 2)
    positive = opset13.relu(x)
    moved = opset13.transpose(opset13.multiply(positive, np.float32(2)), np.array([1, 0]))
    product = opset13.matmul(opset13.add(positive, np.float32(1)), moved, False, False)
    row = opset13.reduce_sum(x, np.array([1]), keep_dims=True)
    late = opset13.add(opset13.add(product, y), row)
    late.output(0).set_names({"z"})
    return ov.Model([late], [x, y])


def test_both_parts_together_are_the_whole() -> None:
    rng = np.random.default_rng(0)
    values = {n: rng.normal(size=s).astype(np.float32) for n, s in (("x", (2, 3)), ("y", (2, 2)))}
    expected = run(whole(), values)["z"]
    first, rest = split(whole(), ["x"], "cut")
    assert named_inputs(first) == {"x"}
    found = run(first, values)
    assert "y" in named_inputs(rest)
    assert named_inputs(rest) - {"y"} == set(found)
    np.testing.assert_array_equal(run(rest, {**values, **found})["z"], expected)


def test_what_a_matmul_transposes_by_itself_is_not_transposed_before() -> None:
    first, rest = split(whole(), ["x"], "cut")
    assert not [n for n in first.get_ops() if n.get_type_name() == "Transpose"]
    assert [n for n in rest.get_ops() if n.get_type_name() == "Transpose"]


def test_an_input_that_is_read_behind_the_cut_is_an_input_of_both() -> None:
    x, y = parameter("x", 2), parameter("y", 2)
    z = opset13.add(opset13.multiply(opset13.relu(x), y), opset13.multiply(x, y))
    z.output(0).set_names({"z"})
    first, rest = split(ov.Model([z], [x, y]), ["x"], "cut")
    assert named_inputs(first) == {"x"}
    assert named_inputs(rest) == {"x", "y", "cut.0"}


def test_a_graph_without_such_operators_stays_whole() -> None:
    x, y = parameter("x", 2), parameter("y", 2)
    model = ov.Model([opset13.add(x, y)], [x, y])
    assert split(model, ["x"], "cut") == (None, model)


# --- the decoder ----------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each part has run, by the name of its first output."""
    counts: Counter[str] = Counter()
    original = graphs.CompiledGraph.results

    def counting(self: Any, values: Any) -> Any:
        counts[self._compiled.outputs[0].get_any_name().partition(".")[0]] += 1
        return original(self, values)

    monkeypatch.setattr(graphs.CompiledGraph, "results", counting)
    return counts


@pytest.fixture
def model(tiny_sam3: Path) -> SegmentationModel:
    """The tiny SAM 3 in OpenVINO."""
    return load_model(tiny_sam3, backend="openvino", precision="fp32")


@pytest.mark.parametrize("name", PROMPTS)
def test_parts_give_what_the_whole_gives(
    model: SegmentationModel, monkeypatch: pytest.MonkeyPatch, tiny_sam3: Path, name: str
) -> None:
    embedding = model.encode(noise(9, 9))
    found = [model.decode(embedding, PROMPTS[name]).low_res_masks for _ in range(2)]
    monkeypatch.setattr(graphs, "split", lambda model, inputs, prefix: (None, model))
    uncut = load_model(tiny_sam3, backend="openvino", precision="fp32")
    expected = uncut.decode(uncut.encode(noise(9, 9)), PROMPTS[name]).low_res_masks
    for masks in found:
        np.testing.assert_allclose(masks, expected, rtol=0, atol=1e-5)


def test_what_an_image_decides_is_computed_once(
    model: SegmentationModel, runs: Counter[str]
) -> None:
    embedding = model.encode(noise(9, 9))
    for name in ("click", "boxes", "click", "one mask", "click", "masks"):
        model.decode(embedding, PROMPTS[name])
    assert runs == {"image": 1, "dense": 1 + 2, "pred_masks": 6}


def test_few_images_are_kept_and_none_that_is_gone(
    model: SegmentationModel, runs: Counter[str]
) -> None:
    embeddings = [model.encode(noise(9, 9, seed=i)) for i in range(KEPT_IMAGES + 1)]
    for embedding in embeddings:
        model.decode(embedding, CLICK)
    decoder = model.backend._decoder.get(None)  # type: ignore[attr-defined]
    assert len(decoder._of_image) == len(decoder._of_no_mask) == KEPT_IMAGES
    model.decode(embeddings[1], CLICK)
    assert runs["image"] == KEPT_IMAGES + 1
    model.decode(embeddings[0], CLICK)
    model.decode(embeddings[1], CLICK)
    assert runs["image"] == KEPT_IMAGES + 2, "the one that was used longest ago goes"
    del embeddings, embedding
    gc.collect()
    assert len(decoder._of_image) == len(decoder._of_no_mask) == 0
