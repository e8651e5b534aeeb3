"""What fusions look for in a graph, and how they put something else there."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

from .typed_graph import FLOAT, new_weight

DOMAIN = "com.microsoft"


class Maker:
    """Makes nodes before another one, named after a module."""

    def __init__(self, graph: ir.Graph, before: ir.Node, scope: str) -> None:
        self._graph = graph
        self._before = before
        self._count = 0
        self.scope = scope

    def node(
        self,
        operator: str,
        given: list[ir.Value],
        domain: str = "",
        *,
        shape: Any,
        scope: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        name = f"{scope or self.scope}/{operator}_fused_{self._count}"
        self._count += 1
        node = ir.node(operator, given, attributes=attributes, domain=domain, name=name)
        (output,) = node.outputs
        output.name, output.type = name, ir.TensorType(FLOAT)
        output.shape = shape if isinstance(shape, ir.Shape) or shape is None else ir.Shape(shape)
        self._graph.insert_before(self._before, node)
        return output

    def constant(self, name: str, array: Any) -> ir.Value:
        """A weight, made once for each module."""
        full = f"{self.scope}.fused_{name}"
        return self._weight(full, array)

    def shared(self, name: str, array: Any) -> ir.Value:
        """A weight, made once for all modules that have the same."""
        content = np.ascontiguousarray(array)
        return self._weight(f"{name}.{hashlib.sha256(content.tobytes()).hexdigest()[:16]}", content)

    def _weight(self, name: str, array: Any) -> ir.Value:
        known = self._graph.initializers.get(name)
        return known or new_weight(self._graph, name, ir.tensor(array, name=name))


def made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that makes a value, if it is of that operator."""
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == operator else None


def only_user(node: ir.Node, operator: str) -> ir.Node | None:
    """The node that alone reads a node's result, if it is of that operator."""
    uses = node.outputs[0].uses()
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    (use,) = uses
    return use.node if use.node.op_type == operator else None


def remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node whose results nobody reads, and what was computed for it alone."""
    waiting = [node]
    while waiting:
        unused = waiting.pop()
        if unused.graph is None or any(o.uses() or o.is_graph_output() for o in unused.outputs):
            continue
        producers = [value.producer() for value in unused.inputs if value is not None]
        graph.remove(unused, safe=True)
        waiting += [producer for producer in producers if producer is not None]


def array_of(value: ir.Value | None) -> Any:
    """What a constant holds, or ``None`` of anything else."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def scalar_of(node: ir.Node, index: int) -> float:
    """The one number of a constant input; NaN of anything else."""
    array = array_of(node.inputs[index])
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else float("nan")


def is_vector(value: ir.Value | None) -> bool:
    """Whether a value is a constant of one axis."""
    array = array_of(value)
    return array is not None and array.ndim == 1


def int_of(node: ir.Node, name: str, default: int) -> int:
    """An attribute, or its default."""
    return node.attributes[name].as_int() if name in node.attributes else default


def ints_of(node: ir.Node, name: str) -> list[int]:
    """An attribute; empty where it is left out."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else []
