"""Preprocessing and postprocessing on the GPU: what ``kernels.cu`` is given, and where masks go."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...bundle import ImageSpec, Manifest
from ...errors import BackendError
from ...geometry import ImageGeometry, rows_first
from ...masks import MaskOptions
from .buffers import GrowingBuffer
from .cuda import Kernels
from .memory import Memory, aligned

_LOG = logging.getLogger(__name__)

# The structs of kernels.cu.
RESIZE_JOB = np.dtype(
    [
        *((name, np.uint64) for name in ("image", "pixels", "spans", "weights")),
        *((name, np.int32, 2) for name in ("source", "filled", "side", "taps")),
        ("rounds", np.int32),
        ("pad", np.float32),
        ("mean", np.float32, 3),
        ("std", np.float32, 3),
    ],
    align=True,
)
MASK_JOB = np.dtype(
    [
        *((name, np.uint64) for name in ("logits", "cleaned", "parents", "areas", "masks")),
        ("planes", np.int32),
        *((name, np.int32, 2) for name in ("size", "kept", "target", "padded")),
        *((name, np.float32, 2) for name in ("first_step", "step")),
        ("max_hole", np.int32),
        ("max_sprinkle", np.int32),
        ("threshold", np.float32),
    ],
    align=True,
)
RESIZING = ("resize_weights", "resize_image")
MASKING = ("find_runs", "join_runs", "count_areas", "clean_logits", "make_masks")
# Each kernel loops over what there is to do, so that one launch serves every size. These fill any
# GPU, and cost little where there is nothing to do.
_BLOCKS, _THREADS = 1024, 128
_JOB_BYTES = aligned(MASK_JOB.itemsize)


class DeviceImaging:
    """The kernels around the network, compiled for one GPU.

    They are not used before they are allowed: their results must have been compared first.

    Args:
        manifest: of the bundle.
        memory: of the GPU; it gives the kernels back.
        capability: the GPU's compute capability.

    Attributes:
        manifest: the same.
        available: whether they could be compiled.
        preprocess_allowed: whether images may be resized with them.
        postprocess_allowed: whether masks may be made with them.
    """

    def __init__(self, manifest: Manifest, memory: Memory, capability: str) -> None:
        self.manifest = manifest
        self._cuda = cuda = memory.cuda
        self._kernels = Kernels(None, {})
        self.preprocess_allowed = False
        self.postprocess_allowed = False
        source = Path(__file__).with_name("kernels.cu")
        try:
            text = source.read_text()
            self._kernels = cuda.load_kernels(text, (*RESIZING, *MASKING), capability)
        except (BackendError, OSError) as error:
            _LOG.warning("images and masks are resized on the host: %s", str(error))
        self.available = bool(self._kernels.functions)
        self._unload: Callable[[], object] = lambda: None
        if self.available:
            self._unload = memory.give_back_after(self, cuda.unload_kernels, self._kernels.module)

    def unload(self) -> None:
        """Give the kernels back. No lane may use them any more."""
        self._unload()

    @property
    def plane_bytes(self) -> int:
        """Bytes of one low-resolution mask."""
        height, width = self.manifest.masks.low_res_size
        return 4 * height * width

    def preprocess_fits(self, where: ImageGeometry) -> bool:
        """Whether the kernels resize such an image as the host does."""
        rounds = self.manifest.image.resize_dtype == "uint8"
        return self.available and not (rounds and rows_first(where))

    def table_sizes(self, where: ImageGeometry) -> tuple[int, int]:
        """Bytes of a resize's spans and of its weights."""
        taps = _taps(where)
        spans = 2 * sum(where.input_size)
        weights = sum(n * t for n, t in zip(where.input_size, taps, strict=True))
        return 4 * spans, 4 * weights

    def queue(self, kernels: tuple[str, ...], job: int, stream: int) -> None:
        """Queue :data:`RESIZING` or :data:`MASKING` for a job on the device."""
        for name in kernels:
            self._cuda.launch_kernel(self._kernels.functions[name], _BLOCKS, _THREADS, job, stream)


def resize_job(spec: ImageSpec, where: ImageGeometry, **addresses: int) -> NDArray[Any]:
    """A ``ResizeJob``, one element of :data:`RESIZE_JOB`."""
    job = np.zeros(1, RESIZE_JOB)
    for name, value in addresses.items():
        job[name] = value
    job["source"], job["filled"] = where.original_size, where.input_size
    job["side"], job["taps"] = spec.size, _taps(where)
    job["rounds"], job["pad"] = spec.resize_dtype == "uint8", spec.pad_value
    job["mean"], job["std"] = spec.mean, spec.std
    return job


def mask_job(
    manifest: Manifest, planes: int, where: ImageGeometry, options: MaskOptions, **addresses: int
) -> NDArray[Any]:
    """A ``MaskJob``, one element of :data:`MASK_JOB`."""
    job = np.zeros(1, MASK_JOB)
    for name, value in addresses.items():
        job[name] = value
    size, padded = manifest.masks.low_res_size, manifest.image.size
    kept, target = where.input_size, where.original_size
    job["planes"], job["size"], job["kept"], job["target"] = planes, size, kept, target
    if manifest.masks.upsampling == "unpad":
        job["padded"] = padded
        job["first_step"] = np.divide(size, padded)
        job["step"] = np.divide(kept, target)
    else:
        job["step"] = np.divide(size, target)
    job["max_hole"] = _whole(options.max_hole_area)
    job["max_sprinkle"] = _whole(options.max_sprinkle_area)
    job["threshold"] = options.threshold
    return job


def _taps(where: ImageGeometry) -> tuple[int, int]:
    """The most inputs that an output of a resize takes, along either axis."""
    height, width = (
        2 * math.ceil(max(1.0, source / filled)) + 1
        for source, filled in zip(where.original_size, where.input_size, strict=True)
    )
    return height, width


def _whole(area: float) -> int:
    """The largest whole number of pixels that an area allows."""
    return math.floor(min(max(area, 0.0), 2.0**31 - 1))


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
        memory: of the GPU.
        imaging: the kernels.
        stream: of the lane.
    """

    def __init__(self, memory: Memory, imaging: DeviceImaging, stream: int) -> None:
        self._cuda = memory.cuda
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
