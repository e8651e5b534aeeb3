"""An ONNX graph run by PyTorch, operator by operator, in the types that the graph states.

It computes a typed graph as it is typed, on the CPU too, where ONNX Runtime has few FP16 kernels
and silently computes in FP32. On a GPU it stands in for TensorRT and ONNX Runtime. Operators are
those of this project's graphs, fused ones included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sam3rt.bundle import Bundle
from sam3rt.features import Features
from sam3rt.geometry import ImageGeometry, preprocess
from sam3rt.prompts import PackedPrompts, decoder_inputs

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
}
Watch = Callable[[ir.Node, tuple[Tensor, ...], tuple[Tensor, ...]], None]


class TorchGraph:
    """A graph whose weights are on a device.

    Args:
        model: the graph, or the file that it is in.
        device: PyTorch's name of the device.
        plain_attention: whether fused attention is computed as two products and a softmax, in
            FP32 between them, as where there is no fused kernel.
        watch: called after each node with its inputs and outputs.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        device: str = "cpu",
        *,
        plain_attention: bool = False,
        watch: Watch | None = None,
    ) -> None:
        model = ir.load(model) if isinstance(model, Path) else model
        self.device = torch.device(device)
        self._plain_attention = plain_attention
        self._watch = watch
        self.inputs = {v.name or "": v for v in model.graph.inputs}
        self.outputs = {v.name or "": v for v in model.graph.outputs}
        self._nodes = tuple(model.graph)
        # Sizes, axes and indexes are read on the host; a copy is on the device for all other uses.
        self._weights: dict[ir.Value, Tensor] = {}
        self._on_device: dict[int, Tensor] = {}
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            tensor = _tensor(value.const_value)
            if tensor.is_floating_point():
                tensor = tensor.to(self.device)
            else:
                self._on_device[id(tensor)] = tensor.to(self.device)
            self._weights[value] = tensor
        # After which node each value is needed no more.
        self._last: dict[ir.Node, list[ir.Value]] = {}
        last: dict[ir.Value, ir.Node] = {}
        for node in self._nodes:
            last |= {value: node for value in node.inputs if value is not None}
        for value, node in last.items():
            if value not in self._weights and not value.is_graph_output():
                self._last.setdefault(node, []).append(value)

    @torch.no_grad()
    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. Queues work on the current stream and waits for nothing."""
        values = dict(self._weights)
        for name, value in self.inputs.items():
            values[value] = feed[name]
        for node in self._nodes:
            given = [None if v is None or not v.name else values[v] for v in node.inputs]
            made = self._apply(node, given)
            if self._watch is not None:
                self._watch(node, tuple(g for g in given if g is not None), made)
            for value, tensor in zip(node.outputs, made, strict=False):
                values[value] = tensor
            for value in self._last.get(node, ()):
                values.pop(value, None)
        return {name: values[value] for name, value in self.outputs.items()}

    def _apply(self, node: ir.Node, given: list[Tensor | None]) -> tuple[Tensor, ...]:
        operator = _OPERATORS.get(node.op_type)
        if operator is None:
            raise NotImplementedError(f"no operator {node.op_type} ({node.name})")
        host = _ON_HOST.get(node.op_type, ())
        on_device = any(
            tensor is not None and tensor.device == self.device
            for index, tensor in enumerate(given)
            if index not in host
        )
        if on_device and node.op_type != "Shape":
            given = [t if i in host else self._moved(t) for i, t in enumerate(given)]
        attributes = {name: a.value for name, a in node.attributes.items()}
        if node.op_type == "MultiHeadAttention":
            attributes["plain"] = self._plain_attention
        made = operator(attributes, *given)
        return made if isinstance(made, tuple) else (made,)

    def _moved(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device == self.device or tensor.dim() == 0:
            return tensor
        known = self._on_device.get(id(tensor))
        return tensor.to(self.device) if known is None else known


class TorchFeatures(Features):
    """Feature maps of a :class:`TorchRunner`."""

    def __init__(self, maps: Mapping[str, Tensor]) -> None:
        self.maps = maps

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.maps.values())

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        return tuple(tensor.float().cpu().numpy() for tensor in self.maps.values())


class TorchRunner:
    """Encoder and decoder of a bundle, for the gate to run.

    Args:
        bundle: for its rules.
        encoder: its graph, typed or not.
        decoder: its graph, with the same types between the two.
    """

    def __init__(self, bundle: Bundle, encoder: TorchGraph, decoder: TorchGraph) -> None:
        self._bundle = bundle
        self._encoder = encoder
        self._decoder = decoder
        self._no_mask = np.zeros((1, 1, *bundle.manifest.prompts.mask_size), np.float32)

    def encode_image(self, image: NDArray[np.uint8], geometry: ImageGeometry) -> TorchFeatures:
        pixels, _ = preprocess(self._bundle.manifest.image, image)
        (name,) = self._encoder.inputs
        return TorchFeatures(self._encoder.run({name: self._tensor(pixels)}))

    def decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        assert isinstance(features, TorchFeatures)
        feed = dict(features.maps)
        for name, array in decoder_inputs(prompts, self._no_mask):
            feed[name] = self._tensor(array)
        made = self._decoder.run(feed)
        return [made[name].float().cpu().numpy() for name in outputs]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._encoder.device)


def _tensor(tensor: ir.TensorProtocol) -> Tensor:
    if tensor.dtype == ir.DataType.BFLOAT16:
        raw = np.array(tensor.numpy()).view(np.int16)
        return torch.from_numpy(raw).view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor.numpy()))


def _ints(tensor: Tensor | None) -> list[int]:
    return [] if tensor is None else [int(i) for i in tensor.reshape(-1).tolist()]


def _conv(a: dict[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    pads = list(a.get("pads", [0, 0, 0, 0]))
    assert pads[:2] == pads[2:]
    return F.conv2d(
        x,
        w,
        b,
        list(a.get("strides", [1, 1])),
        pads[:2],
        list(a.get("dilations", [1, 1])),
        a.get("group", 1),
    )


def _reshape(a: dict[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    sides = _ints(shape)
    if not a.get("allowzero", 0):
        sides = [x.shape[i] if side == 0 else side for i, side in enumerate(sides)]
    return x.reshape(sides)


def _slice(
    a: dict[str, Any],
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = _ints(starts), _ints(ends)
    which = _ints(axes) if axes is not None else list(range(len(first)))
    strides = _ints(steps) if steps is not None else [1] * len(first)
    index: list[slice] = [slice(None)] * x.dim()
    for axis, start, end, step in zip(which, first, last, strides, strict=True):
        index[axis] = slice(start, min(end, x.shape[axis]), step)
    return x[tuple(index)]


def _gather(a: dict[str, Any], x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.dim()
    if index.device.type == "cpu" and index.dim() == 0:
        return x.select(axis, int(index))
    flat = x.index_select(axis, index.reshape(-1) % x.shape[axis])
    return flat.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _pad(a: dict[str, Any], x: Tensor, pads: Tensor, value: Tensor | None = None) -> Tensor:
    sides = _ints(pads)
    half = len(sides) // 2
    flat = [n for i in reversed(range(half)) for n in (sides[i], sides[half + i])]
    return F.pad(x, flat, value=0.0 if value is None else float(value))


def _reduce(name: str) -> Callable[..., Tensor]:
    def apply(a: dict[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
        which = _ints(axes) if axes is not None else list(a.get("axes", range(x.dim())))
        keep = bool(a.get("keepdims", 1))
        return getattr(torch, name)(x, dim=which, keepdim=keep)  # type: ignore[no-any-return]

    return apply


def _split(a: dict[str, Any], x: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    return x.split(_ints(sizes), a.get("axis", 0))


def _unsqueeze(a: dict[str, Any], x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(i % rank for i in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: dict[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(_ints(axes))


def _divide(a: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _clip(a: dict[str, Any], x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return x.clamp(*(None if v is None else v.item() for v in (low, high)))


def _layer_norm(a: dict[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, w.shape, w, b, a.get("epsilon", 1e-5))


def _skip(
    a: dict[str, Any], x: Tensor, skip: Tensor, w: Tensor, b: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    total = x + bias + skip
    return _layer_norm(a, total, w, b), total, total, total


def _rotary(a: dict[str, Any], x: Tensor, first: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = 2 * cos.shape[1]
    heads = x.unflatten(-1, (-1, width))
    real, imaginary = heads.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = (table[: x.shape[1], None] for table in (cos, sin))
    turned = torch.stack([real * c - imaginary * s, imaginary * c + real * s], -1)
    assert a["interleaved"] == 1
    return turned.flatten(-3)


def _attention(a: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (a["num_heads"], -1)).transpose(1, 2) for x in (q, k, v))
    if a["plain"]:
        shares = torch.softmax(((q * a["scale"]) @ k.transpose(2, 3)).float(), -1)
        mixed = shares.to(v.dtype) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, scale=a["scale"])
    return mixed.transpose(1, 2).flatten(-2)


# Inputs that are read on the host, by operator.
_ON_HOST: dict[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 2),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "ReduceSum": (1,),
    "ReduceMean": (1,),
    "ReduceMax": (1,),
    "Expand": (1,),
    "Clip": (1, 2),
    "RotaryEmbedding": (1,),
}
_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: x + y,
    "Sub": lambda a, x, y: x - y,
    "Mul": lambda a, x, y: x * y,
    "Div": _divide,
    "MatMul": lambda a, x, y: torch.matmul(x, y),
    "Conv": _conv,
    "Reshape": _reshape,
    "Transpose": lambda a, x: x.permute(list(a["perm"])),
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": lambda a, x, s: x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(s)))),
    "Pad": _pad,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
    "Cast": lambda a, x: x.to(DTYPES[ir.DataType(a["to"])]),
    "Identity": lambda a, x: x,
    "Where": lambda a, c, x, y: torch.where(c, x, y),
    "Equal": lambda a, x, y: x == y,
    "Greater": lambda a, x, y: x > y,
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "Less": lambda a, x, y: x < y,
    "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)),
    "LayerNormalization": _layer_norm,
    "Erf": lambda a, x: torch.erf(x),
    "Relu": lambda a, x: torch.relu(x),
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Sin": lambda a, x: torch.sin(x),
    "Cos": lambda a, x: torch.cos(x),
    "Clip": _clip,
    "ReduceSum": _reduce("sum"),
    "ReduceMean": _reduce("mean"),
    "ReduceMax": _reduce("amax"),
    "ArgMax": lambda a, x: x.argmax(a.get("axis", 0), keepdim=bool(a.get("keepdims", 1))),
    "BiasGelu": lambda a, x, b: F.gelu(x + b),
    "SkipLayerNormalization": _skip,
    "RotaryEmbedding": _rotary,
    "MultiHeadAttention": _attention,
}
