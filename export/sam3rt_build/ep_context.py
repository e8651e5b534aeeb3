"""The wrapper model through which ONNX Runtime loads a finished TensorRT engine.

ONNX Runtime's TensorRT and TensorRT RTX providers take a model whose only node is an
``EPContext`` of the domain ``com.microsoft``: it names the engine's file, and the model's inputs
and outputs are the engine's. A C++ service can so use an engine that ``sam3rt build`` made and
proved, without building it again.

Attributes follow ONNX Runtime's description of the EPContext operator
(onnxruntime.ai/docs/execution-providers/EP-Context-Design.html) and what its TensorRT provider
writes itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from sam3rt.backends.tensorrt.sidecar import BackendName
from sam3rt.bundle import TensorSpec
from sam3rt.bundle.files import atomic_write

_DOMAIN = "com.microsoft"
_SOURCES: dict[BackendName, str] = {
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}
_OPSET, _IR_VERSION = 18, 8


def wrapper_path(engine: Path) -> Path:
    """Where the wrapper of ``<role>.engine`` lies: ``<role>_ctx.onnx``."""
    return engine.with_name(f"{engine.stem}_ctx.onnx")


def write_wrapper(
    engine: Path,
    backend: BackendName,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    metadata: dict[str, str],
    compute_capability: str | None,
) -> Path:
    """Write the wrapper of an engine beside it, whole or not at all.

    Args:
        engine: the engine file.
        backend: the TensorRT flavour that built it.
        inputs: its inputs, with the types the engine has.
        outputs: its outputs likewise.
        metadata: string pairs for the model's metadata, such as the export id.
        compute_capability: such as ``"8.9"``, of the GPU it was built on; the provider compares
            it. ``None`` for ahead-of-time builds.

    Returns:
        The wrapper's path.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    attributes: dict[str, Any] = {
        "main_context": 1,
        "embed_mode": 0,
        "ep_cache_context": engine.name,
        "source": _SOURCES[backend],
        "partition_name": f"sam3rt_{engine.stem}",
        "onnx_model_filename": f"{engine.stem}.onnx",
    }
    if compute_capability is not None:
        # Written without the dot, as the provider does.
        attributes["hardware_architecture"] = compute_capability.replace(".", "")
    node = helper.make_node(
        "EPContext",
        [spec.name for spec in inputs],
        [spec.name for spec in outputs],
        name=engine.stem,
        domain=_DOMAIN,
        **attributes,
    )
    graph = helper.make_graph(
        [node], engine.stem, [_value(spec) for spec in inputs], [_value(spec) for spec in outputs]
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(_DOMAIN, 1)],
        ir_version=_IR_VERSION,
        producer_name="sam3rt",
    )
    helper.set_model_props(model, metadata)
    path = wrapper_path(engine)
    with atomic_write(path) as stream:
        stream.write(model.SerializeToString())
    return path


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], list(spec.shape))
