"""A lane with the encoder."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError
from ...geometry import ImageGeometry
from .buffers import GrowingBuffer
from .imaging import RESIZE_JOB, RESIZING, DeviceImaging, resize_job
from .lane import Lane, Replay
from .memory import Block, Memory, aligned
from .network import Network, set_addresses

_JOB_BYTES = aligned(RESIZE_JOB.itemsize)


class EncoderLane(Lane):
    """Runs the encoder on one image or several at once, and the decoder as any lane."""

    encodes = True

    def __init__(self, network: Network, memory: Memory, imaging: DeviceImaging) -> None:
        super().__init__(network, memory, imaging)
        self._uploads = GrowingBuffer(memory)
        self._tables = GrowingBuffer(memory)
        self._encoders: dict[int, Replay] = {}
        self._encoder(1)

    def encode(self, pixels: NDArray[np.float32]) -> list[Block]:
        """Run the encoder on float32 [N, 3, H, W] of its size.

        Returns:
            Each image's feature maps.
        """
        network, count = self._network, len(pixels)
        if pixels.shape != network.pixels_shape(count):
            raise BackendError(
                f"the encoder takes pixels of shape {network.pixels_shape(1)}, got {pixels.shape}"
            )
        with self._idle_on_error():
            run = self._encoder(count)
            host = self._uploads.pinned(network.pixels.nbytes(pixels.shape))
            host.view(network.pixels.dtype).reshape(pixels.shape)[...] = pixels
            self._cuda.upload(self._workspace["pixels"].address, host, self._stream)
            return self._run_encoder(run, count)

    def encode_images(self, images: Sequence[tuple[Block, ImageGeometry]]) -> list[Block]:
        """Resize and normalize images, from :meth:`upload_image`, and run the encoder on them."""
        with self._idle_on_error():
            return self._run_encoder(self._resize(images), len(images))

    def pixels(self, image: Block, where: ImageGeometry) -> NDArray[np.float32]:
        """What :meth:`encode_images` would encode of one image, float32 [1, 3, H, W]."""
        shape = self._network.pixels_shape(1)
        with self._idle_on_error():
            self._resize([(image, where)])
            host = self._results.pinned(self._network.pixels.nbytes(shape))
            self._cuda.download(host, self._workspace["pixels"].address, self._stream)
            self._cuda.synchronize(self._stream)
        return host.view(np.float32).reshape(shape).copy()

    def _resize(self, images: Sequence[tuple[Block, ImageGeometry]]) -> Replay:
        """Queue resize and normalization of uint8 [H, W, 3] on the device.

        Returns:
            What runs the encoder on them.
        """
        run = self._encoder(len(images))
        pixels = self._workspace["pixels"].address
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
                pixels=pixels + index * each,
                spans=at,
                weights=at + aligned(spans),
            )
            at += aligned(spans) + aligned(weights)
            jobs[index * _JOB_BYTES :][: job.nbytes] = job.view(np.uint8)
        self._cuda.upload(tables, jobs, self._stream)
        for index in range(len(images)):
            self._imaging.queue(RESIZING, tables + index * _JOB_BYTES, self._stream)
        return run

    def _run_encoder(self, run: Replay, count: int) -> list[Block]:
        """Encode what was left in the encoder's input."""
        network = self._network
        blocks = [self._memory.allocate_reusable(network.features.nbytes) for _ in range(count)]
        run.queue()
        if count == 1:
            (block,), nbytes = blocks, network.features.nbytes
            self._cuda.copy(block.address, self._features.address, nbytes, self._stream)
        else:
            maps = self._workspace["maps"].address
            for name, slot in network.batch(count).slots.items():
                one = network.features.slots[name]
                for index, block in enumerate(blocks):
                    origin = maps + slot.offset + index * one.nbytes
                    self._cuda.copy(block.address + one.offset, origin, one.nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        if count == 1:
            self._held = weakref.ref(blocks[0])
        if run.record():
            network.keep_kernels(count)
        return blocks

    def _encoder(self, count: int) -> Replay:
        """What runs the encoder on so many images."""
        run = self._encoders.get(count)
        if run is None or run.generation != self._workspace.generation:
            run = self._encoders[count] = self._make_encoder(count)
        return run

    def _make_encoder(self, count: int) -> Replay:
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
        context.set_address(network.pixels.name, workspace["pixels"].address)
        target = self._features if count == 1 else workspace["maps"]
        set_addresses(context, layout, target, "encoder")

        def work() -> None:
            context.enqueue(stream)

        return Replay(work, context, self._memory, stream, workspace.generation)
