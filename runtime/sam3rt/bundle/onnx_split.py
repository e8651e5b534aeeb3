"""Cuts an ONNX graph in two, without the onnx package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .onnx_wire import Field, fields, message_field

# GraphProto's fields.
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13
# The messages whose names matter, and the field that holds them.
_NAMED = {
    _INITIALIZER: ("TensorProto", 8),
    _INPUT: ("ValueInfoProto", 1),
    _VALUE_INFO: ("ValueInfoProto", 1),
}
# TypeProto of a tensor of float32 and any shape.
_FLOAT32 = bytes([0x0A, 2, 8, 1])


class Parts(NamedTuple):
    """A graph in two parts.

    Attributes:
        first: ``.onnx`` file from some inputs to the values at the cut.
        rest: from those values and the other inputs to the outputs.
        cut: names of the values.
        inputs: names of the whole graph's inputs, in its order.
    """

    first: bytes
    rest: bytes
    cut: tuple[str, ...]
    inputs: tuple[str, ...]


class _Node(NamedTuple):
    field: Field
    inputs: frozenset[bytes]
    outputs: tuple[bytes, ...]
    operator: bytes


def split_onnx(content: bytes, inputs: Iterable[str]) -> Parts | None:
    """Cut a graph behind the last operators that read nothing but some inputs and constants.

    Values at the cut are taken for float32 where the file does not say what they are.

    Args:
        content: an ``.onnx`` file that :func:`.onnx_locations.check_tensor_locations` has accepted.
        inputs: names of those inputs.

    Returns:
        ``None`` where one of them is also read behind the cut, or none alone, and where values have
        odd names or descriptions: whoever loads the whole judges those.
    """
    try:
        return _split(content, inputs)
    except ValueError:  # Malformed and Refused among them
        return None


def _split(content: bytes, inputs: Iterable[str]) -> Parts | None:
    graph = next(f for f in fields(content, 0, len(content), "ModelProto") if f.number == 7)
    parts = list(fields(content, graph.start, graph.end, "GraphProto"))
    nodes = [_node(content, field) for field in parts if field.number == _NODE]
    given = {name.encode() for name in inputs}
    names = {f: _name(content, f, *_NAMED[f.number]) for f in parts if f.number in _NAMED}
    constant = {name for field, name in names.items() if field.number == _INITIALIZER}
    readers: dict[bytes, set[bytes]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, set()).add(node.operator)

    early, first, late = set(given), [], []
    for node in nodes:
        if node.inputs <= constant:
            constant.update(node.outputs)
            first.append(node)
            late.append(node)
        # What a matmul transposes by itself is not transposed before.
        elif node.inputs <= early | constant and not (
            node.operator == b"Transpose" and readers.get(node.outputs[0]) == {b"MatMul"}
        ):
            early.update(node.outputs)
            first.append(node)
        else:
            late.append(node)
    read_late = frozenset[bytes]().union(*(node.inputs for node in late))
    cut = [name for node in first for name in node.outputs if name in read_late & early]
    if not cut or read_late & given:
        return None

    infos = {name: field for field, name in names.items() if field.number == _VALUE_INFO}
    described = [
        content[infos[name].start : infos[name].end]
        if name in infos
        else message_field(1, name) + message_field(2, _FLOAT32)
        for name in cut
    ]

    def part(nodes: list[_Node], is_first: bool) -> bytes:
        read: set[bytes] = set()
        kept = set()
        # From the end, since constants that only the other part reads are left out.
        for node in reversed(nodes):
            if constant.isdisjoint(node.outputs) or not read.isdisjoint(node.outputs):
                read |= node.inputs
                kept.add(node.field)
        body = []
        for field in parts:
            if field.number == _NODE:
                stays = field in kept
            elif field.number == _INITIALIZER:
                stays = names[field] in read
            elif field.number == _INPUT:
                stays = (names[field] in given) == is_first
            elif field.number == _OUTPUT:
                stays = not is_first
            else:
                stays = field.number != _VALUE_INFO
            if stays:
                body.append(content[field.tag : field.end])
        body += [message_field(_OUTPUT if is_first else _INPUT, info) for info in described]
        whole = message_field(7, b"".join(body))
        return content[: graph.tag] + whole + content[graph.end :]

    whole = [name for field, name in names.items() if field.number == _INPUT]
    return Parts(part(first, True), part(late, False), _decoded(cut), _decoded(whole))


def _decoded(names: Iterable[bytes]) -> tuple[str, ...]:
    return tuple(name.decode() for name in names)


def _node(content: bytes, field: Field) -> _Node:
    inputs, outputs, operator = [], [], b""
    for inner in fields(content, field.start, field.end, "NodeProto"):
        value = content[inner.start : inner.end]
        if inner.number == 1 and value:
            inputs.append(value)
        elif inner.number == 2:
            outputs.append(value)
        elif inner.number == 4:
            operator = value
    return _Node(field, frozenset(inputs), tuple(outputs), operator)


def _name(content: bytes, field: Field, message: str, number: int) -> bytes:
    """The name that a message holds in a field; empty where there is none."""
    for inner in fields(content, field.start, field.end, message):
        if inner.number == number:
            return content[inner.start : inner.end]
    return b""
