"""Turn a bundle's FP32 graph into a strongly typed one of mixed precision.

TensorRT 11 has strongly typed networks only, and 10 accepts them, so the types stand in the ONNX
file. onnxconverter-common cannot do BF16 and leaves casts to FP32 inside the graph as they are,
which a strongly typed parser refuses (a half times a float at the label embedding). Here every
value has one type and every change of type is a Cast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sam3rt.bundle.contract import is_feature_name

from .errors import BuildError, RecipeError
from .recipes import Narrow, Recipe

Role = Literal["encoder", "decoder"]
FeaturesType = Literal["float16", "float32"]

RECIPE_PROPERTY = "sam3rt.recipe"
FLOAT = ir.DataType.FLOAT
_NARROW: dict[Narrow, ir.DataType] = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
# One transformer block of an encoder or decoder, as the export names modules.
_BLOCK = re.compile(r"^(?:blocks\.\d+|stages\.\d+\.\d+)(?=\.|$)")


def scope_of(node: ir.Node) -> str:
    """The module path in a node's name: what stands before the last slash."""
    return (node.name or "").rpartition("/")[0]


def node_types(model: ir.Model, recipe: Recipe) -> dict[ir.Node, ir.DataType]:
    """What each node that handles floats computes in.

    Raises:
        RecipeError: the nodes are not named after modules, or a rule that must be about something
            matches none of them.
    """
    nodes = [node for node in model.graph if _handles_floats(node)]
    if recipe.narrow is None:
        return dict.fromkeys(nodes, FLOAT)
    if not any(scope_of(node) for node in nodes):
        raise RecipeError(
            f"recipe {recipe.name}: the graph's nodes are not named after modules: "
            "export the model again"
        )
    kept: set[ir.Node] = set()
    for rule in recipe.rules:
        matched = {node for node in nodes if rule.matches(node.op_type, scope_of(node))}
        # The attention core is the one rule a recipe is named for.
        if rule.scope and not rule.operators and rule.scope.startswith("(") and not matched:
            raise RecipeError(
                f"recipe {recipe.name}: no node is in a module that matches {rule.scope!r}; "
                "the graph's nodes are not named after modules: export the model again"
            )
        kept |= _with_upstream(matched) if rule.upstream else matched
    kept |= _leading(nodes, recipe)
    narrow = _NARROW[recipe.narrow]
    types = {node: FLOAT if node in kept else narrow for node in nodes}
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
    feature_type = ir.DataType.FLOAT16 if features == "float16" else FLOAT
    for given in graph.inputs:
        if is_feature_name(given.name or ""):
            given.dtype = feature_type
    outputs = tuple(graph.outputs)
    caster = _Caster(model)
    for node, wanted in types.items():
        if node.op_type == "Cast":
            if node.outputs[0].dtype == FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", wanted.value)
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
            _retype_output(model, index, promised)
    drop_unused_weights(graph)
    model.metadata_props[RECIPE_PROPERTY] = recipe.name


class _Caster:
    """Casts of values and typed copies of weights, each made once."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._known: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def as_type(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        """The value in the wanted type, for use by ``before`` or any later node."""
        if value.dtype == wanted:
            return value
        key = (value, wanted)
        if key not in self._known:
            if value.const_value is not None and value.is_initializer():
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
        if producer is None:  # a graph input: its first user may come early
            self._graph.insert_before(before, cast)
        else:
            self._graph.insert_after(producer, cast)
        return cast.outputs[0]


def cast_node(value: ir.Value, wanted: ir.DataType) -> ir.Node:
    """A Cast of a value to a type, which is not in the graph yet."""
    node = ir.node("Cast", [value], attributes={"to": wanted.value})
    node.name = f"types/{value.name}.{wanted.name.lower()}"
    (output,) = node.outputs
    output.name = f"{value.name}.{wanted.name.lower()}"
    output.type = ir.TensorType(wanted)
    output.shape = value.shape
    return node


def _retype_output(model: ir.Model, index: int, wanted: ir.DataType) -> None:
    """Cast a graph output, which keeps its name."""
    value = model.graph.outputs[index]
    producer = value.producer()
    if producer is None:
        raise BuildError(f"output {value.name!r} is an input")
    name = value.name
    value.name = f"{name}.computed"
    cast = cast_node(value, wanted)
    cast.outputs[0].name = name
    model.graph.insert_after(producer, cast)
    model.graph.outputs[index] = cast.outputs[0]


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
    kind = ml_dtypes.bfloat16 if wanted == ir.DataType.BFLOAT16 else wanted.numpy()
    with np.errstate(over="ignore"):  # refused below
        converted = array.astype(kind)
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
    return value.dtype in (FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


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


def _leading(nodes: list[ir.Node], recipe: Recipe) -> set[ir.Node]:
    """The nodes up to the end of the blocks that the recipe keeps whole."""
    if not recipe.leading_blocks:
        return set()
    blocks = [_BLOCK.match(scope_of(node)) for node in nodes]
    names = list(dict.fromkeys(match.group() for match in blocks if match))
    if not names:
        raise RecipeError(
            f"recipe {recipe.name}: no node is in a transformer block; "
            "the graph's nodes are not named after modules: export the model again"
        )
    kept = set(names[: math.ceil(recipe.leading_blocks * len(names))])
    last = max(i for i, match in enumerate(blocks) if match and match.group() in kept)
    return set(nodes[: last + 1])
