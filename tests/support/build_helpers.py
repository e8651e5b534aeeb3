"""What the tests of the build share: graphs made by hand, edited bundles, quick backends."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests.support.helpers import WrappedBackend, edit_manifest, relist, tiny_bundle

from sam3rt.accuracy.record import ParityRecord
from sam3rt.backends.base import Backend
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.features import Features
from sam3rt.prompts import PackedPrompts

__all__ = [
    "FLOATS",
    "RememberingBackend",
    "WrappedBackend",
    "edit_manifest",
    "edited_bundle",
    "first_cases",
    "float_types",
    "relist",
    "run_onnx",
    "scale_weight",
    "toy_bundle",
    "toy_graph",
]

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}


def run_onnx(path: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All outputs of an ONNX file in ONNX Runtime on the CPU, with its default optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def float_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value that a file states to be of floats, by name."""
    graph = model.graph
    stated = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    stated |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: kind for name, kind in stated.items() if kind in FLOATS}


def toy_graph(
    nodes: Sequence[tuple[str, Sequence[str], str]],
    inputs: Mapping[str, Sequence[int | str]],
    weights: Mapping[str, NDArray[np.float32]],
    **attributes: Any,
) -> ir.Model:
    """A graph of FP32 values whose last node's value is the output ``y``.

    Args:
        nodes: operator, inputs and module path of each; outputs are ``v0``, ``v1`` and so on.
        inputs: their shapes by name.
        weights: by name.
        attributes: of every node that is a LayerNormalization or a Softmax.
    """
    made = []
    for index, (operator, given, scope) in enumerate(nodes):
        output = "y" if index == len(nodes) - 1 else f"v{index}"
        extra = attributes if operator in ("LayerNormalization", "Softmax") else {}
        name = f"{scope}/{operator}_{index}"
        made.append(helper.make_node(operator, list(given), [output], name=name, **extra))
    graph = helper.make_graph(
        made,
        "toy",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def edited_bundle(
    source: Path, target: Path, edit: Callable[[dict[str, onnx.ModelProto]], object]
) -> Bundle:
    """A copy of a bundle whose graphs were changed, vouched for by its manifest.

    Args:
        source: the bundle's folder.
        target: the copy's.
        edit: changes the graphs, given by role.
    """
    shutil.copytree(source, target)
    graphs = {role: onnx.load(target / f"{role}.onnx") for role in ("encoder", "decoder")}
    edit(graphs)
    for role, model in graphs.items():
        onnx.save(model, target / f"{role}.onnx")
    relist(target)
    return open_bundle(target)


def scale_weight(
    model: onnx.ModelProto, node: str, factor: float | NDArray[np.float32]
) -> NDArray[np.float32]:
    """Multiply the weight that a node reads, and return it as it is then."""
    names = {tensor.name: tensor for tensor in model.graph.initializer}
    (found,) = (candidate for candidate in model.graph.node if candidate.name == node)
    (tensor,) = (names[name] for name in found.input if name in names)
    scaled = (numpy_helper.to_array(tensor) * np.float32(factor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
    return scaled


def first_cases(record: ParityRecord, *names: str) -> ParityRecord:
    """The part of a record that is about its first image and the named kinds of call."""
    description = record._description
    kept = [
        entry
        for entry in description["cases"]
        if entry["image"] == 0 and entry["name"].removesuffix("_0") in names
    ]
    if len(kept) != len(names):
        raise ValueError(f"the record has {[entry['name'] for entry in description['cases']]}")
    prefixes = ("image_0", "features_0_", *(f"{entry['name']}/" for entry in kept))
    arrays = {name: a for name, a in record._arrays.items() if name.startswith(prefixes)}
    return ParityRecord(arrays, {**description, "images": 1, "cases": kept})


class RememberingBackend(WrappedBackend):
    """Runs what it has not run before and repeats the rest, so that many verdicts cost one run."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self._features: dict[str, Features] = {}
        self._outputs: dict[str, dict[str, NDArray[np.float32]]] = {}

    def encode(self, pixels: NDArray[np.float32]) -> Features:
        key = hashlib.sha256(pixels.tobytes()).hexdigest()
        if key not in self._features:
            self._features[key] = super().encode(pixels)
        return self._features[key]

    def decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        digest = hashlib.sha256()
        parts = (*features.numpy(), prompts.points, prompts.labels, prompts.masks)
        for part in parts:
            digest.update(b"none" if part is None else part.tobytes())
        known = self._outputs.setdefault(digest.hexdigest(), {})
        missing = [name for name in outputs if name not in known]
        if missing:
            found = super().decode(features, prompts, missing)
            known.update(zip(missing, found, strict=True))
        return [known[name].copy() for name in outputs]


def toy_bundle(folder: Path) -> Bundle:
    """A bundle with graphs of a few nodes: for everything about builds but what they compute."""
    tiny_bundle(folder)
    features = ("image_embeddings.0", ["batch", 8, 72, 72])
    weights = np.random.default_rng(0)

    def graph(
        name: str,
        nodes: list[onnx.NodeProto],
        inputs: list[tuple[str, list[Any]]],
        outputs: list[tuple[str, list[Any]]],
        **shapes: tuple[int, ...],
    ) -> None:
        made = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
            [
                numpy_helper.from_array(weights.standard_normal(shape).astype(np.float32), key)
                for key, shape in shapes.items()
            ],
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(
            onnx.shape_inference.infer_shapes(model, strict_mode=True), folder / f"{name}.onnx"
        )

    def node(operator: str, inputs: list[str], output: str, scope: str, **extra: Any) -> Any:
        return helper.make_node(
            operator, inputs, [output], name=f"{scope}/{operator}_{output}", **extra
        )

    graph(
        "encoder",
        [
            node("Conv", ["pixel_values", "filters"], "patches", "patch", strides=[14, 14]),
            node("MatMul", ["patches", "mix"], "mixed", "blocks.0.attention"),
            node("Softmax", ["mixed"], "shares", "blocks.0.attention"),
            node("Relu", ["shares"], features[0], "blocks.0"),
        ],
        [("pixel_values", ["batch", 3, 1008, 1008])],
        [features],
        filters=(8, 3, 14, 14),
        mix=(72, 72),
    )
    graph(
        "decoder",
        [
            node("MatMul", [features[0], "columns"], "mixed", "blocks.0.attention"),
            node("ReduceMax", ["mixed"], "greatest", "final", keepdims=0),
            node("MatMul", ["input_points", "placing"], "placed", "final"),
            node("Add", ["placed", "greatest"], "pred_masks", "graph"),
        ],
        [
            (features[0], ["num_images", 8, 72, 72]),
            ("input_points", [1, "num_objects", "num_points", 2]),
        ],
        [("pred_masks", [1, "num_objects", "num_points", 288])],
        columns=(72, 4),
        placing=(2, 288),
    )

    def describe(document: dict[str, Any]) -> None:
        document["encoder"]["outputs"][0]["shape"][1] = 8
        document["encoder"]["external_data"] = []
        document["decoder"]["inputs"][0]["shape"][:2] = ["num_images", 8]

    edit_manifest(folder, describe)
    relist(folder)
    return open_bundle(folder)
