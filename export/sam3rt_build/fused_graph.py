"""Put ONNX Runtime's fused operators into a graph, without changing what it computes.

Four of its own operators (domain ``com.microsoft``) take the place of what the export writes out:

* ``RotaryEmbedding`` turns queries and keys by their positions;
* ``MultiHeadAttention`` takes the place of two products, the softmax between them and all
  transposes, and never holds the scores of all pairs;
* ``SkipLayerNormalization`` adds a bias and a residual, and normalizes;
* ``BiasGelu`` adds a bias and applies GELU.

ONNX Runtime finds some of these by itself, as it finds them written. In a typed graph casts stand
between, and its attention fusions know other models. All four have FP32 kernels for the CPU, so
that tests compare a fused graph with the plain one. What does not look like this stays as it is:
the decoder's attentions have biases of their own, and are small.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .fused_attention import fuse_attention
from .graph_patterns import (
    DOMAIN,
    Maker,
    int_of,
    is_vector,
    made_by,
    only_user,
    remove_unused,
    scalar_of,
)
from .typed_graph import drop_unused_weights, scope_of


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
            fuse_attention(graph, node)
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


def _fuse_skip(graph: ir.Graph, norm: ir.Node) -> None:
    """``norm(residual + (x + bias))``, whose sum others read as well."""
    total = made_by(norm.inputs[0], "Add")
    shape = norm.outputs[0].shape
    # Exported graphs do not state inner shapes. ONNX Runtime refuses to run other ones.
    if shape is not None and len(shape) not in (2, 3):
        return
    if total is None or int_of(norm, "axis", -1) not in (-1, 2) or len(norm.inputs) != 3:
        return
    for residual, added in (total.inputs, total.inputs[::-1]):
        biased = made_by(added, "Add")
        if biased is None or residual is None or len(biased.outputs[0].uses()) != 1:
            continue
        x, bias = biased.inputs
        if x is None or bias is None or not is_vector(bias) or made_by(x, "MatMul") is None:
            continue
        # The sum of the embedding's positions comes before all blocks; it has other sizes.
        if residual.is_initializer() or total.outputs[0].is_graph_output():
            continue
        made = Maker(graph, norm, scope_of(norm))
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
        remove_unused(graph, total)
        return


def _fuse_gelu(graph: ir.Graph, erf: ir.Node) -> None:
    """``x (erf(x / sqrt 2) + 1) / 2`` of ``x = product + bias``, as the export writes it."""
    scaled, shifted = made_by(erf.inputs[0], "Div"), only_user(erf, "Add")
    if scaled is None or shifted is None:
        return
    biased, product = made_by(scaled.inputs[0], "Add"), only_user(shifted, "Mul")
    if biased is None or product is None or biased.outputs[0] not in product.inputs:
        return
    halved = only_user(product, "Mul")
    x, bias = biased.inputs
    if halved is None or x is None or bias is None or not is_vector(bias):
        return
    if len(biased.outputs[0].uses()) != 2:
        return
    constants = (scalar_of(scaled, 1), scalar_of(shifted, 1), scalar_of(halved, 1))
    if not np.allclose(constants, (np.sqrt(2), 1, 0.5), rtol=1e-6):
        return
    made = Maker(graph, halved, scope_of(halved))
    y = made.node("BiasGelu", [x, bias], DOMAIN, shape=halved.outputs[0].shape)
    ir.convenience.replace_all_uses_with(halved.outputs[0], y)
    remove_unused(graph, halved)
