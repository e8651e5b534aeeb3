"""A backend that computes in FP32 on the CPU and rounds as a precision recipe would.

It shows what a recipe costs in accuracy, and nothing about any GPU: kernels are what goes wrong
there, and only the gate on the target sees them.

The typed graph itself is not run here. ONNX Runtime on the CPU has few FP16 kernels, and silently
drops the rounding between two operators it computes in FP32, so that would flatter the recipe.

Half accumulators are modelled as tensor cores use them (HMMA.16816.F16): one instruction adds 16
exact products to an accumulator, which is then rounded to FP16. So a matmul becomes a loop over its
inner axis in steps of 16. Two things a GPU may do are not in the model: a fused attention adds up
shares before it divides them by their sum, which grow larger and lose more; and sums that are split
between threads have fewer roundings. Convolutions are added up in FP32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from sam3rt.backends.onnxruntime.backend import OnnxRuntimeBackend
from sam3rt.backends.onnxruntime.typed import Graphs
from sam3rt.bundle import Bundle, GraphSpec, file_entry
from sam3rt.bundle.contract import is_feature_name

from .graph_files import load_graph, save_graph
from .recipes import Recipe
from .typed_graph import (
    FLOAT,
    FLOAT16,
    RECIPE_PROPERTY,
    FeaturesType,
    Role,
    cast_node,
    drop_unused_weights,
    is_float,
    narrowed,
    new_weight,
    node_types,
)


class SimulatedBackend(OnnxRuntimeBackend):
    """Runs a bundle as two recipes would compute it on hardware without faults.

    Args:
        bundle: an opened bundle.
        encoder: recipe of the encoder; it also decides the type of the feature maps.
        decoder: recipe of the decoder.
        threads: CPU threads per operator.

    Raises:
        RecipeError: a recipe does not fit its graph.
    """

    name = "simulated"

    def __init__(
        self, bundle: Bundle, encoder: Recipe, decoder: Recipe, *, threads: int | None = None
    ) -> None:
        # Lives as long as the backend: sessions are created at first use, from these files.
        self._folder = tempfile.TemporaryDirectory(prefix="sam3rt-simulated-")
        folder = Path(self._folder.name)
        features = encoder.features_dtype
        manifest = msgspec.structs.replace(
            bundle.manifest,
            encoder=_simulated(bundle, "encoder", encoder, features, folder),
            decoder=_simulated(bundle, "decoder", decoder, features, folder),
        )
        precision = f"{encoder.name}+{decoder.name}"
        made = Bundle(folder, manifest)
        super().__init__(made, Graphs(made, precision))
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        if threads is not None:
            self._options.intra_op_num_threads = threads

    def create_session(self, graph: GraphSpec, *, memory_pattern: bool) -> Any:
        """Load a graph made here, which may have loops. The files of a bundle must not."""
        path = str(self.bundle.file(graph.model))
        return ort.InferenceSession(path, self._options, providers=["CPUExecutionProvider"])

    def create_parts(self, graph: GraphSpec) -> None:
        """Nothing: the decoder stays whole."""


def _simulated(
    bundle: Bundle, role: Role, recipe: Recipe, features: FeaturesType, folder: Path
) -> GraphSpec:
    """Write one simulated graph and describe it as the manifest does."""
    model = load_graph(bundle, role)
    simulate(model, recipe, features)
    path = folder / f"{role}.onnx"
    external = save_graph(model, path)
    spec: GraphSpec = getattr(bundle.manifest, role)
    return msgspec.structs.replace(
        spec, model=file_entry(path), external_data=tuple(file_entry(part) for part in external)
    )


def simulate(model: ir.Model, recipe: Recipe, features: FeaturesType) -> None:
    """Make a graph compute in FP32 what :func:`apply_recipe` would give on exact hardware.

    Every value that the recipe narrows is rounded to its type right after it is computed, and so
    are the weights. Sums inside one operator are FP32, or half as the module says where that is the
    recipe. With TF32 the factors of matmuls and convolutions are rounded.

    Raises:
        RecipeError: as :func:`apply_recipe`.
    """
    types = node_types(model, recipe)
    graph = model.graph
    feature_type = FLOAT16 if features == "float16" else FLOAT
    rounder = _Rounder(model)
    for given in graph.inputs:
        if is_feature_name(given.name or "") and feature_type != FLOAT:
            rounder.after(given, feature_type)
    for node, wanted in types.items():
        if wanted == FLOAT:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and is_float(value):
                node.replace_input_with(index, rounder.before(value, wanted, node))
        for made in node.outputs:
            if is_float(made):
                rounder.after(made, wanted)
    if recipe.tf32:
        _round_factors_to_tf32(model)
    if recipe.accumulation == "float16":
        for node, wanted in types.items():
            if node.op_type == "MatMul" and wanted == FLOAT16:
                _add_up_in_half(graph, node)
    if feature_type != FLOAT:
        for output in tuple(graph.outputs):
            if is_feature_name(output.name or ""):
                rounder.after(output, feature_type)
    drop_unused_weights(graph)
    model.metadata_props[RECIPE_PROPERTY] = f"simulated {recipe.name}"


class _Rounder:
    """Roundings of values, each made once per type."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._known: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def before(self, value: ir.Value, wanted: ir.DataType, node: ir.Node) -> ir.Value:
        """What a node that computes in ``wanted`` reads in place of the value."""
        key = (value, wanted)
        if key in self._known:
            return self._known[key]
        if value.const_value is not None and value.is_initializer():
            rounded = narrowed(value, wanted).numpy().astype(np.float32)
            name = f"{value.name}.{wanted.name.lower()}"
            self._known[key] = new_weight(self._graph, name, ir.tensor(rounded, name=name))
        else:
            down, up = self._pair(value, wanted)
            self._graph.insert_before(node, [down, up])
            self._known[key] = up.outputs[0]
        # Rounding twice to one type changes nothing.
        self._known[(self._known[key], wanted)] = self._known[key]
        return self._known[key]

    def after(self, value: ir.Value, wanted: ir.DataType) -> None:
        """Round a value where it is made, for all who use it."""
        if self._known.get((value, wanted)) is value:
            return  # it is rounded to this type already
        down, up = self._pair(value, wanted)
        producer = value.producer()
        rounded = up.outputs[0]
        outputs = self._graph.outputs
        if value in outputs:
            name, value.name = value.name, f"{value.name}.before_{wanted.name.lower()}"
            rounded.name = name
        ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=True)
        down.replace_input_with(0, value)
        if producer is None:
            self._graph.insert_before(self._graph[0], [down, up])
        else:
            self._graph.insert_after(producer, [down, up])
        self._known[(rounded, wanted)] = rounded

    @staticmethod
    def _pair(value: ir.Value, wanted: ir.DataType) -> tuple[ir.Node, ir.Node]:
        down = cast_node(value, wanted)
        up = cast_node(down.outputs[0], FLOAT)
        return down, up


def _round_factors_to_tf32(model: ir.Model) -> None:
    """Round what matmuls and convolutions read to TF32's 11 significant bits.

    By Veltkamp's splitting: with c = (2^13 + 1) x in FP32, c - (c - x) is x rounded to 24 - 13
    bits. ONNX has no such type to cast to.
    """
    graph = model.graph
    factor = np.float32(2**13 + 1)
    weight = new_weight(graph, "types/tf32_factor", ir.tensor(factor, name="types/tf32_factor"))
    rounded: dict[ir.Value, ir.Value] = {}
    for node in tuple(graph):
        if node.op_type not in ("MatMul", "Conv"):
            continue
        # A convolution's third input is its bias, which is added in FP32.
        for index, value in enumerate(node.inputs[:2]):
            if value is None or not is_float(value):
                continue
            if value not in rounded:
                steps = _tf32_nodes(value, weight)
                graph.insert_before(node, steps)
                rounded[value] = steps[-1].outputs[0]
            node.replace_input_with(index, rounded[value])


def _tf32_nodes(value: ir.Value, factor: ir.Value) -> list[ir.Node]:
    scaled = ir.node("Mul", [value, factor])
    rest = ir.node("Sub", [scaled.outputs[0], value])
    head = ir.node("Sub", [scaled.outputs[0], rest.outputs[0]])
    steps = [scaled, rest, head]
    for node, part in zip(steps, ("scaled", "rest", "tf32"), strict=True):
        node.name = f"types/{value.name}.{part}"
        (output,) = node.outputs
        output.name = f"{value.name}.{part}"
        output.type = ir.TensorType(FLOAT)
        output.shape = value.shape
    return steps


# Products that one tensor core instruction adds to an accumulator.
_STEP = 16


def _add_up_in_half(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a MatMul by a loop over its inner axis that rounds the sum after each step."""
    (result,) = node.outputs
    name = f"half/{result.name}"

    def constant(value: list[int]) -> ir.Value:
        key = f"half/{'_'.join(map(str, value))}"
        known = graph.initializers.get(key)
        return known or new_weight(graph, key, ir.tensor(np.array(value, np.int64), name=key))

    def add(nodes: list[ir.Node], operator: str, *given: ir.Value | None, **extra: int) -> ir.Value:
        made = ir.node(operator, list(given), attributes=extra)
        made.name = f"{name}/{operator}_{len(nodes)}"
        made.outputs[0].name = f"{name}.{'body' if nodes is inner else 'outer'}_{len(nodes)}"
        nodes.append(made)
        return made.outputs[0]

    def part(nodes: list[ir.Node], start: ir.Value, end: ir.Value) -> ir.Value:
        a, b = node.inputs
        left = add(nodes, "Slice", a, start, end, constant([-1]))
        right = add(nodes, "Slice", b, start, end, constant([-2]))
        return add(nodes, "MatMul", left, right)

    def rounded(nodes: list[ir.Node], value: ir.Value) -> ir.Value:
        down = add(nodes, "Cast", value, to=FLOAT16.value)
        return add(nodes, "Cast", down, to=FLOAT.value)

    outer: list[ir.Node] = []
    inner: list[ir.Node] = []
    index = ir.Value(
        name=f"{name}.index", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([])
    )
    go_on = ir.Value(name=f"{name}.on", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    total = ir.Value(name=f"{name}.sum", type=ir.TensorType(FLOAT))
    start = add(inner, "Mul", add(inner, "Add", index, constant([1])), constant([_STEP]))
    end = add(inner, "Add", start, constant([_STEP]))  # a Slice ends where its tensor does
    added = rounded(inner, add(inner, "Add", total, part(inner, start, end)))
    unchanged = add(inner, "Identity", go_on)
    body = ir.Graph([index, go_on, total], [unchanged, added], nodes=inner, name=f"{name}.body")
    unchanged.type, added.type = go_on.type, total.type
    first = rounded(outer, part(outer, constant([0]), constant([_STEP])))
    length = add(outer, "Shape", node.inputs[0], start=-1)
    steps = add(outer, "Div", add(outer, "Sub", length, constant([1])), constant([_STEP]))
    loop = ir.node("Loop", [steps, None, first], attributes={"body": body}, name=f"{name}/Loop_0")
    loop.outputs[0].type, loop.outputs[0].shape = result.type, result.shape
    graph.insert_before(node, [*outer, loop])
    ir.convenience.replace_all_uses_with(result, loop.outputs[0], replace_graph_outputs=True)
    loop.outputs[0].name, result.name = result.name, f"{name}.replaced"
    graph.remove(node, safe=True)
