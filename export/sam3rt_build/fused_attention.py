"""Attention as ONNX Runtime's fused operators: see :mod:`.fused_graph`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .graph_patterns import (
    DOMAIN,
    Maker,
    array_of,
    int_of,
    ints_of,
    is_vector,
    made_by,
    only_user,
    remove_unused,
)
from .typed_graph import scope_of

_HEADS_FIRST = [0, 2, 1, 3]
# Threads of one block that turns tokens. On an H200, one head's are half as fast, and the most that
# there can be are slower, too (benchmarks/results/h200/operators.txt).
_MOST_THREADS = 256


def fuse_attention(graph: ir.Graph, softmax: ir.Node) -> None:
    """``softmax(q k^T) v``, from the linear layers' results to what the output layer reads."""
    scores, mixed = made_by(softmax.inputs[0], "MatMul"), only_user(softmax, "MatMul")
    if scores is None or mixed is None or int_of(softmax, "axis", -1) not in (-1, 3):
        return
    turned = made_by(scores.inputs[1], "Transpose")
    merged = only_user(mixed, "Transpose")
    if turned is None or merged is None or mixed.inputs[0] is not softmax.outputs[0]:
        return
    if ints_of(turned, "perm") != [0, 1, 3, 2] or ints_of(merged, "perm") != _HEADS_FIRST:
        return
    found = [_Heads.of(value) for value in (scores.inputs[0], turned.inputs[0], mixed.inputs[1])]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found) or not _belong_together(*parts):
        return
    made = Maker(graph, merged, scope_of(softmax))
    _, tokens, heads, width = parts[0].sizes
    together = made.constant("together", np.array([-1, tokens, heads * width], np.int64))
    given = []
    for index, part in enumerate(parts):
        linear = part.linear
        # One product for all three saves less than it costs to split its result (operators.txt).
        weight = made.constant(f"weight_{index}", linear.weight[:, part.order])
        x = made.node("MatMul", [linear.x, weight], scope=linear.scope, shape=None)
        if index < 2 or not _into_output_layer(made, merged, linear.bias):
            vector = made.constant(f"bias_{index}", linear.bias[part.order])
            x = made.node("Add", [x, vector], scope=linear.scope, shape=None)
        x = made.node("Reshape", [x, together], shape=("groups", tokens, heads * width))
        given.append(x if part.rotary is None else _rotated(made, x, part.rotary, heads))
    # The scale is part of the query's weights.
    y = made.node(
        "MultiHeadAttention",
        given,
        DOMAIN,
        shape=given[0].shape,
        num_heads=heads,
        scale=1.0,
    )
    ir.convenience.replace_all_uses_with(merged.outputs[0], y)
    remove_unused(graph, merged)


def _belong_together(query: _Heads, key: _Heads, value: _Heads) -> bool:
    """Whether three layers of one input are an attention's, with no rotation but both's."""
    return (
        value.rotary is None
        and (query.rotary is None) == (key.rotary is None)
        and query.sizes == key.sizes == value.sizes
        and query.linear.x is key.linear.x is value.linear.x
    )


def _rotated(made: Maker, x: ir.Value, tables: tuple[Any, Any], heads: int) -> ir.Value:
    """Queries or keys, turned by their positions.

    ONNX Runtime's CUDA kernel has a block of threads for each token and head. Rotations that turn
    neighbours do not need to know of heads, so that here one block turns several heads.
    """
    half = tables[0].shape[1]
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and 2 * half * n <= _MOST_THREADS]
    count = max(fitting, default=1)
    caches = [made.shared("rotary", np.tile(table, (1, count))) for table in tables]
    first = made.constant("first_position", np.array([0], np.int64))
    return made.node("RotaryEmbedding", [x, first, *caches], DOMAIN, shape=x.shape, interleaved=1)


def _into_output_layer(made: Maker, mixed: ir.Node, bias: Any) -> bool:
    """Add the values' bias to that of the layer behind an attention, if there is one.

    The weights of a softmax add up to one, so that the bias goes through unchanged.
    """
    reshaped = only_user(mixed, "Reshape")
    product = None if reshaped is None else only_user(reshaped, "MatMul")
    added = None if product is None else only_user(product, "Add")
    output = None if added is None else _Linear.of(added.outputs[0])
    if added is None or output is None or output.weight.shape[0] != bias.size:
        return False
    total = output.bias.astype(np.float64) + bias.astype(np.float64) @ output.weight
    index = 0 if is_vector(added.inputs[0]) else 1
    added.replace_input_with(index, made.constant("output_bias", total.astype(np.float32)))
    return True


class _Linear:
    """A linear layer: ``x @ weight + bias``.

    Attributes:
        x: what it reads.
        weight: float32 [inputs, outputs].
        bias: float32 [outputs].
        scope: the module's name.
    """

    def __init__(self, x: ir.Value, weight: Any, bias: Any, scope: str) -> None:
        self.x = x
        self.weight = weight
        self.bias = bias
        self.scope = scope

    @classmethod
    def of(cls, value: ir.Value | None) -> _Linear | None:
        """The layer that yields a value, or ``None`` where something else does."""
        added = made_by(value, "Add")
        for product, bias in [] if added is None else (added.inputs, added.inputs[::-1]):
            multiplied = made_by(product, "MatMul")
            if multiplied is None or not is_vector(bias):
                continue
            x, weight = multiplied.inputs[0], array_of(multiplied.inputs[1])
            if x is not None and weight is not None and weight.ndim == 2:
                return cls(x, weight, array_of(bias), scope_of(multiplied))
        return None


class _Heads:
    """A linear layer's result, split into heads and perhaps turned by position.

    Attributes:
        linear: the layer, of [B, T, heads * width].
        sizes: of the split: (-1, tokens, heads, width).
        rotary: cosines and sines, float32 [tokens, width / 2] each, or ``None``.
    """

    def __init__(self, linear: _Linear, sizes: tuple[int, ...], rotary: Any) -> None:
        self.linear = linear
        self.sizes = sizes
        self.rotary = rotary

    @property
    def order(self) -> Any:
        """Of its columns: a rotation turns neighbours, not the halves of a head."""
        _, _, heads, width = self.sizes
        columns = np.arange(heads * width)
        return (
            columns if self.rotary is None else columns.reshape(heads, 2, -1).swapaxes(1, 2).ravel()
        )

    @classmethod
    def of(cls, value: ir.Value | None) -> _Heads | None:
        """What a value is, or ``None`` where it is something else."""
        rotary = None
        if (added := made_by(value, "Add")) is not None:
            straight, crossed = (made_by(given, "Mul") for given in added.inputs)
            if straight is None or crossed is None:
                return None
            value = straight.inputs[0]
            halves = made_by(crossed.inputs[0], "Concat")
            tables = [array_of(node.inputs[1]) for node in (straight, crossed)]
            if halves is None or not _swaps_halves(halves, value):
                return None
            rotary = _rotary_tables(tables)
            if rotary is None:
                return None
        transposed = made_by(value, "Transpose")
        if transposed is None or ints_of(transposed, "perm") != _HEADS_FIRST:
            return None
        split = made_by(transposed.inputs[0], "Reshape")
        sizes = None if split is None else array_of(split.inputs[1])
        linear = None if split is None else _Linear.of(split.inputs[0])
        if linear is None or sizes is None or len(sizes) != 4:
            return None
        return cls(linear, tuple(int(side) for side in sizes), rotary)


def _swaps_halves(halves: ir.Node, value: ir.Value | None) -> bool:
    """Whether a Concat is (-second half, first half) of a value's last axis."""
    if len(halves.inputs) != 2 or int_of(halves, "axis", 0) not in (-1, 3):
        return False
    negated, first = made_by(halves.inputs[0], "Mul"), halves.inputs[1]
    split = made_by(first, "Split")
    if negated is None or split is None or split.inputs[0] is not value:
        return False
    factor, sizes = array_of(negated.inputs[1]), array_of(split.inputs[1])
    return (
        negated.inputs[0] is split.outputs[1]
        and first is split.outputs[0]
        and factor is not None
        and factor.size == 1
        and float(factor.reshape(())) == -1.0
        and sizes is not None
        and len(sizes) == 2
        and sizes[0] == sizes[1]
        and int_of(split, "axis", 0) in (-1, 3)
    )


def _rotary_tables(tables: list[Any]) -> tuple[Any, Any] | None:
    """Cosines and sines of one half, where both halves have the same."""
    found = []
    for table in tables:
        if table is None or table.ndim != 4 or table.shape[:2] != (1, 1):
            return None
        half = table.shape[3] // 2
        if not np.array_equal(table[..., :half], table[..., half:]):
            return None
        found.append(np.ascontiguousarray(table[0, 0, :, :half]))
    return found[0], found[1]
