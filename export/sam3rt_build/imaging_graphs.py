"""Preprocessing and postprocessing as ONNX graphs, for engines that stand around the network.

An antialiased resize and a bilinear upsampling are linear in each axis, so each is a matmul with
one matrix from either side. The matrices are inputs: they depend on the image's size alone and
are computed on the host, in :mod:`sam3rt.geometry` and :mod:`sam3rt.masks.upsampling`. With them a
graph serves every size, and holds neither interpolation nor data-dependent shapes.

The graphs compute in FP32, and must be built so, without TF32: a mask's edge is where a sum of
large terms passes zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sam3rt.backends.tensorrt.imaging import (
    COLUMNS,
    IMAGE,
    LOGITS,
    MASKS,
    PIXELS,
    ROWS,
    THRESHOLD,
)
from sam3rt.bundle import Manifest
from sam3rt.errors import BackendError

if TYPE_CHECKING:
    import onnx

OPSET = 18
_IR_VERSION = 9


def preprocess_graph(manifest: Manifest) -> onnx.ModelProto:
    """Image to encoder input.

    Inputs: ``image`` uint8 [height, width, 3]; ``rows`` float32 [S, height] and ``columns``
    float32 [width, S], from :func:`sam3rt.geometry.resize_matrices`, zero where the encoder's
    input is padding. Output: ``pixel_values`` float32 [1, 3, S, S].

    Where a model's resize rounds to whole levels (MobileSAM), it is done as Pillow does it, to the
    last level: by axes, columns first, with weights of 22 fractional bits. An FP32 sum of such
    products would not hold all their bits, and levels that lie halfway are common. So weights are
    split in two parts whose sums FP32 holds exactly, in any order.

    Raises:
        BackendError: the package ``onnx`` is not installed.
    """
    graph = _Graph("sam3rt preprocess")
    spec = manifest.image
    height, width = spec.size
    graph.input(IMAGE, np.uint8, ["height", "width", 3])
    graph.input(ROWS, np.float32, [height, "height"])
    graph.input(COLUMNS, np.float32, ["width", width])
    x = graph.cast(IMAGE, np.float32)
    x = graph.node("Transpose", [x], perm=[2, 0, 1])
    matmul = _rounded_matmul if spec.resize_dtype == "uint8" else _matmul
    x = matmul(graph, x, COLUMNS, matrix_first=False)
    x = matmul(graph, x, ROWS, matrix_first=True)
    mean = np.array(spec.mean, np.float32)[:, None, None]
    std = np.array(spec.std, np.float32)[:, None, None]
    x = graph.node("Div", [graph.node("Sub", [x, graph.constant(mean)]), graph.constant(std)])
    if spec.resize == "longest_side":
        # A row of weights sums to one inside the image, and to nothing in the padding.
        sums = [
            graph.node("ReduceSum", [name, graph.constant(np.array([axis], np.int64))], keepdims=1)
            for name, axis in ((ROWS, 1), (COLUMNS, 0))
        ]
        inside = graph.node("Greater", [graph.node("Mul", sums), graph.constant(0.5)])
        x = graph.node("Where", [inside, x, graph.constant(spec.pad_value)])
    graph.node("Unsqueeze", [x, graph.constant(np.array([0], np.int64))], output=PIXELS)
    return graph.model(PIXELS, np.float32, [1, 3, height, width])


def _matmul(graph: _Graph, x: str, matrix: str, *, matrix_first: bool) -> str:
    return graph.node("MatMul", [matrix, x] if matrix_first else [x, matrix])


def _rounded_matmul(graph: _Graph, x: str, matrix: str, *, matrix_first: bool) -> str:
    """The matmul of whole numbers up to 255 with weights, rounded to whole numbers, halves up.

    Eleven bits of a weight times eight of a level, over weights that sum to one: 19 bits. The
    fraction left over and the sum of the lower eleven bits: 23. FP32 holds 24.
    """
    scale = graph.constant(float(1 << 11))
    high = graph.node("Div", [graph.node("Floor", [graph.node("Mul", [matrix, scale])]), scale])
    low = graph.node("Sub", [matrix, high])
    coarse = _matmul(graph, x, high, matrix_first=matrix_first)
    fine = _matmul(graph, x, low, matrix_first=matrix_first)
    raised = graph.node("Add", [coarse, graph.constant(0.5)])
    whole = graph.node("Floor", [raised])
    rest = graph.node("Add", [graph.node("Sub", [raised, whole]), fine])
    return graph.node("Add", [whole, graph.node("Floor", [rest])])


def postprocess_graph(manifest: Manifest) -> onnx.ModelProto:
    """Low-resolution logits to masks of the image's size.

    Inputs: ``logits`` float32 [masks, h, w]; ``rows`` float32 [height, h] and ``columns`` float32
    [w, width], from :func:`sam3rt.masks.upsampling.upsampling_matrices`; ``threshold`` float32 [1].
    Output: ``masks`` uint8 [masks, height, width], 1 where a logit is above the threshold.

    Raises:
        BackendError: the package ``onnx`` is not installed.
    """
    graph = _Graph("sam3rt postprocess")
    height, width = manifest.masks.low_res_size
    graph.input(LOGITS, np.float32, ["masks", height, width])
    graph.input(ROWS, np.float32, ["height", height])
    graph.input(COLUMNS, np.float32, [width, "width"])
    graph.input(THRESHOLD, np.float32, [1])
    x = graph.node("MatMul", [ROWS, graph.node("MatMul", [LOGITS, COLUMNS])])
    above = graph.node("Greater", [x, THRESHOLD])
    # TensorRT makes uint8 outputs from floating-point values only.
    chosen = graph.node("Where", [above, graph.constant(1.0), graph.constant(0.0)])
    graph.cast(chosen, np.uint8, output=MASKS)
    return graph.model(MASKS, np.uint8, ["masks", "height", "width"])


def preprocess_shapes(
    manifest: Manifest, side: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Least, typical and greatest shape of each input of :func:`preprocess_graph`.

    Args:
        manifest: of the bundle.
        side: the greatest height and width of an image.
    """
    height, width = manifest.image.size
    sizes = ((1, 1), (min(1080, side), min(1920, side)), (side, side))
    return {
        IMAGE: _three((h, w, 3) for h, w in sizes),
        ROWS: _three((height, h) for h, _ in sizes),
        COLUMNS: _three((w, width) for _, w in sizes),
    }


def postprocess_shapes(
    manifest: Manifest, side: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Least, typical and greatest shape of each input of :func:`postprocess_graph`.

    Args:
        manifest: of the bundle.
        side: the greatest height and width of a mask.
    """
    height, width = manifest.masks.low_res_size
    sizes = ((1, 1), (min(1080, side), min(1920, side)), (side, side))
    counts = (1, manifest.masks.multimask, manifest.masks.multimask)
    return {
        LOGITS: _three((count, height, width) for count in counts),
        ROWS: _three((h, height) for h, _ in sizes),
        COLUMNS: _three((width, w) for _, w in sizes),
        THRESHOLD: ((1,), (1,), (1,)),
    }


def _three(shapes: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    least, typical, most = shapes
    return least, typical, most


class _Graph:
    """A graph under construction; every method returns the name of what it adds."""

    def __init__(self, name: str) -> None:
        try:
            import onnx
        except ImportError as error:
            raise BackendError("this needs the package onnx: pip install onnx") from error
        self._onnx = onnx
        self._name = name
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._constants: list[Any] = []

    def input(self, name: str, dtype: type[np.generic], shape: list[int | str]) -> None:
        self._inputs.append(self._value(name, dtype, shape))

    def constant(self, value: Any) -> str:
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = f"constant_{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def node(
        self, operator: str, inputs: list[str], output: str | None = None, **attributes: Any
    ) -> str:
        name = output or f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(
            self._onnx.helper.make_node(operator, inputs, [name], name=name, **attributes)
        )
        return name

    def cast(self, value: str, dtype: type[np.generic], output: str | None = None) -> str:
        return self.node("Cast", [value], output, to=self._type(dtype))

    def model(self, name: str, dtype: type[np.generic], shape: list[int | str]) -> onnx.ModelProto:
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            [self._value(name, dtype, shape)],
            self._constants,
        )
        model: onnx.ModelProto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION
        )
        self._onnx.checker.check_model(model, full_check=True)
        return model

    def _value(self, name: str, dtype: type[np.generic], shape: list[int | str]) -> Any:
        return self._onnx.helper.make_tensor_value_info(name, self._type(dtype), shape)

    def _type(self, dtype: type[np.generic]) -> int:
        return int(self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
