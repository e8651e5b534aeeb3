"""The wrapper models through which ONNX Runtime's TensorRT providers load finished engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from sam3rt.bundle import TensorSpec
from sam3rt_build.ep_context import wrapper_path, write_wrapper

# Attributes and their types, from the table in ONNX Runtime's description of the operator:
# onnxruntime.ai/docs/execution-providers/EP-Context-Design.html.
DOCUMENTED = {
    "main_context": AttributeProto.INT,
    "ep_cache_context": AttributeProto.STRING,
    "embed_mode": AttributeProto.INT,
    "ep_sdk_version": AttributeProto.STRING,
    "onnx_model_filename": AttributeProto.STRING,
    "hardware_architecture": AttributeProto.STRING,
    "partition_name": AttributeProto.STRING,
    "source": AttributeProto.STRING,
    "notes": AttributeProto.STRING,
    "max_size": AttributeProto.INT,
}
INPUTS = (
    TensorSpec("image_embeddings.0", "float16", ("batch", 256, 64, 64)),
    TensorSpec("input_points", "float32", (1, "num_objects", "num_points", 2)),
    TensorSpec("input_labels", "int64", (1, "num_objects", "num_points")),
)
OUTPUTS = (
    TensorSpec("pred_masks", "float32", (1, "num_objects", 3, 256, 256)),
    TensorSpec("iou_scores", "float32", (1, "num_objects", 3)),
)


def write(folder: Path, **changes: Any) -> onnx.ModelProto:
    options: dict[str, Any] = {
        "engine": folder / "decoder.engine",
        "backend": "tensorrt",
        "inputs": INPUTS,
        "outputs": OUTPUTS,
        "metadata": {"sam3rt.export_id": "a1", "sam3rt.fingerprint": "b2"},
        "compute_capability": "8.9",
    }
    path = write_wrapper(**(options | changes))
    assert path == folder / "decoder_ctx.onnx" == wrapper_path(folder / "decoder.engine")
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    return onnx.load(path)


def attributes(model: onnx.ModelProto) -> dict[str, Any]:
    (node,) = model.graph.node
    for attribute in node.attribute:
        assert attribute.type == DOCUMENTED[attribute.name], attribute.name
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


def test_it_is_one_node_that_names_the_engine_beside_it(tmp_path: Path) -> None:
    model = write(tmp_path)
    (node,) = model.graph.node
    assert (node.op_type, node.domain) == ("EPContext", "com.microsoft")
    assert ("com.microsoft", 1) in {(entry.domain, entry.version) for entry in model.opset_import}
    found = attributes(model)
    assert found["embed_mode"] == 0  # the attribute holds a path, not the engine
    assert found["main_context"] == 1
    # Relative to the model, and in its folder: ONNX Runtime refuses ".." and absolute paths.
    assert found["ep_cache_context"] == "decoder.engine"
    assert Path(found["ep_cache_context"]).name == found["ep_cache_context"]
    assert found["source"] == "TensorrtExecutionProvider"
    assert found["hardware_architecture"] == "89"


@pytest.mark.parametrize(("capability", "written"), [("12.0", "120"), ("8.7", "87"), (None, None)])
def test_the_architecture_is_written_as_the_provider_compares_it(
    capability: str | None, written: str | None, tmp_path: Path
) -> None:
    found = attributes(write(tmp_path, compute_capability=capability))
    assert found.get("hardware_architecture") == written


def test_the_flavour_decides_the_provider(tmp_path: Path) -> None:
    found = attributes(write(tmp_path, backend="tensorrt-rtx"))
    assert found["source"] == "NvTensorRTRTXExecutionProvider"


def test_inputs_and_outputs_are_the_engines(tmp_path: Path) -> None:
    model = write(tmp_path)
    (node,) = model.graph.node
    kinds = {
        "float16": TensorProto.FLOAT16,
        "float32": TensorProto.FLOAT,
        "int64": TensorProto.INT64,
    }
    for values, names, specs in (
        (model.graph.input, node.input, INPUTS),
        (model.graph.output, node.output, OUTPUTS),
    ):
        assert list(names) == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            assert value.name == spec.name
            assert value.type.tensor_type.elem_type == kinds[spec.dtype]
            sides = value.type.tensor_type.shape.dim
            assert tuple(side.dim_param or side.dim_value for side in sides) == spec.shape
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties == {"sam3rt.export_id": "a1", "sam3rt.fingerprint": "b2"}


def test_it_is_valid_onnx(tmp_path: Path) -> None:
    onnx.checker.check_model(write(tmp_path))


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path, engine=tmp_path / "missing" / "decoder.engine")
    assert not list(tmp_path.iterdir())
