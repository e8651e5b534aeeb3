"""Whatever runs in lanes on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...accuracy.gate import judge
from ...accuracy.metrics import Measurement
from ...accuracy.record import ParityRecord, load_record
from ...bundle import Bundle
from ...errors import BackendError, EmbeddingError
from ...features import Features
from ...geometry import ImageGeometry, geometry, preprocess
from ...masks import MaskOptions, finish
from ...prompts import PackedPrompts
from ..base import Backend, ImageCall, StageListener, timed
from ..options import GpuOptions
from .cuda import Cuda, OutOfDeviceMemoryError
from .driver import Device
from .imaging import DeviceImaging
from .lane import Lane
from .memory import Block, Memory
from .network import Network
from .pool import DeviceFeatures, LanePool, ahead
from .runs import Part, share_runs, usual_classes

_LOG = logging.getLogger(__name__)

# What a lane encodes: pixels of the encoder's size, or uploaded images.
_Encodable = NDArray[np.float32] | list[tuple[Block, ImageGeometry]]
# Of values up to about 2.6; FP32 sums of matmuls reach 1e-6.
_PIXEL_ERROR = 1e-3
# Pixels whose logit is within rounding of the threshold.
_MASK_PIXELS = 1e-4


class LaneBackend(Backend):
    """Runs an encoder and a decoder on one GPU, whatever library they are loaded in.

    Memory for one call is taken at once. A call queues its work on a stream of its own and waits
    for it, so that several threads can be served at a time. Images and masks are resized on the
    device, once that is allowed; see :class:`.imaging.DeviceImaging`.

    Args:
        bundle: the bundle.
        name: of the backend.
        precision: what the two compute in.
        network: the two, which the backend lets go of when it is closed.
        cuda: the GPU.
        device: what the driver says of it.
        gpu: how to use it.

    Attributes:
        imaging: pre- and postprocessing on the device.
        imaging_fits: whether there are kernels for it, and the engines are of types that they take.

    Raises:
        BackendError: there is not enough device memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        precision: str,
        network: Network,
        cuda: Cuda,
        device: Device,
        gpu: GpuOptions,
    ) -> None:
        self.name = name
        self._memory = memory = Memory(cuda, gpu.memory)
        with cuda.active():
            imaging = DeviceImaging(bundle.manifest, memory, device.gpu.compute_capability)
            self._pool = LanePool(network, memory, imaging, gpu.lanes)
        # The engines themselves belong to the pool, which gives them back when it is closed.
        self._limits, self.images_at_once = network.limits, network.max_images
        self._layout, self._outputs = network.features, network.output_names
        self.joins_images = network.joins_images
        self.imaging = imaging
        self._lanes = gpu.lanes
        self._makes_plain_logits = network.makes_plain_logits
        self.imaging_fits = imaging.available and network.makes_plain_logits
        super().__init__(
            bundle,
            f"cuda:{cuda.index}",
            precision,
            objects_at_once=network.limits.objects,
        )
        _LOG.info("%s on %s: %s", self.versions(), device.gpu, self.precision)

    def prepare(self) -> None:
        """Make every lane, and record the decoder for the usual shape classes on each."""
        self.check_process()
        shapes = usual_classes(self._limits)
        self._pool.each(lambda lane: lane.warm_up(shapes, self._outputs))
        with self._memory.cuda.active():
            # Of all lanes at once, so that each finds spare memory for a click's logits.
            lent = [self._memory.lend(1) for _ in range(self._lanes)]
            del lent

    def close(self) -> None:
        """Give back lanes and engines, once the calls under way are done."""
        super().close()
        self._pool.close()
        self.imaging.unload()
        self._memory.close()

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> DeviceFeatures:
        """Bring feature maps to the device."""
        self.check_process()
        return self._features(self._pool.run(lambda lane: lane.upload(maps)))

    def _encode(self, pixels: NDArray[np.float32]) -> DeviceFeatures:
        (block,) = self._pool.run_encoder(lambda lane: lane.encode(pixels))
        return self._features(block)

    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        part = self._part(features, prompts, outputs)
        self._pool.run(lambda lane: lane.decode([part], outputs), holding=part.block)
        return part.results

    def encode_image(
        self,
        image: NDArray[np.uint8],
        geometry: ImageGeometry,
        on_stage: StageListener | None = None,
    ) -> Features:
        """Preprocess an image, on the device where it may and can, and run the encoder."""
        return self.encode_images([image], [geometry], on_stage)[0]

    def encode_images(
        self,
        images: Sequence[NDArray[np.uint8]],
        geometries: Sequence[ImageGeometry],
        on_stage: StageListener | None = None,
    ) -> list[Features]:
        """As many images in one run as the encoder was built for.

        While one run is under way, the images of the next are brought to the device.
        """
        self.check_process()
        most, found = self.images_at_once, list[Features]()
        starts = range(0, len(images), most)
        parts = [(images[n : n + most], geometries[n : n + most]) for n in starts]
        with closing(ahead([partial(self._bring, *part) for part in parts])) as brought:
            for _, places in parts:
                if self._resizes(places):
                    with timed("encode", on_stage):
                        blocks = self._run_encoder(next(brought))
                else:
                    with timed("preprocess", on_stage):
                        pixels = next(brought)
                    with timed("encode", on_stage):
                        blocks = self._run_encoder(pixels)
                found += map(self._features, blocks)
        return found

    def _bring(
        self, images: Sequence[NDArray[np.uint8]], places: Sequence[ImageGeometry]
    ) -> _Encodable:
        if self._resizes(places):
            # Any lane uploads, so that this goes on while another image is being encoded.
            return [(self._upload_image(i), p) for i, p in zip(images, places, strict=True)]
        spec = self.bundle.manifest.image
        return np.concatenate([preprocess(spec, image)[0] for image in images])

    def _resizes(self, places: Sequence[ImageGeometry]) -> bool:
        return self.imaging.preprocess_allowed and all(map(self.imaging.preprocess_fits, places))

    def _run_encoder(self, given: _Encodable) -> list[Block]:
        if isinstance(given, list):
            return self._pool.run_encoder(lambda lane: lane.encode_images(given))
        return self._pool.run_encoder(lambda lane: lane.encode(given))

    def decode_images(
        self,
        calls: Sequence[ImageCall],
        outputs: Sequence[str],
        options: MaskOptions,
        on_stage: StageListener | None = None,
    ) -> list[tuple[list[NDArray[np.float32]], NDArray[Any]]]:
        """As many objects in one run as the decoder takes; masks on the device where that may be.

        Where objects of several images share a run, feature maps are copied on the device, once for
        each object; where there is no memory for that, no run is shared. Masks cross the bus as one
        byte per pixel, whatever type they are asked for in.
        """
        self.check_process()
        parts = [self._part(call.features, call.prompts, outputs) for call in calls]
        on_device = self.imaging.postprocess_allowed and not options.return_logits

        def decode(lane: Lane, *, joins: bool) -> list[Part]:
            given = parts
            if on_device:
                pictures = (
                    lane.masking.room(part.results[0].shape[1:3], call.geometry, options)
                    for part, call in zip(parts, calls, strict=True)
                )
                given = [p._replace(picture=room) for p, room in zip(parts, pictures, strict=True)]
            for run in share_runs(given, self._limits, joins=joins):
                lane.decode(run, outputs)
            return given

        holding = parts[0].block if len(parts) == 1 else None
        joins = self.joins_images and len(parts) > 1
        with timed("decode", on_stage):
            try:
                done = self._pool.run(partial(decode, joins=joins), holding=holding)
            except OutOfDeviceMemoryError:
                if not joins:
                    raise
                done = self._pool.run(partial(decode, joins=False))
        if on_device:
            return [(p.results, _as_type(p.picture.masks, options)) for p in done if p.picture]
        rules = self.bundle.manifest
        with timed("postprocess", on_stage):
            return [
                (
                    part.results,
                    finish(part.results[0][0], call.geometry, rules.image, rules.masks, options),
                )
                for part, call in zip(parts, calls, strict=True)
            ]

    def make_masks(
        self, logits: NDArray[np.float32], geometry: ImageGeometry, options: MaskOptions
    ) -> NDArray[np.uint8]:
        """Clean, upsample and threshold on the device, allowed or not.

        Args:
            logits: float32 [P, C, h, w].
            geometry: of the image.
            options: how logits become masks.

        Returns:
            Masks, uint8 [P, C, H, W] of 0 and 1.

        Raises:
            BackendError: the GPU failed.
        """
        return self._pool.run(lambda lane: lane.make_masks(logits, geometry, options))

    def pixels(self, image: NDArray[np.uint8], geometry: ImageGeometry) -> NDArray[np.float32]:
        """The device's preprocessing of uint8 [H, W, 3] alone, allowed or not.

        Returns:
            Float32 [1, 3, S, S], the encoder's input.

        Raises:
            BackendError: the GPU failed.
        """
        block = self._upload_image(image)
        return self._pool.run_encoder(lambda lane: lane.pixels(block, geometry))

    def _upload_image(self, image: NDArray[np.uint8]) -> Block:
        return self._pool.run(lambda lane: lane.upload_image(image))

    def _features(self, block: Block) -> DeviceFeatures:
        return DeviceFeatures(block, self._layout, self._pool)

    def _part(self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]) -> Part:
        """All of an image's objects, with room for their results."""
        if not isinstance(features, DeviceFeatures) or features.pool is not self._pool:
            raise EmbeddingError(
                f"features are {type(features).__name__} of another model or backend; "
                "save the embedding and load it with this model"
            )
        points, most = prompts.labels.shape[1], self._limits.points
        if points > most:
            raise BackendError(
                f"{points} points for one object, corners and padding included; this engine "
                f"takes {most}. Build one that takes more: sam3rt build --max-points "
                f"{1 << (points - 1).bit_length()}"
            )
        room, lent = self._room(len(prompts.labels), outputs), None
        if self._makes_plain_logits and room[0].size:
            with self._memory.cuda.active():
                lent = self._memory.lend(room[0].nbytes)
        if lent is not None:
            room[0] = lent.view(np.float32).reshape(room[0].shape)
        return Part(features.block, prompts, room, is_pinned=lent is not None)


def _as_type(masks: NDArray[np.uint8], options: MaskOptions) -> NDArray[Any]:
    """Bytes of 0 and 1, which are what a bool is, too, in the type that was asked for."""
    dtype = np.dtype(options.dtype)
    return masks.view(dtype) if dtype.itemsize == 1 else masks.astype(dtype)


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
