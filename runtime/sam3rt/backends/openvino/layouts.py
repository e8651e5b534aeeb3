"""Layouts in which OpenVINO's kernels run a decoder faster, in every precision.

OpenVINO computes the same as before, but for the order in which it may add up
(benchmarks/NOTES.md has what each saves).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from openvino import opset13
from openvino.passes import AnyInput, WrapType

from .hidden_layers import exact_gelu, matched

# Rows that are joined to one for an activation, and the channels that are enough without.
_JOINED, _ENOUGH = 64, 128


def rearrange_decoder(model: Any) -> None:
    """Apply all of them in place, where a graph has what they look for.

    Args:
        model: an FP32 ``openvino.Model`` that nothing else uses.
    """
    attention, activation = _Attention(), _Activation()
    for node in model.get_ordered_ops():
        attention.rearrange(node)
        activation.rearrange(node)
    model.validate_nodes_and_infer_types()


class _Attention:
    """Image tokens attend to the prompt's few: a softmax along an axis that is not the last.

    Along the last axis OpenVINO takes one row of a few values after the other. Along another, it
    takes as many rows at once as a vector has lanes.
    """

    def __init__(self) -> None:
        self._query, self._key, self._value = AnyInput(), AnyInput(), AnyInput()
        self._order, self._offset = WrapType("opset13.Constant"), AnyInput()
        turned = WrapType("opset13.Transpose", [self._key, self._order])
        self._matmul1 = WrapType("opset13.MatMul", [self._query, turned])
        self._scores = WrapType("opset13.Add", [self._matmul1, self._offset])
        by_head = WrapType("opset13.Reshape", [self._scores, AnyInput()])
        self._softmax = WrapType("opset13.Softmax", [by_head])
        weights = WrapType("opset13.Reshape", [self._softmax, AnyInput()])
        self._matmul2 = WrapType("opset13.MatMul", [weights, self._value])

    def rearrange(self, node: Any) -> None:
        """Rearrange the attention that ends in a node, if one does."""
        values = matched(self._matmul2, node, {})
        if values is None:
            return
        matmul1, softmax = (values[part].get_node() for part in (self._matmul1, self._softmax))
        shape = softmax.get_output_partial_shape(0)
        turns = values[self._order].get_node().data.tolist()
        plain = not any(any(n.get_attributes().values()) for n in (node, matmul1))
        axis = softmax.get_attributes()["axis"]
        if not plain or turns != [0, 2, 1] or len(shape) != 4 or axis not in (-1, 3):
            return
        if shape[1].is_dynamic or shape[2].is_dynamic:
            return
        image, heads = shape[1].get_length(), shape[2].get_length()
        products = opset13.matmul(values[self._key], values[self._query], False, True)
        scores = opset13.add(products, opset13.transpose(values[self._offset], [0, 2, 1]))
        weights = opset13.softmax(_reshaped(scores, [0, heads, -1, image]), 2)
        flat = _reshaped(weights, [0, -1, image])
        mixed = opset13.matmul(flat, values[self._value], True, False)
        for old, new in (
            (matmul1, products),
            (values[self._scores].get_node(), scores),
            (softmax, weights),
            (node, mixed),
        ):
            new.set_friendly_name(old.get_friendly_name())
        node.output(0).replace(mixed.output(0))


class _Activation:
    """GELU of a sum of two maps with few channels, of which many pixels are taken as one.

    OpenVINO goes through the last axis by itself, and starts anew for each row of it.
    """

    def __init__(self) -> None:
        self._maps = AnyInput(), AnyInput()
        self._sum = WrapType("opset13.Add", list(self._maps))
        self._gelu, self._scalars = exact_gelu(self._sum)

    def rearrange(self, node: Any) -> None:
        """Rearrange the activation that ends in a node, if one does."""
        values = matched(self._gelu, node, self._scalars)
        if values is None:
            return
        maps = [values[part] for part in self._maps]
        shapes = [source.get_partial_shape() for source in maps]
        if any(len(shape) != 3 or shape[1:].is_dynamic for shape in shapes):
            return
        (rows, channels), other = ([side.get_length() for side in s[1:]] for s in shapes)
        if other != [rows, channels] or rows % _JOINED or channels >= _ENOUGH:
            return
        joined = [0, rows // _JOINED, channels * _JOINED]
        total = opset13.add(*(_reshaped(source, joined) for source in maps))
        total.set_friendly_name(values[self._sum].get_node().get_friendly_name())
        active = opset13.gelu(total, "erf")
        active.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(_reshaped(active, [0, rows, channels]).output(0))


def _reshaped(source: Any, shape: list[int]) -> Any:
    """Zeros stand for sides that stay."""
    return opset13.reshape(source, opset13.constant(np.array(shape, np.int64)), True)
