"""Two engines that were found to belong together, and the layouts that follow from them."""

from __future__ import annotations

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
from .memory import Layout
from .shapes import Limits, ShapeClass
from .trt import Engine, KernelCache

# Not the decoder's: the threshold travels in the same block as the prompts.
THRESHOLD = "threshold"
_FLOATS = (np.float32, np.float16)


class Network:
    """An encoder and a decoder engine.

    Args:
        bundle: the bundle they were built from.
        encoder: the loaded encoder.
        decoder: the loaded decoder.
        kernels: where TensorRT for RTX keeps what it compiles.

    Attributes:
        pixels: the encoder's input.
        features: layout of one image's feature maps.
        limits: the greatest sizes of a decoder call.
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
        self._compiled: set[ShapeClass | None] = set()
        self.mask_size = manifest.prompts.mask_size
        _check("encoder", encoder, manifest.encoder)
        _check("decoder", decoder, manifest.decoder)
        self.pixels = encoder.tensors[manifest.encoder.inputs[0].name]
        self.pixels_shape = (1, 3, *manifest.image.size)
        self.feature_names = tuple(spec.name for spec in manifest.encoder.outputs)
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
        points = decoder.tensors[POINTS].most
        self.limits = Limits(points[1], points[2])
        own_masks = decoder.tensors[MASKS].most[1]
        if own_masks < self.limits.objects:
            raise BackendError(
                f"the decoder engine takes {self.limits.objects} objects but {own_masks} mask "
                "prompts: build it again"
            )

    def keep_kernels(self, shape: ShapeClass | None) -> None:
        """After a first run, keep what was compiled for it.

        Args:
            shape: of the decoder's call, or ``None`` for the encoder.
        """
        if self._kernels is not None and shape not in self._compiled:
            self._compiled.add(shape)
            self._kernels.save()

    def inputs(self, shape: ShapeClass) -> Layout:
        """The block with everything of a prompt but its mask."""
        sizes = {
            POINTS: (1, shape.objects, shape.points, 2),
            LABELS: (1, shape.objects, shape.points),
            HAS_MASKS: (1,),
        }
        tensors = [(name, size, self.decoder.tensors[name].dtype) for name, size in sizes.items()]
        return Layout([*tensors, (THRESHOLD, (1,), np.dtype(np.float32))])

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
