"""One set of engines, loaded: the backend itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...bundle import Bundle
from ...errors import BackendError, BundleError, EmbeddingError
from ...features import Features
from ...geometry import ImageGeometry, geometry
from ...prompts import PackedPrompts
from .engines.selection import EngineFile, EngineSet
from .features import DeviceFeatures
from .imaging import DeviceImaging
from .lanes import Lane, LanePool
from .memory import Block, Memory
from .network import Network
from .platform import Platform
from .shapes import all_classes
from .trt import Engine

_LOG = logging.getLogger(__name__)

_Scalar = TypeVar("_Scalar", bound=np.generic)

# Calls at a time. One thread's decoding leaves the GPU idle while it copies masks; more than a
# few take turns on it anyway.
_LANES = 4


class TensorRtBackend:
    """Runs one set of engines on one GPU.

    Engines are loaded, and memory for one call is taken, at once. A call queues its work on a
    stream of its own and waits for it, so that several threads can be served at a time.

    Args:
        bundle: the bundle the engines were built from.
        engines: the set, as chosen for this machine.
        platform: the GPU and the libraries.
        lanes: calls at a time, at most.

    Raises:
        BundleError: an engine file is missing or was changed.
        BackendError: an engine cannot be loaded or is not what the manifest describes, or there
            is not enough device memory.
    """

    def __init__(
        self, bundle: Bundle, engines: EngineSet, platform: Platform, lanes: int = _LANES
    ) -> None:
        self._platform = platform
        self.engines = engines
        cuda = platform.cuda
        cuda.activate()
        self._memory = Memory(cuda)
        network = Network(bundle, self._load(engines.encoder), self._load(engines.decoder))
        self._network = network
        self._image_spec = bundle.manifest.image
        self._imaging = imaging = DeviceImaging(
            bundle.manifest,
            self._load_optional(engines.preprocess),
            self._load_optional(engines.postprocess),
        )
        memory = self._memory
        self._pool = LanePool(
            lambda wide: Lane(network, cuda, memory, imaging, wide), lanes, cuda, memory
        )
        _LOG.info(
            "%s %s on %s (%s, sm %s): %s",
            self.name,
            platform.library.version,
            self.device,
            platform.device.gpu.name,
            platform.device.gpu.compute_capability,
            self.precision,
        )

    @property
    def name(self) -> str:
        """``"tensorrt"`` or ``"tensorrt-rtx"``."""
        return self._platform.library.flavour

    @property
    def device(self) -> str:
        """Such as ``"cuda:0"``."""
        return f"cuda:{self._platform.cuda.index}"

    @property
    def precision(self) -> str:
        """The engines' recipe, or ``"ENCODER+DECODER"`` where theirs differ."""
        return self.engines.precision

    @property
    def imaging(self) -> DeviceImaging:
        """Pre- and postprocessing on the device, as far as there are engines for it."""
        return self._imaging

    def prepare(self) -> None:
        """Run the decoder once for one object, so that the first prompt meets a recorded graph."""
        maps = [np.zeros(s.shape, np.float32) for s in self._network.features.slots.values()]
        features = self.upload(maps)
        for shape in all_classes(self._network.limits):
            if shape.objects == 1 and shape.points <= 8:
                prompts = PackedPrompts(
                    np.zeros((1, shape.points, 2), np.float32),
                    np.zeros((1, shape.points), np.int64),
                    None,
                )
                self.decode(features, prompts, self._network.output_names)

    def versions(self) -> dict[str, str]:
        """Versions of TensorRT and the driver."""
        library = self._platform.library
        return {library.flavour: library.version, "driver": self._platform.device.driver_version}

    def encode(self, pixels: NDArray[np.float32]) -> DeviceFeatures:
        """Run the encoder on float32 [1, 3, H, W].

        Raises:
            BackendError: the GPU failed, for example for lack of memory.
        """
        with self._pool.lane(wide=True) as lane:
            return self._features(lane.encode(pixels))

    def decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Run the decoder; only the named outputs are brought to the host.

        More objects than the engine takes are decoded in several runs.

        Raises:
            EmbeddingError: the features belong to another backend.
            BackendError: there are more points than the engine takes, or the GPU failed.
        """
        block = self._block(features)
        with self._pool.lane(holding=block) as lane:
            runs = [lane.decode(block, part, outputs)[0] for part in self._parts(prompts)]
        return [_joined(parts, 1) for parts in zip(*runs, strict=True)]

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> DeviceFeatures:
        """Bring feature maps to the device."""
        with self._pool.lane() as lane:
            return self._features(lane.upload(maps))

    def preprocesses(self, place: ImageGeometry) -> bool:
        """Whether :meth:`encode_image` takes images of that size."""
        return self._imaging.preprocess_allowed and self._imaging.preprocess_fits(place)

    def encode_image(self, image: NDArray[np.uint8], place: ImageGeometry) -> DeviceFeatures:
        """Preprocess uint8 [H, W, 3] on the device and run the encoder.

        Raises:
            BackendError: the GPU failed.
        """
        with self._pool.lane(wide=True) as lane:
            matrices = self._imaging.resize_matrices(place, lane.upload_block)
            return self._features(lane.encode_image(image, matrices))

    def pixels(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The device's preprocessing of uint8 [H, W, 3] alone, allowed or not.

        Returns:
            Float32 [1, 3, S, S], the encoder's input.
        """
        place = geometry(self._image_spec, (image.shape[0], image.shape[1]))
        with self._pool.lane(wide=True) as lane:
            matrices = self._imaging.resize_matrices(place, lane.upload_block)
            return lane.pixels(image, matrices)

    def upsamples(self, place: ImageGeometry) -> bool:
        """Whether :meth:`decode_masks` and :meth:`upsample` make masks of that size."""
        return self._imaging.postprocess_allowed and self._imaging.postprocess_fits(place)

    def decode_masks(
        self,
        features: Features,
        prompts: PackedPrompts,
        outputs: Sequence[str],
        place: ImageGeometry,
        threshold: float,
    ) -> tuple[list[NDArray[np.float32]], NDArray[np.uint8]]:
        """Like :meth:`decode`, with masks of the image's size made on the device.

        Returns:
            The outputs, and masks, uint8 [P, C, H, W] of 0 and 1.

        Raises:
            EmbeddingError: the features belong to another backend.
            BackendError: there are more points than the engine takes, or the GPU failed.
        """
        block = self._block(features)
        runs, masks = [], []
        with self._pool.lane(holding=block) as lane:
            matrices = self._imaging.upsampling_matrices(place, lane.upload_block)
            for part in self._parts(prompts):
                found, upsampled = lane.decode(block, part, outputs, (matrices, threshold))
                runs.append(found)
                masks.append(upsampled)
        return (
            [_joined(parts, 1) for parts in zip(*runs, strict=True)],
            _joined([part for part in masks if part is not None], 0),
        )

    def upsample(
        self, logits: NDArray[np.float32], place: ImageGeometry, threshold: float
    ) -> NDArray[np.uint8]:
        """Upsample and threshold float32 [P, C, h, w] on the device.

        Returns:
            Masks, uint8 [P, C, H, W] of 0 and 1.

        Raises:
            BackendError: the GPU failed.
        """
        step = self._network.limits.objects
        with self._pool.lane() as lane:
            matrices = self._imaging.upsampling_matrices(place, lane.upload_block)
            masks = [
                lane.upsample(logits[first : first + step], matrices, threshold)
                for first in range(0, len(logits), step)
            ]
        return _joined(masks, 0)

    def _parts(self, prompts: PackedPrompts) -> list[PackedPrompts]:
        """Prompts in as many parts as the engine needs for their objects."""
        objects, points = prompts.labels.shape
        limits = self._network.limits
        if points > limits.points:
            raise BackendError(
                f"{points} points for one object, corners and padding included; this engine "
                f"takes {limits.points}. Build one that takes more: sam3rt build --max-points "
                f"{1 << (points - 1).bit_length()}"
            )
        shared = prompts.masks is None or len(prompts.masks) == 1
        parts = []
        for first in range(0, objects, limits.objects):
            part = slice(first, first + limits.objects)
            masks = prompts.masks if shared or prompts.masks is None else prompts.masks[part]
            parts.append(PackedPrompts(prompts.points[part], prompts.labels[part], masks))
        return parts

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
        """Load an engine: what is loaded is what was hashed."""
        name = f"{engine.path.parent.name}/{engine.path.name}"
        try:
            content = engine.path.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot be read: {error}", name) from error
        found = hashlib.sha256(content).hexdigest()
        if found != engine.sidecar.engine.sha256:
            raise BundleError(
                f"engine.sha256 is {engine.sidecar.engine.sha256[:16]}... in the sidecar, the "
                f"file has {found[:16]}...: it was changed; build it again",
                name,
            )
        return self._platform.library.load(content, name)


def _joined(parts: Sequence[NDArray[_Scalar]], axis: int) -> NDArray[_Scalar]:
    """The parts along an axis; one part, the usual case, as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
