"""A bundle's graphs, read from its files for typing and written again."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sam3rt.bundle import Bundle, GraphSpec, check_file
from sam3rt.bundle.onnx_locations import check_tensor_locations
from sam3rt.errors import BundleError

from .errors import BuildError
from .typed_graph import FLOAT, Role, is_float, new_weight, scope_of

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
        if not expression.search(name) or not is_float(value):
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
        if source is None or not source.is_initializer() or node.outputs[0].dtype != FLOAT:
            continue
        if source.const_value is None or source.dtype != ir.DataType.FLOAT16:
            continue
        name = f"{source.name}.stored"
        wide = source.const_value.numpy().astype(np.float32)
        weight = new_weight(graph, name, ir.tensor(wide, name=name))
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.remove(node, safe=True)
        if not source.uses() and source.name is not None:
            del graph.initializers[source.name]
