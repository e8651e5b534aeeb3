"""Turn a bundle's FP32 graph into a strongly typed one of mixed precision.

TensorRT 11 has strongly typed networks only, and 10 accepts them, so the types stand in the ONNX
file: every value has one type and every change of type is a Cast.

A MatMul of FP16 values says nothing about its sums, and TensorRT adds up in FP16 where that is
faster, as in the second product of its fused attention. So FP16 factors are cast to FP32 before
each product, and its result is cast back. TensorRT folds these casts into kernels that read FP16,
add up in FP32 and write FP16. Without the cast back, it would not fuse the attention. The
``Attention`` operator of ONNX's opset 23 needs the same casts and TensorRT 10.14. By what engines
say, it gains nothing over the MatMuls, which every version fuses, so the graph keeps those. From
compute capability 8.9 on it takes another kernel; nobody has measured which is faster.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sam3rt.bundle.contract import is_feature_name

from .errors import BuildError, RecipeError
from .recipes import ATTENTION_CORE, FUSED_ATTENTION, PRODUCTS, Factors, Recipe, Width

Role = Literal["encoder", "decoder"]
FeaturesType = Width

RECIPE_PROPERTY = "sam3rt.recipe"
FLOAT = ir.DataType.FLOAT
FLOAT16 = ir.DataType.FLOAT16
BFLOAT16 = ir.DataType.BFLOAT16
_TYPES: dict[Factors, ir.DataType] = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT}


def scope_of(node: ir.Node) -> str:
    """The module path in a node's name: what stands before the last slash."""
    return (node.name or "").rpartition("/")[0]


def node_types(model: ir.Model, recipe: Recipe) -> dict[ir.Node, ir.DataType]:
    """The type of what each node that handles floats reads and yields.

    Raises:
        RecipeError: the nodes are not named after modules, or a rule that must be about something
            matches none of them.
    """
    nodes = [node for node in model.graph if _handles_floats(node)]
    if recipe.factors == "float32":
        return dict.fromkeys(nodes, FLOAT)
    if not any(scope_of(node) for node in nodes):
        raise RecipeError(
            f"recipe {recipe.name}: the graph's nodes are not named after modules: "
            "export the model again"
        )
    kept: set[ir.Node] = set()
    for rule in recipe.rules:
        matched = {node for node in nodes if rule.matches(node.op_type, scope_of(node))}
        # The attention core is the one rule a recipe is named for. Every attention has a softmax,
        # and an encoder of convolutions has neither.
        if rule is ATTENTION_CORE and not matched and any(n.op_type == "Softmax" for n in nodes):
            raise RecipeError(
                f"recipe {recipe.name}: no node is in a module that matches {rule.scope!r}; "
                "the graph's nodes are not named after modules: export the model again"
            )
        kept |= _with_upstream(matched) if rule.upstream else matched
    products, others = _TYPES[recipe.factors], _TYPES[recipe.activations]
    attention = FLOAT16 if products == BFLOAT16 else products
    types = {
        node: FLOAT
        if node in kept
        else attention
        if node.op_type == FUSED_ATTENTION
        else products
        if node.op_type in PRODUCTS
        else others
        for node in nodes
    }
    for node in nodes:
        if node.op_type == "Identity":  # a marked layer: what it shows must be as it was made
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            types[node] = types.get(source, types[node]) if source is not None else types[node]
    return types


def apply_recipe(model: ir.Model, recipe: Recipe, features: FeaturesType) -> None:
    """Type a graph in place. Inputs and outputs other than feature maps stay FP32.

    Args:
        model: from :func:`.graph_files.load_graph`.
        recipe: what computes in what.
        features: type of the feature maps.

    Raises:
        RecipeError: the recipe does not fit the graph, or a weight does not fit its type.
    """
    types = node_types(model, recipe)
    graph = model.graph
    feature_type = _TYPES[features]
    for given in graph.inputs:
        if is_feature_name(given.name or ""):
            given.dtype = feature_type
    outputs = tuple(graph.outputs)
    caster = _Caster(model)
    for node, wanted in types.items():
        if node.op_type == "Cast":
            if node.outputs[0].dtype == FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", wanted.value)
                node.outputs[0].dtype = wanted
        elif has_fp32_sums(node, wanted, recipe):
            caster.between_casts(node)
        else:
            for index, value in enumerate(node.inputs):
                if value is not None and is_float(value):
                    node.replace_input_with(index, caster.as_type(value, wanted, node))
            for made in node.outputs:
                if is_float(made):
                    made.dtype = wanted
    for index, output in enumerate(outputs):
        if not is_float(output):
            continue
        promised = feature_type if is_feature_name(output.name or "") else FLOAT
        if output.dtype != promised:
            caster.retype_output(index, promised)
    drop_unused_weights(graph)
    model.metadata_props[RECIPE_PROPERTY] = recipe.name


def has_fp32_sums(node: ir.Node, wanted: ir.DataType, recipe: Recipe) -> bool:
    """Whether a node of a type multiplies FP16 factors and adds the products up in FP32."""
    return wanted == FLOAT16 and node.op_type in PRODUCTS and recipe.accumulation == "float32"


class _Caster:
    """Casts of values and typed copies of weights, each made once."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._known: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        # Results of products in FP32, and their roundings, which all users read instead.
        self._rounded: dict[ir.Value, ir.Value] = {}

    def between_casts(self, node: ir.Node) -> None:
        """Let a product read FP16 factors cast to FP32, and round its result to FP16.

        The casts to FP32 are this node's own. TensorRT merges products of one value, such as those
        for queries, keys and values; where they share a cast, it merges before it folds the cast,
        and computes all of them in FP32.
        """
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if index == 2:  # a convolution's bias, which is added to the sums
                node.replace_input_with(index, self.as_type(value, FLOAT, node))
                continue
            cast = cast_node(self.as_type(value, FLOAT16, node), FLOAT, f"{node.name}.{index}")
            self._graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        (made,) = node.outputs
        made.dtype = FLOAT
        self._rounded[made] = self._cast(made, FLOAT16, node)

    def retype_output(self, index: int, wanted: ir.DataType) -> None:
        """Let the value in another type be a graph output, under the name the output has."""
        value = self._graph.outputs[index]
        producer = value.producer()
        if producer is None:
            raise BuildError(f"output {value.name!r} is an input")
        cast = self.as_type(value, wanted, producer)
        cast.name, value.name = value.name, f"{value.name}.computed"
        self._graph.outputs[index] = cast

    def as_type(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        """The value in the wanted type, for use by ``before`` or any later node."""
        value = self._rounded.get(value, value)
        if value.dtype == wanted:
            return value
        key = (value, wanted)
        if key not in self._known:
            if value.dtype == FLOAT and value.is_initializer():
                self._known[key] = self._weight(value, wanted)
            else:
                self._known[key] = self._cast(value, wanted, before)
        return self._known[key]

    def _weight(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        name = f"{value.name}.{wanted.name.lower()}"
        return new_weight(self._graph, name, narrowed(value, wanted))

    def _cast(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        cast = cast_node(value, wanted)
        producer = value.producer()
        if producer is None:  # a graph input or a weight: its first user may come early
            self._graph.insert_before(before, cast)
        else:
            self._graph.insert_after(producer, cast)
        return cast.outputs[0]


def cast_node(value: ir.Value, wanted: ir.DataType, name: str | None = None) -> ir.Node:
    """A Cast of a value to a type, which is not in the graph yet.

    Args:
        value: what is cast.
        wanted: to what.
        name: of the result; by default the value's and the type's.
    """
    name = name or f"{value.name}.{wanted.name.lower()}"
    node = ir.node("Cast", [value], attributes={"to": wanted.value}, name=f"types/{name}")
    (output,) = node.outputs
    output.name = name
    output.type = ir.TensorType(wanted)
    output.shape = value.shape
    return node


def new_weight(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a weight to a graph."""
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.initializers[name] = value
    return value


def narrowed(value: ir.Value, wanted: ir.DataType) -> ir.TensorProtocol:
    """A weight in another type.

    Raises:
        RecipeError: it holds a number beyond the type's range.
    """
    tensor = value.const_value
    if tensor is None:
        raise BuildError(f"weight {value.name!r} has no value")
    array: NDArray[np.float32] = tensor.numpy()
    with np.errstate(over="ignore"):  # refused below
        converted = array.astype(wanted.numpy())
    if not np.isfinite(converted.astype(np.float32)).all():
        raise RecipeError(
            f"weight {value.name!r} reaches {float(np.abs(array).max()):.4g}, beyond "
            f"{wanted.name}'s range"
        )
    return ir.Tensor(converted, dtype=wanted, name=f"{value.name}.{wanted.name.lower()}")


def drop_unused_weights(graph: ir.Graph) -> None:
    """Remove the weights whose typed copies alone are used."""
    for name, value in tuple(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def is_float(value: ir.Value) -> bool:
    """Whether a value is of a floating-point type that recipes are about."""
    return value.dtype in (FLOAT, FLOAT16, BFLOAT16)


def _handles_floats(node: ir.Node) -> bool:
    values = [value for value in node.inputs if value is not None]
    if node.op_type in ("Shape", "Size"):
        return False
    return any(is_float(value) for value in (*values, *node.outputs))


def _with_upstream(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """The nodes and everything they are computed from."""
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        producers = (value.producer() for value in node.inputs if value is not None)
        waiting += [producer for producer in producers if producer is not None]
    return found
