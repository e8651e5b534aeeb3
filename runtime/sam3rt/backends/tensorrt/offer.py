"""What TensorRT offers for a bundle on this machine: its engines that fit, and how a set is opened.

An engine is a program. Hashes catch damage and mix-ups, not malice: load only engines from a folder
that nobody else can write to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...accuracy.gate import judge
from ...accuracy.metrics import Measurement
from ...accuracy.record import ParityRecord, load_record
from ...accuracy.select import Recipe
from ...bundle import Bundle
from ...errors import BackendError, BundleError, InvalidInputError
from ...geometry import ImageGeometry, geometry, preprocess
from ...masks import MaskOptions, finish
from ..base import Offer
from ..options import BackendOptions, GpuOptions
from .backend import LaneBackend
from .driver import probe
from .engine_backend import Platform, TensorRtBackend, open_platform
from .engines import EngineSet, candidates, find_engines, recipe_of
from .sidecar import BackendName

_LOG = logging.getLogger(__name__)

# Of values up to about 2.6; FP32 sums of matmuls reach 1e-6.
_PIXEL_ERROR = 1e-3
# Pixels whose logit is within rounding of the threshold.
_MASK_PIXELS = 1e-4


def offer_tensorrt(bundle: Bundle, options: BackendOptions) -> Offer:
    """What the module ``tensorrt`` can run.

    Args:
        bundle: an opened bundle with engines.
        options: the devices ``"auto"`` and ``"cuda"`` are the first GPU; precisions are ``"auto"``,
            a recipe for both engines, or ``"ENCODER+DECODER"``. Engines are copied to the GPU, so
            that mapping weights means nothing.

    Raises:
        InvalidInputError: the device is not a GPU.
        BackendError: the driver, a library or a fitting engine is missing; the message says what
            to do.
    """
    return _offer("tensorrt", bundle, options)


def offer_tensorrt_rtx(bundle: Bundle, options: BackendOptions) -> Offer:
    """What the module ``tensorrt_rtx`` can run; see :func:`offer_tensorrt`."""
    return _offer("tensorrt-rtx", bundle, options)


def _offer(flavour: BackendName, bundle: Bundle, options: BackendOptions) -> Offer:
    device = options.device
    if device == "cpu":
        raise InvalidInputError("device", "'cpu'", f'"auto", "cuda" or "cuda:N" with {flavour}')
    gpu = probe(int(device.partition(":")[2] or 0))
    found = [engine for engine in find_engines(bundle) if engine.sidecar.backend == flavour]
    if not found:
        raise BackendError(
            f"{bundle.path} has no {flavour} engines; build them on this machine: "
            f"sam3rt build {bundle.path} --backend {flavour}"
        )
    platform = open_platform(flavour, gpu, blocking=options.gpu.blocking)
    target = platform.target
    sets = {
        recipe_of(engines, target): engines
        for engines in candidates(bundle, target, options.precision, found)
    }

    def open_recipe(recipe: Recipe) -> TensorRtBackend:
        try:
            return open_engines(bundle, sets[recipe], platform, options.gpu)
        except BundleError as error:
            raise BackendError(f"an engine cannot be used: {error}") from error

    advice = f"Build others: sam3rt build {bundle.path} --backend {flavour}"
    return Offer(tuple(sets), open_recipe, advice)


def open_engines(
    bundle: Bundle, engines: EngineSet, platform: Platform, gpu: GpuOptions | None = None
) -> TensorRtBackend:
    """Load a set of engines, whatever it computes, and compare what stands around the network.

    Raises:
        BundleError: an engine file is missing or was changed, or the parity record is damaged.
        BackendError: an engine cannot be loaded.
    """
    backend = TensorRtBackend(bundle, engines, platform, gpu)
    allow_imaging(backend)
    return backend


def allow_imaging(backend: LaneBackend) -> None:
    """Let the device do what surrounds the network, as far as it does what the host does.

    What differs, or cannot run, is left to the host, which is slower and never wrong.

    Raises:
        BundleError: the parity record, whose images are compared, is damaged.
    """
    if not backend.imaging_fits:
        return
    record = load_record(backend.bundle)
    for what, compare, attribute in (
        ("resizing images", _compare_pixels, "preprocess_allowed"),
        ("making masks", _compare_masks, "postprocess_allowed"),
    ):
        try:
            verdict = judge(compare(backend, record))
        except BackendError as error:
            _LOG.warning("%s is left to the host: %s", what, str(error))
            continue
        if not verdict.passed:
            _LOG.warning("%s is left to the host: %s", what, verdict.explain())
        setattr(backend.imaging, attribute, verdict.passed)


def _compare_pixels(backend: LaneBackend, record: ParityRecord) -> Iterator[Measurement]:
    """The device's preprocessing of the record's images against the host's."""
    for index, image, where in _images(backend, record):
        if backend.imaging.preprocess_fits(where):
            expected, _ = preprocess(backend.bundle.manifest.image, image)
            error = float(np.abs(backend.pixels(image, where) - expected).max())
            yield Measurement(f"image {index}", "pixels", "error", error, _PIXEL_ERROR)


def _compare_masks(backend: LaneBackend, record: ParityRecord) -> Iterator[Measurement]:
    """The device's masks of made-up logits, of the record's image sizes, against the host's."""
    manifest = backend.bundle.manifest
    height, width = manifest.masks.low_res_size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [
        np.sin(x / (2 + 3 * k)) * np.cos(y / (3 + 2 * k)) * 20 + k
        for k in range(manifest.masks.multimask)
    ]
    logits = np.stack(waves).astype(np.float32)[None]
    for index, _, where in _images(backend, record):
        for threshold, holes, islands in ((0.0, 0.0, 0.0), (1.5, 30.0, 20.0)):
            options = MaskOptions(threshold, holes, islands, dtype=np.uint8)
            expected = finish(logits, where, manifest.image, manifest.masks, options)
            found = backend.make_masks(logits, where, options)
            differing = float((found != expected).mean())
            case = f"image {index} above {threshold}"
            yield Measurement(case, "masks", "differing", differing, _MASK_PIXELS)


def _images(
    backend: LaneBackend, record: ParityRecord
) -> Iterator[tuple[int, NDArray[np.uint8], ImageGeometry]]:
    for index, image in enumerate(record.images()):
        spec = backend.bundle.manifest.image
        yield index, image, geometry(spec, (image.shape[0], image.shape[1]))
