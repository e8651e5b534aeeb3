"""Tests of `sam3rt.bundle.onnx_split`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sam3rt.bundle import open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt.bundle.onnx_locations import check_tensor_locations
from sam3rt.bundle.onnx_split import split_onnx

SHAPES = {"x": [2, 3], "y": [2, 2]}


def file(*nodes: Any, info: tuple[str, ...] = ()) -> bytes:
    """A graph from x and y to z; ``info`` are values whose type it says."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in SHAPES.items()],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.float32(2), "two"),
            numpy_helper.from_array(np.ones((3, 3), np.float32), "ones"),
        ],
        value_info=[helper.make_tensor_value_info(name, TensorProto.INT64, [2]) for name in info],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    content: bytes = model.SerializeToString()
    check_tensor_locations(content, "a.onnx", ())
    return content


def run(content: bytes, values: dict[str, Any]) -> dict[str, Any]:
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = {port.name: values[port.name] for port in session.get_inputs()}
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


WHOLE = (
    node("Relu", "x", "positive"),
    node("Add", "ones two", "threes"),
    node("MatMul", "positive threes", "product"),
    node("Transpose", "product", "turned", perm=[1, 0]),
    node("Neg", "turned", "negative"),
    node("MatMul", "positive negative", "square"),
    node("Mul", "y two", "doubled"),
    node("Add", "doubled square", "sum"),
    node("Add", "sum square", "z"),
)


def test_both_parts_together_are_the_whole() -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}
    expected = run(file(*WHOLE), values)["z"]
    parts = split_onnx(file(*WHOLE), ["x"])
    assert parts is not None
    assert parts.cut == ("square",)
    assert parts.inputs == ("x", "y")
    found = run(parts.first, values)
    assert tuple(found) == parts.cut
    np.testing.assert_array_equal(run(parts.rest, values | found)["z"], expected)
    left = onnx.load_from_string(parts.rest)
    assert [n.op_type for n in left.graph.node] == ["Mul", "Add", "Add"]
    assert [t.name for t in left.graph.initializer] == ["two"]


def test_what_a_matmul_transposes_by_itself_is_not_transposed_before() -> None:
    content = file(
        node("Relu", "x", "positive"),
        node("Transpose", "positive", "turned", perm=[1, 0]),
        node("MatMul", "positive ones", "product"),
        node("MatMul", "y product", "left"),
        node("MatMul", "left turned", "z"),
    )
    parts = split_onnx(content, ["x"])
    assert parts is not None
    assert parts.cut == ("positive", "product")


def test_types_that_the_file_states_are_kept() -> None:
    content = file(
        node("Shape", "x", "size"),
        node("Slice", "y size size", "z"),
        info=("size",),
    )
    parts = split_onnx(content, ["x"])
    assert parts is not None
    assert parts.cut == ("size",)
    inputs = {
        i.name: i.type.tensor_type.elem_type for i in onnx.load_from_string(parts.rest).graph.input
    }
    assert inputs == {"y": TensorProto.FLOAT, "size": TensorProto.INT64}


@pytest.mark.parametrize(
    "nodes",
    [
        (node("MatMul", "y x", "z"),),
        (node("Relu", "x", "r"), node("MatMul", "y r", "m"), node("Add", "m x", "z")),
        (node("Relu", "y", "z"),),
    ],
    ids=["nothing alone", "also behind the cut", "unread"],
)
def test_what_cannot_be_cut(nodes: tuple[Any, ...]) -> None:
    assert split_onnx(file(*nodes), ["x"]) is None


@pytest.mark.parametrize(
    ("plain", "odd"),
    [(b"square", b"squar\xff"), (b"Z\x13\n\x01x", b"Z\x13\x7a\x01x")],
    ids=["name", "description of an input"],
)
def test_odd_files_are_left_to_others(plain: bytes, odd: bytes) -> None:
    content = file(*WHOLE)
    assert plain in content
    assert split_onnx(content.replace(plain, odd), ["x"]) is None


def test_the_bundled_decoder_has_its_weights_once() -> None:
    bundle = open_bundle(default_bundle_path())
    content = Path(bundle.file(bundle.manifest.decoder.model)).read_bytes()
    parts = split_onnx(content, ["image_embeddings.0", "input_masks", "has_input_masks"])
    assert parts is not None
    assert len(parts.first) + len(parts.rest) < 1.02 * len(content)
