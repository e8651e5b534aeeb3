"""Preprocessing and postprocessing on the GPU: what ``kernels.cu`` is given to do."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import ImageSpec, Manifest
from ...errors import BackendError
from ...geometry import ImageGeometry, rows_first
from ...masks import MaskOptions
from .cuda import Cuda

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


class DeviceImaging:
    """The kernels around the network, compiled for one GPU.

    They are not used before they are allowed: their results must have been compared first.

    Args:
        manifest: of the bundle.
        cuda: the GPU.
        capability: its compute capability.

    Attributes:
        manifest: the same.
        available: whether they could be compiled.
        preprocess_allowed: whether images may be resized with them.
        postprocess_allowed: whether masks may be made with them.
    """

    def __init__(self, manifest: Manifest, cuda: Cuda, capability: str) -> None:
        self.manifest = manifest
        self._cuda = cuda
        self._kernels: Mapping[str, Any] = {}
        self.preprocess_allowed = False
        self.postprocess_allowed = False
        source = Path(__file__).with_name("kernels.cu")
        try:
            text = source.read_text()
            self._kernels = cuda.load_kernels(text, (*RESIZING, *MASKING), capability)
        except (BackendError, OSError) as error:
            _LOG.warning("images and masks are resized on the host: %s", str(error))
        self.available = bool(self._kernels)

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
            self._cuda.launch_kernel(self._kernels[name], _BLOCKS, _THREADS, job, stream)


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
