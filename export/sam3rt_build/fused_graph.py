"""Put ONNX Runtime's fused operators into a graph, without changing what it computes.

Four of its own operators (domain ``com.microsoft``) take the place of what the export writes out:

* ``RotaryEmbedding`` turns queries and keys by their positions;
* ``MultiHeadAttention`` takes the place of two products, the softmax between them and all
  transposes, and never holds the scores of all pairs; one product before it takes the place of
  those that make queries, keys and values;
* ``SkipLayerNormalization`` adds a bias and a residual, and normalizes;
* ``BiasGelu`` adds a bias and applies GELU.

ONNX Runtime finds some of these by itself, as it finds them written. In a typed graph casts stand
between, and its attention fusions know other models. All four have FP32 kernels for the CPU, so
that tests compare a fused graph with the plain one. What does not look like this stays as it is:
the decoder's attentions have biases of their own, and are small.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

from .typed_graph import FLOAT, drop_unused_weights, new_weight, scope_of

DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]
# Threads of one block, on every GPU.
_MOST_THREADS = 1024


def fuse(model: ir.Model) -> dict[str, int]:
    """Fuse a graph in place, before a recipe is applied to it.

    Args:
        model: from :func:`.graph_files.load_graph`, in FP32.

    Returns:
        How many of each operator it has now.
    """
    graph = model.graph
    for node in tuple(graph):
        if node.op_type == "Softmax":
            _fuse_attention(graph, node)
    for node in tuple(graph):
        if node.op_type == "LayerNormalization":
            _fuse_skip(graph, node)
        elif node.op_type == "Erf":
            _fuse_gelu(graph, node)
    drop_unused_weights(graph)
    counts: dict[str, int] = {}
    for node in graph:
        if node.domain == DOMAIN:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    if counts:
        graph.opset_imports[DOMAIN] = 1
    return counts


def _fuse_attention(graph: ir.Graph, softmax: ir.Node) -> None:
    """``softmax(q k^T) v``, from the linear layers' results to what the output layer reads."""
    scores, mixed = _made_by(softmax.inputs[0], "MatMul"), _only_user(softmax, "MatMul")
    if scores is None or mixed is None or _int(softmax, "axis", -1) not in (-1, 3):
        return
    turned = _made_by(scores.inputs[1], "Transpose")
    merged = _only_user(mixed, "Transpose")
    if turned is None or merged is None or mixed.inputs[0] is not softmax.outputs[0]:
        return
    if _ints(turned, "perm") != [0, 1, 3, 2] or _ints(merged, "perm") != _HEADS_FIRST:
        return
    found = [_Heads.of(value) for value in (scores.inputs[0], turned.inputs[0], mixed.inputs[1])]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found) or not _belong_together(*parts):
        return
    made = _Maker(graph, merged, scope_of(softmax))
    _, tokens, heads, width = parts[0].sizes
    weights = [part.linear.weight[:, part.order] for part in parts]
    weight = made.constant("qkv", np.concatenate(weights, axis=1))
    product = made.node("MatMul", [parts[0].linear.x, weight], shape=None)
    split = made.split(product, [array.shape[1] for array in weights])
    together = made.constant("together", np.array([-1, tokens, heads * width], np.int64))
    given = []
    for index, (part, x) in enumerate(zip(parts, split, strict=True)):
        bias, scope = part.linear.bias, part.linear.scope
        if index < 2 or not _into_output_layer(made, merged, bias):
            vector = made.constant(f"bias_{index}", bias[part.order])
            x = made.node("Add", [x, vector], scope=scope, shape=None)
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
    _remove_unused(graph, merged)


def _belong_together(query: _Heads, key: _Heads, value: _Heads) -> bool:
    """Whether three layers of one input are an attention's, with no rotation but both's."""
    return (
        value.rotary is None
        and (query.rotary is None) == (key.rotary is None)
        and query.sizes == key.sizes == value.sizes
        and query.linear.x is key.linear.x is value.linear.x
    )


def _rotated(made: _Maker, x: ir.Value, tables: tuple[Any, Any], heads: int) -> ir.Value:
    """Queries or keys, turned by their positions.

    ONNX Runtime's CUDA kernel has a block of threads for each token and head. Rotations that turn
    neighbours do not need to know of heads, so that here one block turns as many heads as fit.
    """
    half = tables[0].shape[1]
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and 2 * half * n <= _MOST_THREADS]
    count = max(fitting, default=1)
    caches = [made.shared("rotary", np.tile(table, (1, count))) for table in tables]
    first = made.constant("first_position", np.array([0], np.int64))
    return made.node("RotaryEmbedding", [x, first, *caches], DOMAIN, shape=x.shape, interleaved=1)


def _into_output_layer(made: _Maker, mixed: ir.Node, bias: Any) -> bool:
    """Add the values' bias to that of the layer behind an attention, if there is one.

    The weights of a softmax add up to one, so that the bias goes through unchanged.
    """
    reshaped = _only_user(mixed, "Reshape")
    product = None if reshaped is None else _only_user(reshaped, "MatMul")
    added = None if product is None else _only_user(product, "Add")
    output = None if added is None else _Linear.of(added.outputs[0])
    if added is None or output is None or output.weight.shape[0] != bias.size:
        return False
    total = output.bias.astype(np.float64) + bias.astype(np.float64) @ output.weight
    index = 0 if _is_vector(added.inputs[0]) else 1
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
        added = _made_by(value, "Add")
        for product, bias in [] if added is None else (added.inputs, added.inputs[::-1]):
            multiplied = _made_by(product, "MatMul")
            if multiplied is None or not _is_vector(bias):
                continue
            x, weight = multiplied.inputs[0], _array(multiplied.inputs[1])
            if x is not None and weight is not None and weight.ndim == 2:
                return cls(x, weight, _array(bias), scope_of(multiplied))
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
        if (added := _made_by(value, "Add")) is not None:
            straight, crossed = (_made_by(given, "Mul") for given in added.inputs)
            if straight is None or crossed is None:
                return None
            value = straight.inputs[0]
            halves = _made_by(crossed.inputs[0], "Concat")
            tables = [_array(node.inputs[1]) for node in (straight, crossed)]
            if halves is None or not _swaps_halves(halves, value):
                return None
            rotary = _rotary_tables(tables)
            if rotary is None:
                return None
        transposed = _made_by(value, "Transpose")
        if transposed is None or _ints(transposed, "perm") != _HEADS_FIRST:
            return None
        split = _made_by(transposed.inputs[0], "Reshape")
        sizes = None if split is None else _array(split.inputs[1])
        linear = None if split is None else _Linear.of(split.inputs[0])
        if linear is None or sizes is None or len(sizes) != 4:
            return None
        return cls(linear, tuple(int(side) for side in sizes), rotary)


def _swaps_halves(halves: ir.Node, value: ir.Value | None) -> bool:
    """Whether a Concat is (-second half, first half) of a value's last axis."""
    if len(halves.inputs) != 2 or _int(halves, "axis", 0) not in (-1, 3):
        return False
    negated, first = _made_by(halves.inputs[0], "Mul"), halves.inputs[1]
    split = _made_by(first, "Split")
    if negated is None or split is None or split.inputs[0] is not value:
        return False
    factor, sizes = _array(negated.inputs[1]), _array(split.inputs[1])
    return (
        negated.inputs[0] is split.outputs[1]
        and first is split.outputs[0]
        and factor is not None
        and factor.size == 1
        and float(factor.reshape(())) == -1.0
        and sizes is not None
        and len(sizes) == 2
        and sizes[0] == sizes[1]
        and _int(split, "axis", 0) in (-1, 3)
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


def _fuse_skip(graph: ir.Graph, norm: ir.Node) -> None:
    """``norm(residual + (x + bias))``, whose sum others read as well."""
    total = _made_by(norm.inputs[0], "Add")
    shape = norm.outputs[0].shape
    # Exported graphs do not state inner shapes. ONNX Runtime refuses to run other ones.
    if shape is not None and len(shape) not in (2, 3):
        return
    if total is None or _int(norm, "axis", -1) not in (-1, 2) or len(norm.inputs) != 3:
        return
    for residual, added in (total.inputs, total.inputs[::-1]):
        biased = _made_by(added, "Add")
        if biased is None or residual is None or len(biased.outputs[0].uses()) != 1:
            continue
        x, bias = biased.inputs
        if x is None or bias is None or not _is_vector(bias) or _made_by(x, "MatMul") is None:
            continue
        # The sum of the embedding's positions comes before all blocks; it has other sizes.
        if residual.is_initializer() or total.outputs[0].is_graph_output():
            continue
        made = _Maker(graph, norm, scope_of(norm))
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
        node = ir.node(
            "SkipLayerNormalization",
            [x, residual, norm.inputs[1], norm.inputs[2], bias],
            attributes={"epsilon": epsilon},
            domain=DOMAIN,
            num_outputs=4,
            name=f"{made.scope}/SkipLayerNormalization_0",
        )
        # Mean and deviation are for training: outputs without a name are not made.
        for index, source in ((0, norm.outputs[0]), (3, total.outputs[0])):
            output = node.outputs[index]
            output.name, output.type, output.shape = (
                f"{source.name}.fused",
                source.type,
                source.shape,
            )
        node.outputs[1].name = node.outputs[2].name = ""
        # Where the sum is made, so that it comes before all that reads it.
        graph.insert_after(total, node)
        ir.convenience.replace_all_uses_with(norm.outputs[0], node.outputs[0])
        graph.remove(norm, safe=True)
        ir.convenience.replace_all_uses_with(total.outputs[0], node.outputs[3])
        _remove_unused(graph, total)
        return


def _fuse_gelu(graph: ir.Graph, erf: ir.Node) -> None:
    """``x (erf(x / sqrt 2) + 1) / 2`` of ``x = product + bias``, as the export writes it."""
    scaled, shifted = _made_by(erf.inputs[0], "Div"), _only_user(erf, "Add")
    if scaled is None or shifted is None:
        return
    biased, product = _made_by(scaled.inputs[0], "Add"), _only_user(shifted, "Mul")
    if biased is None or product is None or biased.outputs[0] not in product.inputs:
        return
    halved = _only_user(product, "Mul")
    x, bias = biased.inputs
    if halved is None or x is None or bias is None or not _is_vector(bias):
        return
    if len(biased.outputs[0].uses()) != 2:
        return
    constants = (_scalar(scaled, 1), _scalar(shifted, 1), _scalar(halved, 1))
    if not np.allclose(constants, (np.sqrt(2), 1, 0.5), rtol=1e-6):
        return
    made = _Maker(graph, halved, scope_of(halved))
    y = made.node("BiasGelu", [x, bias], DOMAIN, shape=halved.outputs[0].shape)
    ir.convenience.replace_all_uses_with(halved.outputs[0], y)
    _remove_unused(graph, halved)


class _Maker:
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

    def split(self, value: ir.Value, widths: list[int]) -> list[ir.Value]:
        """Parts of a value's last axis."""
        name = f"{self.scope}/Split_fused_{self._count}"
        self._count += 1
        sizes = self.constant("widths", np.array(widths, np.int64))
        node = ir.node(
            "Split", [value, sizes], attributes={"axis": -1}, num_outputs=len(widths), name=name
        )
        for index, output in enumerate(node.outputs):
            output.name, output.type = f"{name}.{index}", ir.TensorType(FLOAT)
        self._graph.insert_before(self._before, node)
        return list(node.outputs)

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


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == operator else None


def _only_user(node: ir.Node, operator: str) -> ir.Node | None:
    uses = node.outputs[0].uses()
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    (use,) = uses
    return use.node if use.node.op_type == operator else None


def _remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node whose results nobody reads, and what was computed for it alone."""
    waiting = [node]
    while waiting:
        unused = waiting.pop()
        if unused.graph is None or any(o.uses() or o.is_graph_output() for o in unused.outputs):
            continue
        producers = [value.producer() for value in unused.inputs if value is not None]
        graph.remove(unused, safe=True)
        waiting += [producer for producer in producers if producer is not None]


def _array(value: ir.Value | None) -> Any:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def _scalar(node: ir.Node, index: int) -> float:
    array = _array(node.inputs[index])
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else float("nan")


def _is_vector(value: ir.Value | None) -> bool:
    array = _array(value)
    return array is not None and array.ndim == 1


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _ints(node: ir.Node, name: str) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else []
