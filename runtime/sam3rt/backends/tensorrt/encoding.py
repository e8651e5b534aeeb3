"""The encoder's half of a lane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError
from ...geometry import ImageGeometry
from .buffers import GrowingBuffer, Workspace
from .cuda import Cuda
from .imaging import RESIZE_JOB, RESIZING, DeviceImaging, resize_job
from .memory import Block, Memory, aligned
from .network import Network, set_addresses
from .replay import Replay

_JOB_BYTES = aligned(RESIZE_JOB.itemsize)


class Encoding:
    """Runs the encoder on one image or several at once. Nothing here waits for the stream.

    Args:
        network: the engines.
        cuda: the GPU.
        memory: its memory.
        imaging: the preprocessing.
        workspace: of the lane.
        features: where one image's feature maps go.
        stream: of the lane.
    """

    def __init__(
        self,
        network: Network,
        cuda: Cuda,
        memory: Memory,
        imaging: DeviceImaging,
        workspace: Workspace,
        features: Block,
        stream: int,
    ) -> None:
        self._network = network
        self._cuda = cuda
        self._memory = memory
        self._imaging = imaging
        self._workspace = workspace
        self._features = features
        self._stream = stream
        self._uploads = GrowingBuffer(memory)
        self._tables = GrowingBuffer(memory)
        self._runs: dict[int, Replay] = {}
        self.run(1)

    @property
    def pixels(self) -> int:
        """Address of the encoder's input."""
        return self._workspace["pixels"].address

    def queue_pixels(self, pixels: NDArray[np.float32]) -> None:
        """Queue the upload of float32 [N, 3, H, W] of the encoder's size."""
        network = self._network
        count = len(pixels)
        if pixels.shape != network.pixels_shape(count):
            raise BackendError(
                f"the encoder takes pixels of shape {network.pixels_shape(1)}, got {pixels.shape}"
            )
        self.run(count)
        host = self._uploads.pinned(network.pixels.nbytes(pixels.shape))
        host.view(network.pixels.dtype).reshape(pixels.shape)[...] = pixels
        self._cuda.upload(self.pixels, host, self._stream)

    def queue_images(self, images: Sequence[tuple[Block, ImageGeometry]]) -> None:
        """Queue resize and normalization of uint8 [H, W, 3] on the device."""
        self.run(len(images))
        each = self._network.pixels.nbytes(self._network.pixels_shape(1))
        sizes = [self._imaging.table_sizes(where) for _, where in images]
        tables = self._tables.block(
            len(images) * _JOB_BYTES + sum(aligned(n) for pair in sizes for n in pair)
        ).address
        jobs = self._uploads.pinned(len(images) * _JOB_BYTES)
        at = tables + len(jobs)
        for index, ((image, where), (spans, weights)) in enumerate(zip(images, sizes, strict=True)):
            job = resize_job(
                self._imaging.manifest.image,
                where,
                image=image.address,
                pixels=self.pixels + index * each,
                spans=at,
                weights=at + aligned(spans),
            )
            at += aligned(spans) + aligned(weights)
            jobs[index * _JOB_BYTES :][: job.nbytes] = job.view(np.uint8)
        self._cuda.upload(tables, jobs, self._stream)
        for index in range(len(images)):
            self._imaging.queue(RESIZING, tables + index * _JOB_BYTES, self._stream)

    def queue_encoder(self, count: int) -> list[Block]:
        """Queue the encoder for what the last call left in its input.

        Returns:
            A block for each image's feature maps, which they will be in.
        """
        network = self._network
        blocks = [self._memory.allocate_reusable(network.features.nbytes) for _ in range(count)]
        self.run(count).queue()
        if count == 1:
            self._cuda.copy(
                blocks[0].address, self._features.address, network.features.nbytes, self._stream
            )
            return blocks
        maps = self._workspace["maps"].address
        for name, slot in network.batch(count).slots.items():
            one = network.features.slots[name]
            for index, block in enumerate(blocks):
                origin = maps + slot.offset + index * one.nbytes
                self._cuda.copy(block.address + one.offset, origin, one.nbytes, self._stream)
        return blocks

    def record(self, count: int) -> None:
        """After a run, with the stream idle: record it, if it was the first."""
        if self.run(count).record():
            self._network.keep_kernels(count)

    def run(self, count: int) -> Replay:
        """What runs the encoder on so many images."""
        run = self._runs.get(count)
        if run is None or run.generation != self._workspace.generation:
            run = self._runs[count] = self._make(count)
        return run

    def _make(self, count: int) -> Replay:
        network, workspace, stream = self._network, self._workspace, self._stream
        context = network.encoder.context()
        shape = network.pixels_shape(count)
        context.set_shape(network.pixels.name, shape)
        layout = network.batch(count)
        workspace.fit(
            scratch=context.scratch_bytes(),
            pixels=network.pixels.nbytes(shape),
            maps=layout.nbytes if count > 1 else 0,
        )
        context.set_scratch(workspace["scratch"].address, workspace["scratch"].nbytes)
        context.set_address(network.pixels.name, self.pixels)
        target = self._features if count == 1 else workspace["maps"]
        set_addresses(context, layout, target, "encoder")

        def work() -> None:
            context.enqueue(stream)

        return Replay(work, context, self._cuda, self._memory, stream, workspace.generation)
