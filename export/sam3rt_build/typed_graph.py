"""Turn a bundle's FP32 graph into a strongly typed one of mixed precision.

TensorRT 11 has strongly typed networks only, and 10 accepts them, so the types stand in the ONNX
file. onnxconverter-common cannot do BF16 and leaves casts to FP32 inside the graph as they are,
which a strongly typed parser refuses (a half times a float at the label embedding). Here every
value has one type and every change of type is a Cast.

A second form of the same typing, :func:`simulate`, runs anywhere in FP32 and rounds what the
recipe would round. ONNX Runtime on the CPU has few FP16 kernels and no BF16 ones, and silently
drops the rounding between two operators it computes in FP32, so running the typed graph there
would flatter the recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sam3rt.bundle import Bundle, GraphSpec, check_file
from sam3rt.bundle.contract import is_feature_name
from sam3rt.bundle.onnx_locations import check_tensor_locations
from sam3rt.errors import BundleError

from .errors import BuildError, RecipeError
from .recipes import Narrow, Recipe

Role = Literal["encoder", "decoder"]
FeaturesType = Literal["float16", "float32"]

RECIPE_PROPERTY = "sam3rt.recipe"
_FLOAT = ir.DataType.FLOAT
_NARROW: dict[Narrow, ir.DataType] = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
# One transformer block of an encoder or decoder, as the export names modules.
_BLOCK = re.compile(r"^(?:blocks\.\d+|stages\.\d+\.\d+)(?=\.|$)")
# Weights beside the graph above this size; one protobuf message cannot exceed 2 GiB.
_EXTERNAL_BYTES = 1 << 30


def load_graph(bundle: Bundle, role: Role) -> ir.Model:
    """Read one of a bundle's graphs, its weights included.

    Raises:
        BundleError: a file is missing or is not what the manifest says.
        BuildError: the file is not a graph that can be typed.
    """
    graph: GraphSpec = getattr(bundle.manifest, role)
    for entry in (graph.model, *graph.external_data):
        check_file(bundle.path, entry)
    path = bundle.file(graph.model)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot be read: {error}", graph.model.file) from error
    check_tensor_locations(content, graph.model.file, graph.external_data)
    del content
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise classes of their own
        raise BuildError(f"{graph.model.file} cannot be read: {error}") from error
    _map_weights(model, bundle, graph)
    _drop_storage_casts(model)
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None:
                raise BuildError(
                    f"{graph.model.file}: node {node.name!r} does not say what type it yields"
                )
    return model


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
        return dict.fromkeys(nodes, _FLOAT)
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
    types = {node: _FLOAT if node in kept else narrow for node in nodes}
    for node in nodes:
        if node.op_type == "Identity":  # a marked layer: what it shows must be as it was made
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            types[node] = types.get(source, types[node]) if source is not None else types[node]
    return types


def mark_layers(model: ir.Model, pattern: str) -> tuple[str, ...]:
    """Make inner values outputs of a graph, before a recipe is applied to it.

    Args:
        model: from :func:`load_graph`.
        pattern: regular expression searched for in the names of nodes.

    Returns:
        The names of the nodes whose values are outputs of those names now, in graph order.

    Raises:
        BuildError: the pattern is not a regular expression, or no node that yields floats matches.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise BuildError(f"layers: {pattern!r} is not a regular expression: {error}") from error
    graph = model.graph
    marked: list[str] = []
    for node in tuple(graph):
        name, value = node.name or "", node.outputs[0]
        if not expression.search(name) or not _is_float(value):
            continue
        mark = ir.node("Identity", [value], name=f"{scope_of(node)}/marked_{len(marked)}")
        (output,) = mark.outputs
        output.name, output.type, output.shape = name, value.type, value.shape
        graph.insert_after(node, mark)
        graph.outputs.append(output)
        marked.append(name)
    if not marked:
        raise BuildError(f"layers: no node that yields floats is named like {pattern!r}")
    return tuple(marked)


def apply_recipe(model: ir.Model, recipe: Recipe, features: FeaturesType) -> None:
    """Type a graph in place. Inputs and outputs other than feature maps stay FP32.

    Args:
        model: from :func:`load_graph`.
        recipe: what computes in what.
        features: type of the feature maps.

    Raises:
        RecipeError: the recipe does not fit the graph, or a weight does not fit its type.
    """
    types = node_types(model, recipe)
    graph = model.graph
    feature_type = ir.DataType.FLOAT16 if features == "float16" else _FLOAT
    for given in graph.inputs:
        if is_feature_name(given.name or ""):
            given.dtype = feature_type
    outputs = tuple(graph.outputs)
    caster = _Caster(model)
    for node, wanted in types.items():
        if node.op_type == "Cast":
            if node.outputs[0].dtype == _FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", wanted.value)
        else:
            for index, value in enumerate(node.inputs):
                if value is not None and _is_float(value):
                    node.replace_input_with(index, caster.as_type(value, wanted, node))
        for made in node.outputs:
            if _is_float(made):
                made.dtype = wanted
    for index, output in enumerate(outputs):
        if not _is_float(output):
            continue
        promised = feature_type if is_feature_name(output.name or "") else _FLOAT
        if output.dtype != promised:
            _retype_output(model, index, promised)
    _drop_unused_weights(graph)
    model.metadata_props[RECIPE_PROPERTY] = recipe.name


def simulate(model: ir.Model, recipe: Recipe, features: FeaturesType) -> None:
    """Make a graph compute in FP32 what :func:`apply_recipe` would give on exact hardware.

    Every value that the recipe narrows is rounded to its type right after it is computed, and so
    are the weights; sums inside one operator are FP32, as tensor cores accumulate. With TF32 the
    factors of matrix products and convolutions are rounded.

    Raises:
        RecipeError: as :func:`apply_recipe`.
    """
    types = node_types(model, recipe)
    graph = model.graph
    feature_type = ir.DataType.FLOAT16 if features == "float16" else _FLOAT
    rounder = _Rounder(model)
    for given in graph.inputs:
        if is_feature_name(given.name or "") and feature_type != _FLOAT:
            rounder.after(given, feature_type)
    for node, wanted in types.items():
        if wanted == _FLOAT:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value):
                node.replace_input_with(index, rounder.before(value, wanted, node))
        for made in node.outputs:
            if _is_float(made):
                rounder.after(made, wanted)
    if recipe.tf32:
        _round_factors_to_tf32(model)
    if feature_type != _FLOAT:
        for output in tuple(graph.outputs):
            if is_feature_name(output.name or ""):
                rounder.after(output, feature_type)
    _drop_unused_weights(graph)
    model.metadata_props[RECIPE_PROPERTY] = f"simulated {recipe.name}"


def save_graph(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write a graph, large weights to a file beside it.

    Returns:
        The files that hold the weights; empty where they are inside.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    total = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if total < _EXTERNAL_BYTES:
        ir.save(model, path)
        return ()
    external = path.with_name(f"{path.name}.data")
    ir.save(model, path, external_data=external.name)
    return (external,)


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
        return _new_weight(self._graph, name, _narrowed(value, wanted))

    def _cast(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        cast = _cast_node(value, wanted)
        producer = value.producer()
        if producer is None:  # a graph input: its first user may come early
            self._graph.insert_before(before, cast)
        else:
            self._graph.insert_after(producer, cast)
        return cast.outputs[0]


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
            rounded = _narrowed(value, wanted).numpy().astype(np.float32)
            name = f"{value.name}.{wanted.name.lower()}"
            self._known[key] = _new_weight(self._graph, name, ir.tensor(rounded, name=name))
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
        down = _cast_node(value, wanted)
        up = _cast_node(down.outputs[0], _FLOAT)
        return down, up


def _round_factors_to_tf32(model: ir.Model) -> None:
    """Round what matrix products and convolutions read to TF32's 11 significant bits.

    By Veltkamp's splitting: with c = (2^13 + 1) x in FP32, c - (c - x) is x rounded to 24 - 13
    bits. ONNX has no such type to cast to.
    """
    graph = model.graph
    factor = np.float32(2**13 + 1)
    weight = _new_weight(graph, "types/tf32_factor", ir.tensor(factor, name="types/tf32_factor"))
    rounded: dict[ir.Value, ir.Value] = {}
    for node in tuple(graph):
        if node.op_type not in ("MatMul", "Conv"):
            continue
        # A convolution's third input is its bias, which is added in FP32.
        for index, value in enumerate(node.inputs[:2]):
            if value is None or not _is_float(value):
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
        output.type = ir.TensorType(_FLOAT)
        output.shape = value.shape
    return steps


def _cast_node(value: ir.Value, wanted: ir.DataType) -> ir.Node:
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
    cast = _cast_node(value, wanted)
    cast.outputs[0].name = name
    model.graph.insert_after(producer, cast)
    model.graph.outputs[index] = cast.outputs[0]


def _new_weight(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.initializers[name] = value
    return value


def _narrowed(value: ir.Value, wanted: ir.DataType) -> ir.TensorProtocol:
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
        narrowed = array.astype(kind)
    if not np.isfinite(narrowed.astype(np.float32)).all():
        raise RecipeError(
            f"weight {value.name!r} reaches {float(np.abs(array).max()):.4g}, beyond "
            f"{wanted.name}'s range"
        )
    return ir.Tensor(narrowed, dtype=wanted, name=f"{value.name}.{wanted.name.lower()}")


def _map_weights(model: ir.Model, bundle: Bundle, graph: GraphSpec) -> None:
    """Map the weights beside a graph into memory.

    Not by onnx_ir, which refuses files with several hard links, as layered file systems and
    copies made by ``cp --link`` have them. These files have just been hashed.
    """
    known = {entry.file: entry for entry in graph.external_data}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        entry = known.get(str(tensor.location))
        if entry is None:
            raise BuildError(
                f"{graph.model.file}: weight {value.name!r} is in {tensor.location!r}, which the "
                "manifest does not list"
            )
        try:
            array = np.memmap(
                bundle.file(entry),
                tensor.dtype.numpy(),
                "r",
                tensor.offset or 0,
                tuple(tensor.shape.numpy()),
            )
        except (OSError, ValueError) as error:
            raise BuildError(f"{entry.file}: weight {value.name!r}: {error}") from error
        value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)


def _drop_storage_casts(model: ir.Model) -> None:
    """Undo FP16 storage: weights behind a Cast to FP32 become FP32 weights."""
    graph = model.graph
    for node in tuple(graph):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is None or not source.is_initializer() or node.outputs[0].dtype != _FLOAT:
            continue
        if source.const_value is None or source.dtype != ir.DataType.FLOAT16:
            continue
        name = f"{source.name}.stored"
        wide = source.const_value.numpy().astype(np.float32)
        weight = _new_weight(graph, name, ir.tensor(wide, name=name))
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.remove(node, safe=True)
        if not source.uses() and source.name is not None:
            del graph.initializers[source.name]


def _drop_unused_weights(graph: ir.Graph) -> None:
    """Remove the weights whose typed copies alone are used."""
    for name, value in tuple(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (_FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _handles_floats(node: ir.Node) -> bool:
    values = [value for value in node.inputs if value is not None]
    if node.op_type in ("Shape", "Size"):
        return False
    return any(_is_float(value) for value in (*values, *node.outputs))


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
