"""Preprocessing and postprocessing on the device, where engines for them are there.

Each graph is two matrix multiplications. The matrices depend on the image's size alone; those of
the sizes used last stay on the device. The names below are the tensors of the two graphs, for
whoever builds them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...bundle import Manifest
from ...errors import BackendError
from ...geometry import ImageGeometry, resize_matrices, rows_first
from ...masks.upsampling import upsampling_matrices
from .cuda import Cuda
from .memory import ALIGNMENT, Block, GrowingBuffer, Layout, Memory, aligned
from .trt import Context, Engine

# Preprocessing: image, rows and columns to pixels.
IMAGE, PIXELS = "image", "pixel_values"
# Postprocessing: logits, rows, columns and threshold to masks.
LOGITS, THRESHOLD, MASKS = "logits", "threshold", "masks"
# The matrices that resize along either axis.
ROWS, COLUMNS = "rows", "columns"

_KEPT_SIZES = 8


class DeviceMatrices(NamedTuple):
    """The two matrices of a resize, on the device.

    Attributes:
        block: where they lie.
        layout: how.
    """

    block: Block
    layout: Layout

    def bind(self, context: Context) -> None:
        """Set both as inputs of a context."""
        for name, slot in self.layout.slots.items():
            context.set_shape(name, slot.shape)
            context.set_address(name, self.block.address + slot.offset)


_Matrices = tuple[NDArray[np.float32], NDArray[np.float32]]


class DeviceImaging:
    """The engines around the network, and the matrices they take.

    Neither is used before it is allowed: its outputs must have been compared first.

    Args:
        manifest: of the bundle.
        preprocess: the preprocessing engine, or ``None``.
        postprocess: the postprocessing engine, or ``None``.
        cuda: the GPU.
        memory: its memory.

    Attributes:
        cuda: the GPU.
        memory: its memory.
        low_res_size: (height, width) of the logits that are upsampled.
        preprocess_allowed: whether the preprocessing may be used.
        postprocess_allowed: whether the postprocessing may be used.
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocess: Engine | None,
        postprocess: Engine | None,
        cuda: Cuda,
        memory: Memory,
    ) -> None:
        self._manifest = manifest
        self.cuda = cuda
        self.memory = memory
        self._preprocess = preprocess
        self._postprocess = postprocess
        self.preprocess_allowed = False
        self.postprocess_allowed = False
        self.low_res_size = manifest.masks.low_res_size
        self._lock = threading.Lock()
        self._matrices: OrderedDict[tuple[str, ImageGeometry], DeviceMatrices] = OrderedDict()

    def engines(self, encodes: bool) -> list[Engine]:
        """The engines that a lane may run."""
        engines = [self._postprocess, self._preprocess if encodes else None]
        return [engine for engine in engines if engine is not None]

    def preprocess_fits(self, geometry: ImageGeometry) -> bool:
        """Whether the engine takes images of that size, and makes of them what the host does."""
        return not (
            self._manifest.image.resize_dtype == "uint8" and rows_first(geometry)
        ) and _fits(self._preprocess, IMAGE, (*geometry.original_size, 3))

    def postprocess_fits(self, geometry: ImageGeometry) -> bool:
        """Whether the engine makes masks of that size, from logits as the decoder leaves them."""
        height, width = self.low_res_size
        return (
            # Each object's logits are read where they lie.
            height * width * 4 % ALIGNMENT == 0
            and _fits(self._postprocess, ROWS, (geometry.original_size[0], height))
            and _fits(self._postprocess, COLUMNS, (width, geometry.original_size[1]))
        )

    def resize_matrices(self, geometry: ImageGeometry, stream: int) -> DeviceMatrices:
        """The matrices of the preprocessing of an image. Keep them until they have been used."""
        spec = self._manifest.image
        return self._cached(("resize", geometry), lambda: resize_matrices(spec, geometry), stream)

    def upsampling_matrices(self, geometry: ImageGeometry, stream: int) -> DeviceMatrices:
        """The matrices of the upsampling to an image's size. Keep them until they are used."""

        def make() -> _Matrices:
            manifest = self._manifest
            return upsampling_matrices(
                self.low_res_size,
                manifest.image.size,
                geometry.input_size,
                geometry.original_size,
                manifest.masks.upsampling,
            )

        return self._cached(("upsample", geometry), make, stream)

    def preprocess_context(self) -> Context:
        """A context of the preprocessing engine, for one lane."""
        return _context(self._preprocess)

    def postprocess_context(self) -> Context:
        """A context of the postprocessing engine, for one lane."""
        return _context(self._postprocess)

    def _cached(
        self,
        key: tuple[str, ImageGeometry],
        make: Callable[[], _Matrices],
        stream: int,
    ) -> DeviceMatrices:
        with self._lock:
            found = self._matrices.get(key)
            if found is not None:
                self._matrices.move_to_end(key)
                return found
        # Two threads may both get here; the second result replaces the first.
        rows, columns = make()
        layout = Layout([(ROWS, rows.shape, rows.dtype), (COLUMNS, columns.shape, columns.dtype)])
        host = np.zeros(layout.nbytes, np.uint8)
        layout.slots[ROWS].view(host)[...] = rows
        layout.slots[COLUMNS].view(host)[...] = columns
        matrices = DeviceMatrices(self.memory.allocate(layout.nbytes), layout)
        self.cuda.upload(matrices.block.address, host, stream)
        self.cuda.synchronize(stream)
        with self._lock:
            self._matrices[key] = matrices
            while len(self._matrices) > _KEPT_SIZES:
                self._matrices.popitem(last=False)
        return matrices


class LaneImaging:
    """Contexts and buffers of one lane for the engines around the network.

    What is queued is done when the lane's stream is idle.

    Args:
        imaging: the engines and matrices that all lanes share.
        scratch: working memory, large enough for both engines.
        stream: the lane's stream.
    """

    def __init__(self, imaging: DeviceImaging, scratch: Block, stream: int) -> None:
        self._imaging = imaging
        self._scratch = scratch
        self._stream = stream
        self._cuda = imaging.cuda
        self._uploads = GrowingBuffer(imaging.memory)
        self._masks = GrowingBuffer(imaging.memory)
        self._preprocess: Context | None = None
        self._postprocess: Context | None = None
        # Those queued last: the cache must not be their only owner while they are in use.
        self._matrices: DeviceMatrices | None = None

    def queue_preprocess(
        self, image: NDArray[np.uint8], geometry: ImageGeometry, pixels: int
    ) -> None:
        """Queue the upload and the preprocessing of uint8 [H, W, 3] to an address."""
        if self._preprocess is None:
            self._preprocess = self._imaging.preprocess_context()
            self._preprocess.set_scratch(self._scratch.address, self._scratch.nbytes)
        self._matrices = self._imaging.resize_matrices(geometry, self._stream)
        image = np.ascontiguousarray(image)
        block = self._uploads.block(image.nbytes)
        self._cuda.upload(block.address, image, self._stream)
        self._preprocess.set_shape(IMAGE, image.shape)
        self._preprocess.set_address(IMAGE, block.address)
        self._matrices.bind(self._preprocess)
        self._preprocess.set_address(PIXELS, pixels)
        self._preprocess.enqueue(self._stream)

    def queue_upsampling(
        self,
        logits: int,
        objects: int,
        count: int,
        geometry: ImageGeometry,
        threshold: int,
        stride: int | None = None,
    ) -> NDArray[np.uint8]:
        """Queue the upsampling of each object's masks and the download of all of them.

        Args:
            logits: address of the first object's.
            objects: P.
            count: masks per object, C.
            geometry: of the image.
            threshold: its address.
            stride: bytes from one object's logits to the next; by default they adjoin.

        Returns:
            Pinned memory, uint8 [P, each object's masks and padding]; see :func:`unpacked`.
        """
        if self._postprocess is None:
            self._postprocess = self._imaging.postprocess_context()
            self._postprocess.set_scratch(self._scratch.address, self._scratch.nbytes)
        context = self._postprocess
        self._matrices = self._imaging.upsampling_matrices(geometry, self._stream)
        height, width = self._imaging.low_res_size
        in_stride = count * height * width * 4 if stride is None else stride
        out_stride = aligned(count * _pixels(geometry))
        block = self._masks.block(objects * out_stride)
        context.set_shape(LOGITS, (count, height, width))
        context.set_address(THRESHOLD, threshold)
        self._matrices.bind(context)
        for index in range(objects):
            context.set_address(LOGITS, logits + index * in_stride)
            context.set_address(MASKS, block.address + index * out_stride)
            context.enqueue(self._stream)
        host = self._masks.pinned(objects * out_stride)
        self._cuda.download(host, block.address, self._stream)
        return host.reshape(objects, out_stride)

    def queue_host_upsampling(
        self, logits: NDArray[np.float32], geometry: ImageGeometry, threshold: float
    ) -> NDArray[np.uint8]:
        """:meth:`queue_upsampling` for logits on the host, float32 [P, C, h, w]."""
        objects, count = logits.shape[:2]
        stride = aligned(logits[0].nbytes)
        layout = Layout(
            [
                (THRESHOLD, (1,), np.dtype(np.float32)),
                (LOGITS, (objects, stride // 4), np.dtype(np.float32)),
            ]
        )
        host = self._uploads.pinned(layout.nbytes)
        layout.slots[THRESHOLD].view(host)[:] = threshold
        layout.slots[LOGITS].view(host)[:, : logits[0].size] = logits.reshape(objects, -1)
        block = self._uploads.block(layout.nbytes)
        self._cuda.upload(block.address, host, self._stream)
        return self.queue_upsampling(
            block.address + layout.slots[LOGITS].offset,
            objects,
            count,
            geometry,
            block.address + layout.slots[THRESHOLD].offset,
            stride,
        )


def unpacked(packed: NDArray[np.uint8], count: int, geometry: ImageGeometry) -> NDArray[np.uint8]:
    """A copy of masks without the padding between objects, uint8 [P, C, H, W]."""
    each = count * _pixels(geometry)
    return np.array(packed[:, :each]).reshape(len(packed), count, *geometry.original_size)


def _pixels(geometry: ImageGeometry) -> int:
    height, width = geometry.original_size
    return height * width


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
