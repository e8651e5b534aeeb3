"""The masks' half of a lane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...geometry import ImageGeometry
from ...masks import MaskOptions
from .buffers import GrowingBuffer
from .cuda import Cuda
from .imaging import MASK_JOB, MASKING, DeviceImaging, mask_job
from .memory import Memory, aligned

_JOB_BYTES = aligned(MASK_JOB.itemsize)


class Picture(NamedTuple):
    """What masks are made of one image's objects, and where they go.

    Attributes:
        where: where the image lies.
        options: how logits become masks.
        masks: where they go, uint8 [P, C, H, W], contiguous; see :meth:`Masking.room`.
        is_pinned: whether the GPU can write there.
    """

    where: ImageGeometry
    options: MaskOptions
    masks: NDArray[np.uint8]
    is_pinned: bool

    def part(self, objects: slice) -> Picture:
        """That of some of the objects."""
        return self._replace(masks=self.masks[objects])


class Masking:
    """Makes masks of logits that lie on the device, for the images of one run.

    Args:
        cuda: the GPU.
        memory: its memory.
        imaging: the kernels.
        stream: of the lane.
    """

    def __init__(self, cuda: Cuda, memory: Memory, imaging: DeviceImaging, stream: int) -> None:
        self._cuda = cuda
        self._memory = memory
        self._imaging = imaging
        self._stream = stream
        self._jobs = GrowingBuffer(memory)
        self._masks = GrowingBuffer(memory)
        self._search = GrowingBuffer(memory)

    def room(self, planes: tuple[int, ...], where: ImageGeometry, options: MaskOptions) -> Picture:
        """Host memory for P objects' C masks each, ``planes``, which the caller keeps."""
        shape = (*planes, *where.original_size)
        nbytes = math.prod(shape)
        lent = self._memory.lend(nbytes) if nbytes else None
        masks = np.empty(shape, np.uint8) if lent is None else lent.reshape(shape)
        return Picture(where, options, masks, lent is not None)

    def fill(self, jobs: NDArray[Any], logits: int, pictures: Sequence[Picture]) -> list[int]:
        """Fill in a job for each image.

        Args:
            jobs: one for each.
            logits: address of float32 [P, C, h, w], one image's objects after the other's.
            pictures: one for each image.

        Returns:
            Where each image's masks will be.
        """
        counts = [math.prod(p.masks.shape[:2]) for p in pictures]
        sizes = [aligned(p.masks.nbytes) for p in pictures]
        masks = self._masks.block(sum(sizes)).address
        options = pictures[0].options
        search: dict[str, int] = {}
        if options.max_hole_area > 0 or options.max_sprinkle_area > 0:
            # One image's job after another's, so that all can use the same memory.
            each = aligned(max(counts) * self._imaging.plane_bytes)
            first = self._search.block(3 * each).address
            names = ("cleaned", "parents", "areas")
            search = {name: first + i * each for i, name in enumerate(names)}
        made = []
        for index, (picture, planes) in enumerate(zip(pictures, counts, strict=True)):
            jobs[index : index + 1] = mask_job(
                self._imaging.manifest,
                planes,
                picture.where,
                options,
                logits=logits,
                masks=masks,
                **search,
            )
            made.append(masks)
            logits += planes * self._imaging.plane_bytes
            masks += sizes[index]
        return made

    def queue(self, logits: int, pictures: Sequence[Picture]) -> list[int]:
        """Queue what makes every image's masks; see :meth:`fill`."""
        jobs = np.zeros(len(pictures), MASK_JOB)
        made = self.fill(jobs, logits, pictures)
        host = self._jobs.pinned(len(jobs) * _JOB_BYTES)
        host.reshape(-1, _JOB_BYTES)[:, : MASK_JOB.itemsize] = jobs.view(np.uint8).reshape(
            -1, MASK_JOB.itemsize
        )
        block = self._jobs.block(len(host))
        self._cuda.upload(block.address, host, self._stream)
        for index in range(len(jobs)):
            self._imaging.queue(MASKING, block.address + index * _JOB_BYTES, self._stream)
        return made

    def bring(self, made: Sequence[int], pictures: Sequence[Picture]) -> None:
        """Copy masks to the host, and wait for the stream."""
        slow = [p.masks for p in pictures if not p.is_pinned]
        pinned = self._masks.pinned(sum(array.nbytes for array in slow)) if slow else None
        copies, at = [], 0
        for address, picture in zip(made, pictures, strict=True):
            array = picture.masks.reshape(-1)
            host = array
            if not picture.is_pinned:
                assert pinned is not None
                host = pinned[at : at + array.nbytes]
                copies.append((array, host))
                at += array.nbytes
            self._cuda.download(host, address, self._stream)
        self._cuda.synchronize(self._stream)
        for array, host in copies:
            array[...] = host
