"""Preprocessing and postprocessing on the device, where engines for them are there.

The graphs are those of :mod:`sam3rt_build.imaging_graphs`: two matrix products each. The matrices
depend on the image's size alone; those of the sizes used last stay on the device.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sam3rt_build import imaging_graphs as graphs

from ...bundle import Manifest
from ...errors import BackendError
from ...geometry import ImageGeometry, resize_matrices, rows_first
from ...masks.upsampling import upsampling_matrices
from .memory import ALIGNMENT, Block, Layout
from .trt import Context, Engine

_KEPT_SIZES = 8


class DeviceMatrices(NamedTuple):
    """The two matrices of a resize, on the device.

    Attributes:
        block: where they lie.
        layout: how.
        target: (height, width) they resize to.
    """

    block: Block
    layout: Layout
    target: tuple[int, int]

    def bind(self, context: Context) -> None:
        """Set both as inputs of a context."""
        for name, slot in self.layout.slots.items():
            context.set_shape(name, slot.shape)
            context.set_address(name, self.block.address + slot.offset)


Upload = Callable[[NDArray[np.uint8]], Block]
_Matrices = tuple[NDArray[np.float32], NDArray[np.float32]]


class DeviceImaging:
    """The engines around the network, and the matrices they take.

    Neither is used before it is allowed: its outputs must have been compared first.

    Args:
        manifest: of the bundle.
        preprocess: engine of :func:`sam3rt_build.imaging_graphs.preprocess_graph`, or ``None``.
        postprocess: engine of :func:`sam3rt_build.imaging_graphs.postprocess_graph`, or ``None``.

    Attributes:
        low_res_size: (height, width) of the logits that are upsampled.
        preprocess_allowed: whether the preprocessing may be used.
        postprocess_allowed: whether the postprocessing may be used.
    """

    def __init__(
        self, manifest: Manifest, preprocess: Engine | None, postprocess: Engine | None
    ) -> None:
        self._manifest = manifest
        self._preprocess = preprocess
        self._postprocess = postprocess
        self.preprocess_allowed = False
        self.postprocess_allowed = False
        self.low_res_size = manifest.masks.low_res_size
        self._lock = threading.Lock()
        self._matrices: OrderedDict[tuple[str, ImageGeometry], DeviceMatrices] = OrderedDict()

    def engines(self, wide: bool) -> list[Engine]:
        """The engines that a lane may run."""
        engines = [self._postprocess, self._preprocess if wide else None]
        return [engine for engine in engines if engine is not None]

    def preprocess_fits(self, place: ImageGeometry) -> bool:
        """Whether the engine takes images of that size, and makes of them what the host does."""
        return not (self._manifest.image.resize_dtype == "uint8" and rows_first(place)) and _fits(
            self._preprocess, graphs.IMAGE, (*place.original_size, 3)
        )

    def postprocess_fits(self, place: ImageGeometry) -> bool:
        """Whether the engine makes masks of that size, from logits as the decoder leaves them."""
        height, width = self.low_res_size
        return (
            # Each object's logits are read where they lie.
            height * width * 4 % ALIGNMENT == 0
            and _fits(self._postprocess, graphs.ROWS, (place.original_size[0], height))
            and _fits(self._postprocess, graphs.COLUMNS, (width, place.original_size[1]))
        )

    def resize_matrices(self, place: ImageGeometry, upload: Upload) -> DeviceMatrices:
        """The matrices of the preprocessing of an image."""
        spec = self._manifest.image
        return self._cached(
            ("resize", place), lambda: resize_matrices(spec, place), spec.size, upload
        )

    def upsampling_matrices(self, place: ImageGeometry, upload: Upload) -> DeviceMatrices:
        """The matrices of the upsampling to an image's size."""

        def make() -> _Matrices:
            manifest = self._manifest
            return upsampling_matrices(
                self.low_res_size,
                manifest.image.size,
                place.input_size,
                place.original_size,
                manifest.masks.upsampling,
            )

        return self._cached(("upsample", place), make, place.original_size, upload)

    def preprocess_context(self) -> Context:
        """A context of the preprocessing engine."""
        return _context(self._preprocess)

    def postprocess_context(self) -> Context:
        """A context of the postprocessing engine."""
        return _context(self._postprocess)

    def queue_preprocess(
        self,
        context: Context,
        image: int,
        shape: tuple[int, ...],
        matrices: DeviceMatrices,
        pixels: int,
        stream: int,
    ) -> None:
        """Queue the preprocessing from one address to another."""
        context.set_shape(graphs.IMAGE, shape)
        context.set_address(graphs.IMAGE, image)
        matrices.bind(context)
        context.set_address(graphs.PIXELS, pixels)
        context.enqueue(stream)

    def queue_postprocess(
        self,
        context: Context,
        logits: int,
        count: int,
        matrices: DeviceMatrices,
        threshold: int,
        masks: int,
        stream: int,
    ) -> None:
        """Queue the upsampling of one object's masks from one address to another."""
        context.set_shape(graphs.LOGITS, (count, *self.low_res_size))
        context.set_address(graphs.LOGITS, logits)
        matrices.bind(context)
        context.set_address(graphs.THRESHOLD, threshold)
        context.set_address(graphs.MASKS, masks)
        context.enqueue(stream)

    def _cached(
        self,
        key: tuple[str, ImageGeometry],
        make: Callable[[], _Matrices],
        target: tuple[int, int],
        upload: Upload,
    ) -> DeviceMatrices:
        with self._lock:
            found = self._matrices.get(key)
            if found is not None:
                self._matrices.move_to_end(key)
                return found
        # Two threads may both get here; the second result replaces the first.
        rows, columns = make()
        layout = Layout(
            [(graphs.ROWS, rows.shape, rows.dtype), (graphs.COLUMNS, columns.shape, columns.dtype)]
        )
        host = np.zeros(layout.nbytes, np.uint8)
        layout.slots[graphs.ROWS].view(host)[...] = rows
        layout.slots[graphs.COLUMNS].view(host)[...] = columns
        matrices = DeviceMatrices(upload(host), layout, target)
        with self._lock:
            self._matrices[key] = matrices
            while len(self._matrices) > _KEPT_SIZES:
                self._matrices.popitem(last=False)
        return matrices


def _fits(engine: Engine | None, name: str, shape: tuple[int, ...]) -> bool:
    if engine is None:
        return False
    tensor = engine.tensors[name]
    return all(
        low <= side <= high
        for low, side, high in zip(tensor.least, shape, tensor.most, strict=True)
    )


def _context(engine: Engine | None) -> Context:
    if engine is None:
        raise BackendError("there is no engine for it")
    return engine.context()
