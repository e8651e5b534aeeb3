"""Mixed precision for OpenVINO: retypes an FP32 graph so that its costly parts run in BF16.

OpenVINO's own BF16 mode also rounds the sum over the blocks at every addition, which is most of its
error. PyTorch's autocast keeps that sum and the normalizations in FP32, and so does this pass. A
decoder has two blocks, and what runs over its image tokens is bound by memory, so all of that is
BF16, sums too, and what runs over the prompt's few tokens is FP32.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13
from openvino.passes import ConstantFolding, Manager

# Patterns for operators that stay FP32. The export names nodes after module paths.
NOTHING = re.compile(r"(?!)")
# In any encoder: EfficientViT's attention, which divides by sums over all pixels, and RepViT's
# depthwise mixers, which replace the stream that blocks add to.
FRAGILE = re.compile(r".*\b(linear_attention|mixer)/")
# In an encoder: that, the patch convolution and the first two blocks, because all others build on
# them, and the layers that turn the last block's result into feature maps. 7 % of the operations.
FIRST_BLOCKS = re.compile(r".*\b(linear_attention|mixer)/|patch/|blocks\.[01]\.|project|up|out")
# In a decoder: everything but the layers that run over the image. The prompt's few tokens cost
# little, and in BF16 a click would be some pixels off.
TOKENS = re.compile(r"(?!up[12]/|graph/|blocks\.\d+\.(token_to_image|image_to_token)|final)")
_MATMULS = frozenset({"MatMul", "Convolution"})
_MOVES = frozenset({"Reshape", "Transpose"})
# Operators that become BF16 if all their inputs are BF16 already: biases, activations, rotary
# embeddings, softmax and operators that only move values. In FP32 between two BF16 matmuls they
# would cost two conversions each and keep OpenVINO from fusing them.
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
# What becomes BF16 where it runs over a decoder's image tokens, whatever it reads.
_OVER_IMAGE = _BETWEEN | _MATMULS | {"MVN"}


def matmuls_in_bf16(
    model: Any, exact: re.Pattern[str] = NOTHING, tokens: int | None = None
) -> None:
    """Retype an FP32 graph in place: matmuls, and operators that read nothing but their results.

    An operator that also reads an FP32 value stays FP32, such as the addition of a block's result
    to the residual stream. Normalizations stay FP32 too. Whatever runs over a decoder's image
    tokens becomes BF16 all the same.

    Args:
        model: an ``openvino.Model`` that nothing else uses.
        exact: matches, from the beginning, the names of operators that stay FP32.
        tokens: of a decoder, how many tokens the image has.
    """
    axes: frozenset[int] = frozenset()
    if tokens is not None:
        # Positions are computed from constants. OpenVINO would truncate them, see below.
        folding = Manager()
        folding.register_pass(ConstantFolding())
        folding.run_passes(model)
        axes = _image_axes(model, tokens)
    for node in model.get_ordered_ops():
        wide = [p for p in node.inputs() if _type_name(p) == "f32"]
        if wide and _becomes_bf16(node, wide, exact, axes):
            _retype(node, wide)
    model.validate_nodes_and_infer_types()


def rounded_constant(values: NDArray[np.float32]) -> Any:
    """A constant of the BF16 values nearest to FP32 ones; ties go to the even value.

    OpenVINO 2026.4 folds a conversion that is left in the graph, and truncates half of the values
    instead of rounding them. A quarter end up one step too small, which biases every matmul.

    Args:
        values: float32 of any shape.

    Returns:
        An ``openvino`` constant node of element type bf16.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Half a step less a bit, and that bit for odd ones; NaN would overflow to a number.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded[np.isnan(values)] = 0x7FC0
    tensor = openvino.Tensor(openvino.Type.bf16, openvino.Shape(values.shape))
    tensor.data.view(np.uint16)[...] = rounded
    return opset13.constant(tensor)


def _becomes_bf16(node: Any, wide: list[Any], exact: re.Pattern[str], axes: frozenset[int]) -> bool:
    kind = node.get_type_name()
    if kind in _OVER_IMAGE and _has_axis(node, axes):
        return True
    if kind in _MOVES:  # rounds nothing, whatever its name
        return _follows_from_matmuls(wide)
    if exact.match(node.get_friendly_name()):
        return False
    return kind in _MATMULS or (kind in _BETWEEN and _follows_from_matmuls(wide))


def _image_axes(model: Any, tokens: int) -> frozenset[int]:
    """Sizes of the axis over the image: its tokens, enlarged once, and twice.

    A size that a matmul's weights have as well could be channels, and is left out.
    """
    channels: set[int] = set()
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            weights = node.input_value(1).get_node()
            if weights.get_type_name() == "Constant":
                channels.update(weights.get_output_shape(0))
    return frozenset({tokens, 4 * tokens, 16 * tokens} - channels)


def _has_axis(node: Any, sizes: frozenset[int]) -> bool:
    shape = node.get_output_partial_shape(0)
    return any(side.is_static and side.get_length() in sizes for side in shape)


def _follows_from_matmuls(ports: list[Any]) -> bool:
    sources = [port.get_source_output() for port in ports]
    return any(map(_is_widened, sources)) and all(
        _is_widened(s) or s.get_node().get_type_name() == "Constant" for s in sources
    )


def _is_widened(source: Any) -> bool:
    """Whether an FP32 value is a BF16 one, converted."""
    node = source.get_node()
    return _is_conversion(node) and _type_name(node.input_value(0)) == "bf16"


def _is_conversion(node: Any) -> bool:
    return bool(node.get_type_name() == "Convert")


def _type_name(port: Any) -> str:
    return str(port.get_element_type().get_type_name())


def _retype(node: Any, ports: list[Any]) -> None:
    """Let a node compute in BF16, and give FP32 to those that have taken its results so far."""
    for port in ports:
        port.replace_source_output(_narrowed(port.get_source_output()))
    node.validate_and_infer_types()
    for output in node.outputs():
        # Before the conversion takes it as well.
        consumers = list(output.get_target_inputs())
        widened = opset13.convert(output, "f32").output(0)
        for consumer in consumers:
            consumer.replace_source_output(widened)


def _narrowed(source: Any) -> Any:
    """An FP32 value in BF16, converted where that is cheapest: before it is moved around."""
    node = source.get_node()
    if _is_widened(source):
        return node.input_value(0)
    if node.get_type_name() == "Constant":
        return rounded_constant(node.data).output(0)
    if node.get_type_name() in _MOVES and len(source.get_target_inputs()) == 1:
        node.input(0).replace_source_output(_narrowed(node.input_value(0)))
        node.validate_and_infer_types()
        return source
    for target in source.get_target_inputs():
        if _type_name(target.get_node().output(0)) == "bf16" and _is_conversion(target.get_node()):
            return target.get_node().output(0)
    return opset13.convert(source, "bf16").output(0)
