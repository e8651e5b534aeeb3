"""Mixed precision for OpenVINO: an FP32 graph, retyped so that what costs time runs in BF16.

OpenVINO's own BF16 mode also rounds what the blocks add up, at each addition, which is most of
its error. PyTorch's autocast keeps that sum and the normalizations in FP32; so does this.
"""

from __future__ import annotations

import re
from typing import Any

# Matrix products that stay FP32, by the module paths that the export names nodes after: the first
# two blocks, on whose results all others build, and what makes the feature maps of the last
# block's. 7 % of the products, a third of the error's square (benchmarks/NOTES.md).
_EXACT = re.compile(r"blocks\.[01]\.|project|up")
# What is computed in BF16 where all it takes is BF16 already: biases, activations, rotary
# embeddings and attention's softmax, and what only moves values. Left in FP32 halfway between two
# products, they would cost two conversions each and keep OpenVINO from fusing them.
_BETWEEN = frozenset(
    {
        "Add",
        "Concat",
        "Divide",
        "Erf",
        "Gelu",
        "Multiply",
        "Negative",
        "Reshape",
        "Softmax",
        "Split",
        "Squeeze",
        "Subtract",
        "Transpose",
        "Unsqueeze",
        "VariadicSplit",
    }
)


def products_in_bf16(model: Any) -> None:
    """Retype an FP32 graph in place: matrix products in BF16, and what follows from them alone.

    Products of the first two blocks and of the neck stay FP32.

    An operator that also takes an FP32 result, such as the addition of a block's result to the
    stream of all blocks, stays FP32; so do normalizations, and convolutions, of which the encoder
    has few.

    Args:
        model: an ``openvino.Model`` that nothing else uses.
    """
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        wide = [p for p in node.inputs() if _type_name(p) == "f32"]
        narrow = (
            not _EXACT.match(node.get_friendly_name())
            if kind == "MatMul"
            else kind in _BETWEEN and _follows_from_products(wide)
        )
        if narrow:
            _retype(node, wide)
    model.validate_nodes_and_infer_types()


def _follows_from_products(ports: list[Any]) -> bool:
    sources = [port.get_source_output() for port in ports]
    return any(map(_is_widened, sources)) and all(
        _is_widened(s) or s.get_node().get_type_name() == "Constant" for s in sources
    )


def _is_widened(source: Any) -> bool:
    """Whether an FP32 value is a BF16 one, converted."""
    node = source.get_node()
    if node.get_type_name() != "Convert":
        return False
    return _type_name(node.input_value(0)) == "bf16"


def _type_name(port: Any) -> str:
    return str(port.get_element_type().get_type_name())


def _retype(node: Any, ports: list[Any]) -> None:
    """Let a node compute in BF16, and give FP32 to those that have taken its results so far."""
    from openvino import opset13  # here, so that the module imports where OpenVINO is not installed

    for port in ports:
        source = port.get_source_output()
        narrow = (
            source.get_node().input_value(0)
            if _is_widened(source)
            else opset13.convert(source, "bf16").output(0)
        )
        port.replace_source_output(narrow)
    node.validate_and_infer_types()
    for output in node.outputs():
        # Before the conversion takes it as well.
        consumers = list(output.get_target_inputs())
        widened = opset13.convert(output, "f32").output(0)
        for consumer in consumers:
            consumer.replace_source_output(widened)
