"""Splits wide hidden layers into parts, for OpenVINO's matmuls on processors with tiles (AMX).

On such a processor a wide matmul takes longer per operation than a narrow one. A hidden layer of
5,184 by 4,736 values also leaves the caches before it is read again. Splitting the layer helps both
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import opset13
from openvino.passes import AnyInput, Matcher, WrapType

from .bf16 import NOTHING, rounded_constant

# What exact GELU, x/2 (1 + erf(x / sqrt 2)), is made of.
_ROOT_2, _ONE, _HALF = math.sqrt(2.0), 1.0, 0.5

# A part whose width is a multiple of this takes a fifth less time than one of about the same width
# that is not (measured, OpenVINO 2026.4).
_UNIT = 64


def split_hidden_layers(model: Any, width: int, exact: re.Pattern[str] = NOTHING) -> int:
    """Split the wide hidden layers of a graph, in place, for matmuls that will be BF16.

    The pass looks for an MLP with exact GELU and the sum it ends in,
    ``s + (W2 gelu(W1 x + b1) + b2)``. It computes the same by adding to ``s``, one after the other,
    the share of each part of the hidden channels. Parts are about equally wide. Their weights are
    rounded to BF16 at once, which avoids a second FP32 copy. Matmuls and additions keep their
    names, by which other passes know them.

    Args:
        model: an FP32 ``openvino.Model`` that nothing else uses.
        width: the greatest number of channels of a part, at least 1. Layers that are no wider stay
            as they are.
        exact: matches, from the beginning, the names of matmuls that stay FP32. Their layers stay
            as they are.

    Returns:
        How many layers were split.
    """
    pattern = _Pattern()
    count = 0
    for node in model.get_ordered_ops():
        layer = pattern.match(node)
        if layer is not None and layer.hidden > width and not any(map(exact.match, layer.names)):
            _replace(layer, width)
            count += 1
    model.validate_nodes_and_infer_types()
    return count


def exact_gelu(x: Any) -> tuple[Any, dict[Any, float]]:
    """A pattern of exact GELU over another pattern, and the scalars in it with their values."""
    scalars = {WrapType("opset13.Constant"): value for value in (_ROOT_2, _ONE, _HALF)}
    root_2, one, half = scalars
    erf = WrapType("opset13.Erf", [WrapType("opset13.Divide", [x, root_2])])
    grown = WrapType("opset13.Multiply", [x, WrapType("opset13.Add", [erf, one])])
    return WrapType("opset13.Multiply", [grown, half]), scalars


def matched(pattern: Any, node: Any, scalars: Mapping[Any, float]) -> dict[Any, Any] | None:
    """The values that match the parts of a pattern that ends in a node.

    Args:
        pattern: its last part.
        node: where it is to end.
        scalars: constants of the pattern and the values they are to have.

    Returns:
        An output by part, or ``None`` where the node or a constant is another.
    """
    matcher = Matcher(pattern, "pattern")
    if not matcher.match(node.output(0)):
        return None
    values: dict[Any, Any] = matcher.get_pattern_value_map()
    if not all(np.allclose(values[s].get_node().data, value) for s, value in scalars.items()):
        return None
    return values


@dataclass(frozen=True)
class _Layer:
    """An MLP's nodes, ``total = stream + W2 gelu(W1 x + b1) + b2``; the stream is an output."""

    matmul1: Any
    bias1: Any
    matmul2: Any
    bias2: Any
    stream: Any
    total: Any

    @property
    def weights(self) -> list[NDArray[np.float32]]:
        """W1, [inputs, hidden], and W2, [hidden, outputs]."""
        return [p.input_value(1).get_node().data for p in (self.matmul1, self.matmul2)]

    @property
    def hidden(self) -> int:
        return int(self.matmul1.input_value(1).get_shape()[1])

    @property
    def names(self) -> list[str]:
        """Of the matmuls."""
        return [p.get_friendly_name() for p in (self.matmul1, self.matmul2)]


class _Pattern:
    """Recognizes layers by the node they end in."""

    def __init__(self) -> None:
        def constant() -> Any:
            return WrapType("opset13.Constant")

        def both(kind: str, *inputs: Any) -> Any:
            return WrapType(f"opset13.{kind}", list(inputs))

        self._stream, self._bias1, self._bias2 = AnyInput(), constant(), constant()
        self._matmul1 = both("MatMul", AnyInput(), constant())
        gelu, self._scalars = exact_gelu(both("Add", self._matmul1, self._bias1))
        self._matmul2 = both("MatMul", gelu, constant())
        self._total = both("Add", self._stream, both("Add", self._matmul2, self._bias2))

    def match(self, node: Any) -> _Layer | None:
        """The layer that ends in this node, if one does."""
        values = matched(self._total, node, self._scalars)
        if values is None:
            return None
        nodes = {key: value.get_node() for key, value in values.items()}
        matmuls = nodes[self._matmul1], nodes[self._matmul2]
        if any(any(matmul.get_attributes().values()) for matmul in matmuls):
            return None
        return _Layer(
            matmul1=matmuls[0],
            bias1=nodes[self._bias1],
            matmul2=matmuls[1],
            bias2=nodes[self._bias2],
            stream=values[self._stream],
            total=node,
        )


def _sizes(hidden: int, width: int) -> list[int]:
    """Channels of each part: about equal, none wider than asked, whole vectors where that goes."""
    unit = _UNIT if hidden % _UNIT == 0 and width >= _UNIT else 1
    units, most = hidden // unit, width // unit
    parts = np.array_split(np.empty(units), -(-units // most))
    return [unit * len(part) for part in parts]


def _replace(layer: _Layer, width: int) -> None:
    def part(values: NDArray[np.float32]) -> Any:
        return opset13.convert(rounded_constant(values), "f32")

    sizes = _sizes(layer.hidden, width)
    ends = np.cumsum(sizes)[:-1]
    weight1, weight2 = layer.weights
    columns, rows = np.split(weight1, ends, axis=1), np.split(weight2, ends, axis=0)
    biases = np.split(layer.bias1.data.reshape(-1), ends)
    names = layer.names
    x = layer.matmul1.input_value(0)
    total = layer.stream
    for index, (column, bias, row) in enumerate(zip(columns, biases, rows, strict=True)):
        first = opset13.matmul(x, part(column), False, False)
        first.set_friendly_name(f"{names[0]}/part_{index}")
        hidden = opset13.gelu(opset13.add(first, part(bias)), "erf")
        hidden.set_friendly_name(f"{names[0]}/gelu_{index}")
        share = opset13.matmul(hidden, part(row), False, False)
        share.set_friendly_name(f"{names[1]}/part_{index}")
        if index == len(sizes) - 1:
            share = opset13.add(share, layer.bias2)
        # To the stream, not to each other: what adds to an FP32 value stays FP32.
        total = opset13.add(total, share)
    total.set_friendly_name(layer.total.get_friendly_name())
    layer.total.output(0).replace(total.output(0))
