"""One set of engines, loaded: the backend itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import Bundle
from ...errors import BackendError, BundleError, EmbeddingError
from ...features import Features
from ...geometry import ImageGeometry
from ...masks import MaskOptions, clean_all
from ...prompts import PackedPrompts
from ...timer import StageListener, timed
from ..base import Backend
from .cuda import Cuda, Device
from .engines import EngineFile, EngineSet, EngineTarget
from .features import DeviceFeatures
from .imaging import DeviceImaging
from .lane import Lane
from .memory import Block, Memory
from .network import Network
from .pool import LanePool
from .sidecar import BackendName
from .trt import Engine, KernelCache, Library

_LOG = logging.getLogger(__name__)

# Calls at a time. One thread's decoding leaves the GPU idle while it copies masks; more than a
# few take turns on it anyway.
_LANES = 4
# Of an engine file, bytes at a time while it is hashed.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Platform:
    """One GPU and the libraries for it, ready to use.

    Attributes:
        device: what the driver says of the GPU.
        cuda: its memory, streams and graphs.
        library: the TensorRT flavour.
    """

    device: Device
    cuda: Cuda
    library: Library

    @property
    def target(self) -> EngineTarget:
        """What engines have to fit."""
        return EngineTarget(
            self.device.gpu,
            self.library.flavour,
            self.library.version,
            self.device.driver_version,
        )


def open_platform(flavour: BackendName, device: Device) -> Platform:
    """Load the libraries for a GPU.

    Ask the driver first, with :func:`.cuda.probe`: TensorRT ends the process where it finds none.

    Args:
        flavour: which TensorRT.
        device: what the driver said.

    Raises:
        BackendError: cuda-python or TensorRT is missing, or does not fit the driver; the message
            says what to do.
    """
    cuda = Cuda(device.index)
    with cuda.active():
        return Platform(device, cuda, Library(flavour))


class TensorRtBackend(Backend):
    """Runs one set of engines on one GPU.

    Engines are loaded, and memory for one call is taken, at once. A call queues its work on a
    stream of its own and waits for it, so that several threads can be served at a time. Images and
    masks of sizes that the device can resize are resized there, once that is allowed; see
    :class:`.imaging.DeviceImaging`.

    Args:
        bundle: the bundle the engines were built from.
        engines: the set, as chosen for this machine.
        platform: the GPU and the libraries.
        lanes: calls at a time, at most.

    Attributes:
        engines: the set.
        imaging: pre- and postprocessing on the device, as far as there are engines for it.

    Raises:
        BundleError: an engine file is missing or was changed.
        BackendError: an engine cannot be loaded or is not what the manifest describes, or there
            is not enough device memory.
    """

    def __init__(
        self, bundle: Bundle, engines: EngineSet, platform: Platform, lanes: int = _LANES
    ) -> None:
        self.name = platform.library.flavour
        self.engines = engines
        self._platform = platform
        cuda = platform.cuda
        memory = Memory(cuda)
        kernels = None
        if self.name == "tensorrt-rtx":
            architecture = platform.device.gpu.compute_capability.replace(".", "")
            kernels = KernelCache(engines.encoder.path.with_name(f"kernels-sm{architecture}.cache"))
        self._kernels = kernels
        with cuda.active():
            encoder, decoder = self._load(engines.encoder), self._load(engines.decoder)
            network = Network(bundle, encoder, decoder, kernels)
            imaging = DeviceImaging(
                bundle.manifest,
                self._load_optional(engines.preprocess),
                self._load_optional(engines.postprocess),
                cuda,
                memory,
            )
            self._pool = LanePool(
                lambda encodes: Lane(network, cuda, memory, imaging, encodes), lanes, cuda, memory
            )
        self._network = network
        self.imaging = imaging
        super().__init__(
            bundle,
            f"cuda:{cuda.index}",
            engines.precision,
            objects_at_once=network.limits.objects,
        )
        _LOG.info("%s on %s: %s", self.versions(), platform.device.gpu, self.precision)

    def prepare(self) -> None:
        """Run the decoder once for one object, so that the first prompt meets a recorded graph."""
        maps = [np.zeros(s.shape, np.float32) for s in self._network.features.slots.values()]
        features = self.upload(maps)
        for points in sorted({min(points, self._network.limits.points) for points in (4, 8)}):
            prompts = PackedPrompts(
                np.zeros((1, points, 2), np.float32), np.zeros((1, points), np.int64), None
            )
            self.decode(features, prompts, self._network.output_names)

    def versions(self) -> dict[str, str]:
        """Versions of TensorRT and the driver."""
        library = self._platform.library
        return {self.name: library.version, "driver": self._platform.device.driver_version}

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> DeviceFeatures:
        """Bring feature maps to the device."""
        self.check_process()
        with self._pool.lane() as lane:
            return self._features(lane.upload(maps))

    def _encode(self, pixels: NDArray[np.float32]) -> DeviceFeatures:
        with self._pool.lane(encode=True) as lane:
            return self._features(lane.encode(pixels))

    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        self._check_points(prompts)
        block = self._block(features)
        with self._pool.lane(holding=block) as lane:
            return lane.decode(block, prompts, outputs)

    def encode_image(
        self,
        image: NDArray[np.uint8],
        geometry: ImageGeometry,
        on_stage: StageListener | None = None,
    ) -> Features:
        """Preprocess an image, on the device where it may and can, and run the encoder."""
        if not (self.imaging.preprocess_allowed and self.imaging.preprocess_fits(geometry)):
            return super().encode_image(image, geometry, on_stage)
        self.check_process()
        with timed("encode", on_stage), self._pool.lane(encode=True) as lane:
            return self._features(lane.encode_image(image, geometry))

    def decode_masks(
        self,
        features: Features,
        prompts: PackedPrompts,
        outputs: Sequence[str],
        geometry: ImageGeometry,
        options: MaskOptions,
        on_stage: StageListener | None = None,
    ) -> tuple[list[NDArray[np.float32]], NDArray[Any]]:
        """Run the decoder and make masks, on the device where it may and can.

        Masks cross the bus as one byte per pixel. Holes are found on the host either way.
        """
        on_device = self.imaging.postprocess_allowed and self.imaging.postprocess_fits(geometry)
        if not on_device or options.return_logits or not len(prompts.labels):
            return super().decode_masks(features, prompts, outputs, geometry, options, on_stage)
        threshold = options.threshold
        if options.max_hole_area > 0 or options.max_sprinkle_area > 0:
            with timed("decode", on_stage):
                results = self.decode(features, prompts, outputs)
            with timed("postprocess", on_stage):
                cleaned = clean_all(
                    results[0][0], threshold, options.max_hole_area, options.max_sprinkle_area
                )
                masks = self.upsample(cleaned, geometry, threshold)
        else:
            self.check_process()
            self._check_points(prompts)
            block = self._block(features)
            with timed("decode", on_stage), self._pool.lane(holding=block) as lane:
                runs = [
                    lane.decode_masks(block, part, outputs, geometry, threshold)
                    for part in prompts.split(self._network.limits.objects)
                ]
            found = zip(*(arrays for arrays, _ in runs), strict=True)
            results = [_joined(parts, axis=1) for parts in found]
            masks = _joined([part for _, part in runs], axis=0)
        return results, masks.astype(options.dtype, copy=False)

    def upsample(
        self, logits: NDArray[np.float32], geometry: ImageGeometry, threshold: float
    ) -> NDArray[np.uint8]:
        """Upsample and threshold on the device, allowed or not.

        Args:
            logits: float32 [P, C, h, w].
            geometry: of the image; its size must fit the engine.
            threshold: logits above it are foreground.

        Returns:
            Masks, uint8 [P, C, H, W] of 0 and 1.

        Raises:
            BackendError: the GPU failed.
        """
        step = self._network.limits.objects
        with self._pool.lane() as lane:
            masks = [
                lane.upsample(logits[first : first + step], geometry, threshold)
                for first in range(0, len(logits), step)
            ]
        return _joined(masks, axis=0)

    def pixels(self, image: NDArray[np.uint8], geometry: ImageGeometry) -> NDArray[np.float32]:
        """The device's preprocessing of uint8 [H, W, 3] alone, allowed or not.

        Returns:
            Float32 [1, 3, S, S], the encoder's input.

        Raises:
            BackendError: the GPU failed.
        """
        with self._pool.lane(encode=True) as lane:
            return lane.pixels(image, geometry)

    def _check_points(self, prompts: PackedPrompts) -> None:
        points, most = prompts.labels.shape[1], self._network.limits.points
        if points > most:
            raise BackendError(
                f"{points} points for one object, corners and padding included; this engine "
                f"takes {most}. Build one that takes more: sam3rt build --max-points "
                f"{1 << (points - 1).bit_length()}"
            )

    def _features(self, block: Block) -> DeviceFeatures:
        return DeviceFeatures(
            block, self._network.features, self._pool, self._platform.cuda.dlpack_device
        )

    def _block(self, features: Features) -> Block:
        if not isinstance(features, DeviceFeatures) or features.pool is not self._pool:
            raise EmbeddingError(
                f"features are {type(features).__name__} of another model or backend; "
                "save the embedding and load it with this model"
            )
        return features.block

    def _load_optional(self, engine: EngineFile | None) -> Engine | None:
        return None if engine is None else self._load(engine)

    def _load(self, engine: EngineFile) -> Engine:
        """Load an engine from the file whose content was hashed."""
        name = f"{engine.path.parent.name}/{engine.path.name}"
        try:
            with engine.path.open("rb") as file:
                digest = hashlib.sha256()
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                found = digest.hexdigest()
                if found == engine.sidecar.engine.sha256:
                    file.seek(0)
                    return self._platform.library.load(file, name, self._kernels)
        except OSError as error:
            raise BundleError(f"cannot be read: {error}", name) from error
        raise BundleError(
            f"engine.sha256 is {engine.sidecar.engine.sha256[:16]}... in the sidecar, the "
            f"file has {found[:16]}...: it was changed; build it again",
            name,
        )


def _joined(parts: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
    """The parts along an axis; one part, the usual case, as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
