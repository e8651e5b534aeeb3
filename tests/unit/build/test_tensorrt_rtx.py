"""Every graph parses and builds in TensorRT, ahead of time and without a GPU.

TensorRT for RTX shares its parser and its builder's front end with TensorRT, is strongly typed
only, and builds for a named compute capability on any machine. What it builds cannot be loaded
here: that needs a driver.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import tensorrt_rtx as trt
from onnx import TensorProto, helper

# Least, typical and greatest size of every dynamic axis.
AXES = {
    "batch": (1, 1, 4),
    "num_objects": (1, 1, 16),
    "num_points": (0, 2, 16),
    "num_masks": (1, 1, 16),
    "num_images": (1, 1, 16),
}

LOGGER = trt.Logger(trt.Logger.ERROR)
# Networks are strongly typed; a version that still knows other ones has to be told.
_STRONGLY_TYPED = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
NETWORK_FLAGS = 0 if _STRONGLY_TYPED is None else 1 << int(_STRONGLY_TYPED)


def parse(builder: Any, path: Path) -> tuple[Any, list[str]]:
    """A network of an ONNX file, and what the parser had to say against it."""
    network = builder.create_network(NETWORK_FLAGS)
    parser = trt.OnnxParser(network, LOGGER)
    parser.parse_from_file(str(path))
    return network, [str(parser.get_error(i)) for i in range(parser.num_errors)]


def build(builder: Any, network: Any, inputs: list[dict[str, Any]]) -> Any:
    """The serialized engine for the given inputs of a manifest, or ``None``."""
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for entry in inputs:
        if any(isinstance(side, str) for side in entry["shape"]):
            sizes = [
                tuple(side if isinstance(side, int) else AXES[side][i] for side in entry["shape"])
                for i in range(3)
            ]
            profile.set_shape(entry["name"], *sizes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return builder.build_serialized_network(network, config)


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_graph_parses_and_builds(bundle: Path, role: str) -> None:
    graph = json.loads((bundle / "bundle.json").read_text())[role]
    builder = trt.Builder(LOGGER)
    network, errors = parse(builder, bundle / graph["model"]["file"])
    assert errors == []
    assert network.num_layers > 50

    found = [network.get_input(i) for i in range(network.num_inputs)]
    assert [tensor.name for tensor in found] == [entry["name"] for entry in graph["inputs"]]
    for tensor, entry in zip(found, graph["inputs"], strict=True):
        fixed = tuple(-1 if isinstance(side, str) else side for side in entry["shape"])
        assert tuple(tensor.shape) == fixed
        assert tensor.dtype == {"float32": trt.float32, "int64": trt.int64}[entry["dtype"]]
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    assert outputs == [entry["name"] for entry in graph["outputs"]]

    engine = build(builder, network, graph["inputs"])
    assert engine is not None
    assert engine.nbytes > 10_000


def toy(path: Path, operator: str) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "toy", [x], [y])
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def test_the_parser_notices_what_tensorrt_cannot_do(tmp_path: Path) -> None:
    builder = trt.Builder(LOGGER)
    assert parse(builder, toy(tmp_path / "good.onnx", "Relu"))[1] == []
    assert parse(builder, toy(tmp_path / "bad.onnx", "Det"))[1] != []


def test_weights_stored_as_fp16_are_cast_before_they_are_used(bundle: Path) -> None:
    """Strong typing takes types as they stand in the file; bundles compute in FP32."""
    model = onnx.load(bundle / "encoder.onnx")
    halved = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    users = {node.op_type for node in model.graph.node for name in node.input if name in halved}
    assert users <= {"Cast"}
    weights = json.loads((bundle / "bundle.json").read_text())["weights"]
    assert bool(halved) == (weights == "float16")
