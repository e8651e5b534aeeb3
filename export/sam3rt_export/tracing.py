"""Trace a graph module into an ONNX file and hold it to the rules for graphs."""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (onnx_ir needs it for float16 tensors)
import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn

from sam3rt.bundle import GraphSpec, TensorSpec, file_entry

from .errors import GraphRuleError

# Read by TensorRT 10.3 to 11 and by every ONNX Runtime since 1.15; LayerNormalization came
# with 17.
OPSET = 18
# The intermediate representation that belongs to opset 18; newer ones are refused by older
# ONNX Runtimes.
IR_VERSION = 8
MAX_NODES = 1500
# Control flow and data-dependent shapes cost other projects their TensorRT support.
FORBIDDEN = frozenset(
    ["If", "Loop", "Scan", "NonZero", "ScatterND", "ScatterElements", "Unique", "Compress", "TopK"]
)
# One protobuf message cannot exceed 2 GiB. Well below that, weights beside the graph already
# pay: runtimes map the file instead of parsing it.
EXTERNAL_DATA_BYTES = 1 << 30
# Early convolutions and normalizations are small and their rounding reaches everything after
# them; halving them would save little.
MIN_FP16_VALUES = 32768
# Scope of nodes that belong to no module below the graph's own.
TOP_SCOPE = "graph"
# Scope of the casts behind weights that are stored in FP16.
WEIGHTS_SCOPE = "weights"
# Where torch.onnx notes the module path of a node, as a Python list in text.
_SCOPES_NOTE = "pkg.torch.onnx.name_scopes"
# Constant expressions are folded up to this size; runtimes fold the larger ones when they load,
# and the file stays small.
MAX_FOLDED_VALUES = 4096


Weights = Literal["float32", "float16"]


@dataclass(frozen=True)
class TraceRequest:
    """What to trace.

    Attributes:
        module: the graph, in evaluation mode.
        arguments: example inputs.
        dynamic_shapes: as for ``torch.export.export``.
        inputs: names, types and axes of the inputs, in order.
        outputs: the same of the outputs.
        weights: type to store weights in; computation stays FP32.
        metadata: string pairs for the model's metadata.
        size_free_inputs: inputs whose sizes nothing in the graph may be computed from. ONNX then
            broadcasts such an input where the tracer saw equal sizes.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Weights
    metadata: dict[str, str]
    size_free_inputs: tuple[str, ...] = ()


def trace_to_file(request: TraceRequest, path: Path) -> GraphSpec:
    """Trace, name, check and save one graph.

    Args:
        request: what to trace.
        path: the ``.onnx`` file to write; large weights go to ``path`` + ``.data``.

    Returns:
        The graph's entry for the manifest.

    Raises:
        GraphRuleError: the graph has too many nodes, a forbidden operator or type, or inputs
            that are not the promised ones.
    """
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            request.module,
            request.arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in request.inputs],
            output_names=[spec.name for spec in request.outputs],
            dynamic_shapes=request.dynamic_shapes,
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise GraphRuleError("torch.onnx.export returned no program")
        model = program.model
        onnxscript.optimizer.optimize_ir(model, output_size_limit=MAX_FOLDED_VALUES)
    _name_nodes(model)
    _strip_exporter_notes(model)
    _name_axes(model.graph.inputs, request.inputs)
    _name_axes(model.graph.outputs, request.outputs)
    _forget_inner_axes(model)
    if request.weights == "float16":
        store_weights_as_float16(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "sam3rt", None
    model.metadata_props.update(request.metadata)
    check_rules(model, request.size_free_inputs)
    return _save(model, path, request)


def store_weights_as_float16(model: ir.Model) -> None:
    """Replace large FP32 weights by FP16 ones behind a Cast, in place.

    Runtimes fold the Cast when they load the graph, so this halves the file and nothing else.
    """
    graph = model.graph
    first = graph[0]
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_FP16_VALUES:
            continue
        array = tensor.numpy()
        with np.errstate(over="ignore"):  # refused below
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            raise GraphRuleError(f"weight {name!r} does not fit FP16")
        stored = ir.Value(
            name=f"{name}_fp16",
            type=ir.TensorType(ir.DataType.FLOAT16),
            shape=value.shape,
            const_value=ir.tensor(half, name=f"{name}_fp16"),
        )
        graph.initializers[f"{name}_fp16"] = stored
        cast = ir.node(
            "Cast",
            [stored],
            attributes={"to": ir.DataType.FLOAT.value},
            name=f"{WEIGHTS_SCOPE}/{name}",
        )
        cast.outputs[0].name = f"{name}_fp32"
        cast.outputs[0].type = value.type
        cast.outputs[0].shape = value.shape
        graph.insert_before(first, cast)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]


def check_rules(model: ir.Model, size_free_inputs: Sequence[str] = ()) -> None:
    """Hold a graph to the rules.

    Args:
        model: the graph.
        size_free_inputs: see :class:`TraceRequest`.

    Raises:
        GraphRuleError: naming the rule and what broke it.
    """
    graph = model.graph
    count = len(graph)
    if count > MAX_NODES:
        raise GraphRuleError(f"the graph has {count} nodes, at most {MAX_NODES} are allowed")
    kinds = Counter(node.op_type for node in graph)
    forbidden = sorted(FORBIDDEN & set(kinds))
    if forbidden:
        raise GraphRuleError(f"the graph uses forbidden operators: {', '.join(forbidden)}")
    foreign = sorted({node.domain for node in graph if node.domain not in ("", "ai.onnx")})
    if foreign or model.functions:
        raise GraphRuleError(f"the graph uses operators outside ONNX: {foreign}")
    for node in graph:
        source = node.inputs[0] if node.op_type in ("Shape", "Size") else None
        if source is not None and source.name in size_free_inputs:
            raise GraphRuleError(f"the graph computes with the size of {source.name}")
    unfit = {ir.DataType.COMPLEX64, ir.DataType.COMPLEX128, ir.DataType.DOUBLE}
    for node in graph:
        for value in node.outputs:
            if value.dtype in unfit:
                raise GraphRuleError(f"node {node.name!r} yields {value.dtype}")


def _name_axes(values: Sequence[ir.Value], specs: Sequence[TensorSpec]) -> None:
    """Put the promised axis names on a graph's inputs or outputs, after comparing sizes."""
    if [value.name for value in values] != [spec.name for spec in specs]:
        raise GraphRuleError(
            f"the graph's tensors are {[v.name for v in values]}, "
            f"expected {[s.name for s in specs]}"
        )
    for value, spec in zip(values, specs, strict=True):
        shape = value.shape
        if shape is None or len(shape) != len(spec.shape):
            raise GraphRuleError(f"{spec.name} has shape {shape}, expected {spec.shape}")
        for actual, expected in zip(shape, spec.shape, strict=True):
            dynamic = not isinstance(actual, int)
            if dynamic != isinstance(expected, str) or not (dynamic or actual == expected):
                raise GraphRuleError(f"{spec.name} has shape {shape}, expected {spec.shape}")
        if value.dtype is None or value.dtype.numpy() != np.dtype(spec.dtype):
            raise GraphRuleError(f"{spec.name} is {value.dtype}, expected {spec.dtype}")
        value.shape = ir.Shape(spec.shape)


def _forget_inner_axes(model: ir.Model) -> None:
    """Drop the tracer's shapes of inner values that depend on dynamic axes.

    They use its own axis names, and say two axes are equal where ONNX may broadcast one of them;
    a runtime that plans memory by them fails. Every runtime infers shapes for itself.
    """
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs and value.shape is not None and not value.shape.is_static():
                value.shape = None


def _name_nodes(model: ir.Model) -> None:
    """Name every node after the module it came from, such as ``blocks.3.attention/MatMul_2``.

    Precision recipes, comparisons of inner values and error messages of runtimes go by these
    names. Nodes without a note of the tracer belong where their first input was made.
    """
    counts: Counter[str] = Counter()
    scopes: dict[ir.Node, str] = {}
    for node in model.graph:
        note = node.metadata_props.get(_SCOPES_NOTE)
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        if note is not None:
            # The outermost module has no name, and the last entry is the operator itself. Nodes
            # that the tracer adds, mostly for sizes, have a placeholder in a module's place.
            scope = ["", *ast.literal_eval(note)[:-1]][-1]
            scope = "" if scope.startswith("_empty") else scope
        else:
            scope = scopes.get(producer, "") if producer is not None else ""
        scopes[node] = scope
        name = f"{scope or TOP_SCOPE}/{node.op_type}"
        node.name = f"{name}_{counts[name]}"
        counts[name] += 1


def _strip_exporter_notes(model: ir.Model) -> None:
    """Drop the tracer's notes: they hold stack traces with paths of the exporting machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _save(model: ir.Model, path: Path, request: TraceRequest) -> GraphSpec:
    weights = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    external: tuple[Path, ...] = ()
    if weights >= EXTERNAL_DATA_BYTES:
        external = (path.with_name(path.name + ".data"),)
        ir.save(model, path, external_data=external[0].name)
    else:
        ir.save(model, path)
    return GraphSpec(
        model=file_entry(path),
        external_data=tuple(file_entry(part) for part in external),
        opset=OPSET,
        nodes=len(model.graph),
        inputs=request.inputs,
        outputs=request.outputs,
    )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence notes of the tracer that ask nothing of the person exporting a model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
