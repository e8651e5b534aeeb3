"""Two engines that were found to belong together, and the layouts that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...bundle import Bundle, GraphSpec
from ...errors import BackendError
from .memory import Layout
from .shapes import Limits, ShapeClass
from .trt import Engine, Tensor

POINTS, LABELS = "input_points", "input_labels"
MASKS, HAS_MASKS = "input_masks", "has_input_masks"
# Not the decoder's: the threshold travels in the same block as the prompts.
THRESHOLD = "threshold"
_FLOATS = (np.float32, np.float16)


class Network:
    """An encoder and a decoder engine.

    Args:
        bundle: the bundle they were built from.
        encoder: the loaded encoder.
        decoder: the loaded decoder.

    Attributes:
        pixels: the encoder's input.
        features: layout of one image's feature maps.
        limits: the greatest sizes of a decoder call.
        output_names: all decoder outputs, in the order of their layout.

    Raises:
        BackendError: an engine is not what the bundle's manifest describes, or the two differ in
            the feature maps between them.
    """

    def __init__(self, bundle: Bundle, encoder: Engine, decoder: Engine) -> None:
        manifest = bundle.manifest
        self.encoder = encoder
        self.decoder = decoder
        self.mask_size = manifest.prompts.mask_size
        _check_names("encoder", encoder, manifest.encoder)
        _check_names("decoder", decoder, manifest.decoder)
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
        self.output_names = _contiguous_order(tuple(self._outputs))
        points = decoder.tensors[POINTS].most
        self.limits = Limits(points[1], points[2])
        own_masks = decoder.tensors[MASKS].most[1]
        if own_masks < self.limits.objects:
            raise BackendError(
                f"the decoder engine takes {self.limits.objects} objects but {own_masks} mask "
                "prompts: build it again"
            )

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


def _check_names(role: str, engine: Engine, graph: GraphSpec) -> None:
    for kind, promised, is_input in (
        ("inputs", graph.inputs, True),
        ("outputs", graph.outputs, False),
    ):
        found = {t.name: t for t in engine.tensors.values() if t.is_input == is_input}
        wanted = {spec.name: spec.shape for spec in promised}
        if set(found) != set(wanted):
            raise BackendError(
                f"the {role} engine has the {kind} {sorted(found)}, the bundle's {role} "
                f"{sorted(wanted)}: build it again"
            )
        for name, shape in wanted.items():
            if not _agree(found[name], shape):
                raise BackendError(
                    f"the {role} engine's {name} is of shape {found[name].shape}, the bundle's "
                    f"of {shape}: build it again"
                )


def _agree(tensor: Tensor, shape: Sequence[int | str]) -> bool:
    """Whether all sizes that both sides fix are equal."""
    return len(tensor.shape) == len(shape) and all(
        built == promised
        for built, promised in zip(tensor.shape, shape, strict=True)
        if isinstance(promised, int) and built != -1
    )


def _contiguous_order(names: Sequence[str]) -> tuple[str, ...]:
    """An order in which both a multi-mask and a single-mask call want neighbours.

    What both want stands in the middle: then either is one copy to the host.
    """
    single = [name for name in names if name.startswith("single_")]
    multi = [name for name in names if name in [s.removeprefix("single_") for s in single]]
    both = [name for name in names if name not in (*single, *multi)]
    return (*multi, *both, *single)
