"""Two engines that were found to belong together, and the layouts that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ...bundle import Bundle, GraphSpec
from ...bundle.contract import (
    HAS_MASKS,
    LABELS,
    MASKS,
    MULTIMASK_OUTPUTS,
    OBJECT_SCORE,
    POINTS,
    SINGLE_MASK_OUTPUTS,
    LoadedTensor,
    signature_mismatch,
)
from ...errors import BackendError
from .imaging import MASK_JOB
from .memory import Block, Layout
from .runs import Limits, ShapeClass
from .trt import KernelCache, Tensor

# Not the decoder's: what masks to make travels in the same block as the prompts.
JOB = "job"
_FLOATS = (np.float32, np.float16)


class Context(Protocol):
    """One way of running an engine, as :class:`.trt.Context` describes it."""

    def set_scratch(self, address: int, nbytes: int) -> None: ...

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None: ...

    def set_address(self, name: str, address: int) -> None: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def scratch_bytes(self) -> int: ...

    def check_capturable(self, stream: int) -> None: ...

    def enqueue(self, stream: int) -> None: ...


class NamedAxes:
    """The sizes and addresses of a context, for a library with working memory of its own.

    Args:
        axes: of each tensor, by name: a size, or a name that stands for one.
    """

    def __init__(self, axes: Mapping[str, tuple[int | str, ...]]) -> None:
        self._axes = axes
        self._sizes: dict[str, int] = {}
        self.addresses: dict[str, int] = {}

    def set_scratch(self, address: int, nbytes: int) -> None:
        """Nothing."""

    def scratch_bytes(self) -> int:
        """None."""
        return 0

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Say how large an input is."""
        pairs = zip(self._axes[name], shape, strict=True)
        self._sizes |= {axis: side for axis, side in pairs if isinstance(axis, str)}

    def set_address(self, name: str, address: int) -> None:
        """Say where a tensor lies on the device."""
        self.addresses[name] = address

    def shape(self, name: str) -> tuple[int, ...]:
        """The size of a tensor, once all inputs have theirs."""
        return tuple(a if isinstance(a, int) else self._sizes[a] for a in self._axes[name])


class Engine(Protocol):
    """A loaded graph: TensorRT's engine, or another library's session."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What it reads and writes, by name."""

    def context(self) -> Context:
        """A way of running it at one set of sizes and addresses."""


class Network:
    """An encoder and a decoder engine.

    Args:
        bundle: the bundle they were built from.
        encoder: the loaded encoder.
        decoder: the loaded decoder.
        kernels: where TensorRT for RTX keeps what it compiles.

    Attributes:
        pixels: the encoder's input.
        max_images: images in one run of the encoder, at most.
        features: layout of one image's feature maps.
        makes_plain_logits: whether masks and pixels are FP32, as the kernels around the network
            want them.
        limits: the greatest sizes of a decoder call.
        joins_images: whether each of several objects of a call may have an image of its own.
        output_names: all decoder outputs, in the order of their layout.

    Raises:
        BackendError: an engine is not what the bundle's manifest describes, or the two differ in
            the feature maps between them.
    """

    def __init__(
        self, bundle: Bundle, encoder: Engine, decoder: Engine, kernels: KernelCache | None = None
    ) -> None:
        manifest = bundle.manifest
        self.encoder = encoder
        self.decoder = decoder
        self._kernels = kernels
        self._compiled: set[ShapeClass | int] = set()
        self.mask_size = manifest.prompts.mask_size
        _check("encoder", encoder, manifest.encoder)
        _check("decoder", decoder, manifest.decoder)
        self.pixels = encoder.tensors[manifest.encoder.inputs[0].name]
        self._size = manifest.image.size
        self.max_images = self.pixels.most[0]
        maps = []
        for spec in manifest.encoder.outputs:
            made, read = encoder.tensors[spec.name], decoder.tensors[spec.name]
            if made.dtype != read.dtype or made.dtype not in _FLOATS:
                raise BackendError(
                    f"feature map {spec.name}: the encoder engine makes {made.dtype}, the decoder "
                    f"engine takes {read.dtype}; build both again with one recipe"
                )
            maps.append((spec.name, (1, *(int(side) for side in spec.shape[1:])), made.dtype))
        self.features = Layout(maps)
        self._outputs = {
            spec.name: (spec.shape, decoder.tensors[spec.name].dtype)
            for spec in manifest.decoder.outputs
        }
        # What both kinds of call want stands in the middle, so that either is one copy to the host.
        order = (*MULTIMASK_OUTPUTS, OBJECT_SCORE, *SINGLE_MASK_OUTPUTS)
        self.output_names = tuple(name for name in order if name in self._outputs)
        logits = (MULTIMASK_OUTPUTS[0], SINGLE_MASK_OUTPUTS[0])
        types = {self.pixels.dtype, *(self._outputs[name][1] for name in logits)}
        self.makes_plain_logits = types == {np.dtype(np.float32)}
        points = decoder.tensors[POINTS].most
        self.limits = Limits(points[1], points[2])
        images = min(decoder.tensors[name].most[0] for name in self.features.slots)
        self.joins_images = images >= self.limits.objects > 1
        own_masks = decoder.tensors[MASKS].most[1]
        if own_masks < self.limits.objects:
            raise BackendError(
                f"the decoder engine takes {self.limits.objects} objects but {own_masks} mask "
                "prompts: build it again"
            )

    def keep_kernels(self, shape: ShapeClass | int) -> None:
        """After a first run, keep what was compiled for it.

        Args:
            shape: of the decoder's call, or the number of the encoder's images.
        """
        if self._kernels is not None and shape not in self._compiled:
            self._compiled.add(shape)
            self._kernels.save()

    def pixels_shape(self, count: int) -> tuple[int, ...]:
        """Shape of the encoder's input for so many images."""
        return (count, 3, *self._size)

    def batch(self, count: int) -> Layout:
        """The block with the feature maps of several images."""
        slots = self.features.slots.items()
        return Layout((name, (count, *slot.shape[1:]), slot.dtype) for name, slot in slots)

    def inputs(self, shape: ShapeClass) -> Layout:
        """The block with everything of a prompt but its mask, and the job of making masks."""
        sizes = {
            POINTS: (1, shape.objects, shape.points, 2),
            LABELS: (1, shape.objects, shape.points),
            HAS_MASKS: (1,),
        }
        tensors = [(name, size, self.decoder.tensors[name].dtype) for name, size in sizes.items()]
        return Layout([*tensors, (JOB, (1,), MASK_JOB)])

    def masks(self, shape: ShapeClass) -> Layout:
        """The block with a prompt's mask."""
        return Layout(
            [(MASKS, (1, shape.masks, *self.mask_size), self.decoder.tensors[MASKS].dtype)]
        )

    def outputs(self, shape: ShapeClass) -> Layout:
        """The block with the decoder's outputs."""
        return Layout(
            (
                name,
                # Objects are the outputs' only dynamic axis.
                tuple(s if isinstance(s, int) else shape.objects for s in self._outputs[name][0]),
                self._outputs[name][1],
            )
            for name in self.output_names
        )

    @property
    def largest(self) -> ShapeClass:
        """The greatest class, whose blocks all others fit into."""
        return ShapeClass(self.limits.objects, self.limits.points, self.limits.objects)


def set_addresses(context: Context, layout: Layout, block: Block, made_by: str = "") -> None:
    """Say where the tensors of a block lie.

    Args:
        context: whose.
        layout: how they lie.
        block: where they lie.
        made_by: the role of the engine whose outputs they are, or empty.

    Raises:
        BackendError: an output is of another shape.
    """
    for name, slot in layout.slots.items():
        if name == JOB:
            continue
        context.set_address(name, block.address + slot.offset)
        if made_by and context.shape(name) != slot.shape:
            raise BackendError(
                f"the {made_by} engine makes {name} of shape {context.shape(name)}, expected "
                f"{slot.shape}: build it again"
            )


def _check(role: str, engine: Engine, graph: GraphSpec) -> None:
    inputs, outputs = (
        [
            LoadedTensor(tensor.name, tensor.dtype.name, tensor.shape)
            for tensor in engine.tensors.values()
            if tensor.is_input == is_input
        ]
        for is_input in (True, False)
    )
    mismatch = signature_mismatch(graph, inputs, outputs, is_retyped=True)
    if mismatch:
        raise BackendError(f"the {role} engine {mismatch}: build it again")
