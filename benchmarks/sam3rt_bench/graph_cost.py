"""How much a graph has to do at least, counted from its ONNX file.

Operations are those of matrix products and convolutions, two per multiplication; everything else
in these graphs is a small share. Bytes are the least that must move: weights, inputs and outputs,
each once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3rt.bundle import Bundle, GraphSpec
from sam3rt.errors import BackendError

# Shapes are worked out in a few numbers; larger constants are weights.
_SMALL = 64
_DTYPE_BYTES = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "bool": 1}


@dataclass(frozen=True)
class GraphCost:
    """What one run of a graph takes at least.

    Attributes:
        operations: floating-point operations of matrix products and convolutions.
        weight_bytes: of its constants, as stored.
        input_bytes: of its inputs.
        output_bytes: of its outputs.
    """

    operations: float
    weight_bytes: float
    input_bytes: float
    output_bytes: float

    @property
    def least_bytes(self) -> float:
        """Everything moved once."""
        return self.weight_bytes + self.input_bytes + self.output_bytes


def graph_cost(bundle: Bundle, graph: GraphSpec, sizes: Mapping[str, int]) -> GraphCost:
    """Count a graph's cost for given sizes of its dynamic axes.

    Args:
        bundle: where it lies.
        graph: its manifest entry.
        sizes: of the dynamic axes, by the names in the manifest.

    Raises:
        BackendError: onnx is not installed, or a shape cannot be worked out.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendError("counting needs onnx: pip install 'sam3rt[bench]'") from error
    model = onnx.load(bundle.file(graph.model), load_external_data=False)
    dtypes = onnx.helper.tensor_dtype_to_np_dtype
    weights = sum(
        math.prod(tensor.dims) * dtypes(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )
    shapes = _shapes(onnx, model, sizes)
    operations = sum(_operations(node, shapes) for node in model.graph.node)
    moved = [
        sum(
            math.prod(sizes.get(side, 1) if isinstance(side, str) else side for side in spec.shape)
            * _DTYPE_BYTES[spec.dtype]
            for spec in specs
        )
        for specs in (graph.inputs, graph.outputs)
    ]
    return GraphCost(operations, weights, *moved)


def _operations(node: Any, shapes: Mapping[str, list[int] | None]) -> float:
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return 0.0
    first, second, output = (shapes.get(name) for name in (*node.input[:2], node.output[0]))
    if first is None or second is None or output is None:
        raise BackendError(f"cannot work out the sizes of {node.op_type} {node.name!r}")
    if node.op_type == "MatMul":
        return 2.0 * math.prod(output) * first[-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return 2.0 * math.prod(output) * first[0 if transposed else 1]
    if node.op_type == "Conv":  # weights [out, in / groups, kernel...]
        return 2.0 * math.prod(output) * math.prod(second[1:])
    # Transposed: weights [in, out / groups, kernel...], each input pixel meets all of a channel's.
    return 2.0 * math.prod(first) * math.prod(second[1:])


def _shapes(onnx: Any, model: Any, sizes: Mapping[str, int]) -> dict[str, list[int] | None]:
    """The shape of every tensor, ``None`` where it stays unknown.

    ONNX infers shapes, but not through every computation of a shape. Those are evaluated, and
    the inference is run again, until nothing new comes out.
    """
    from onnx import shape_inference

    graph = model.graph
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for value in graph.input:
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_value = sizes.get(side.dim_param, 1)
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    known = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in graph.initializer
        if math.prod(t.dims) <= _SMALL and not t.external_data
    }
    while True:
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        shapes: dict[str, list[int] | None] = {t.name: list(t.dims) for t in graph.initializer}
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            sides = value.type.tensor_type.shape.dim
            complete = value.type.tensor_type.HasField("shape") and all(
                side.HasField("dim_value") for side in sides
            )
            shapes[value.name] = [side.dim_value for side in sides] if complete else None
        found = _evaluate(graph, opsets, shapes, known)
        if not found:
            return shapes
        known |= found
        # As constants, the inference sees them.
        graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in found.items())
        kept = [n for n in graph.node if not set(n.output) & set(found)]
        del graph.node[:]
        graph.node.extend(kept)


def _evaluate(
    graph: Any,
    opsets: dict[str, int],
    shapes: Mapping[str, list[int] | None],
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """Values of the nodes that compute shapes from what is known."""
    from onnx.reference import ReferenceEvaluator

    found: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type == "Shape" and shapes.get(node.input[0]) is not None:
            if not node.attribute:
                found[node.output[0]] = np.array(shapes[node.input[0]], np.int64)
                continue
            attributes = {a.name: a.i for a in node.attribute}
            part = slice(attributes.get("start", 0), attributes.get("end"))
            found[node.output[0]] = np.array(shapes[node.input[0]], np.int64)[part]
            continue
        values = {**known, **found}
        if len(node.output) != 1 or not node.input or not all(n in values for n in node.input):
            continue
        feed = {name: values[name] for name in node.input}
        (result,) = ReferenceEvaluator(node, opsets=opsets).run(None, feed)
        value = np.asarray(result)
        if value.size <= _SMALL:
            found[node.output[0]] = value
    return found
