"""The backends themselves: whatever runs in lanes on a GPU, and one set of TensorRT engines."""

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
from ...geometry import ImageGeometry, preprocess
from ...masks import MaskOptions
from ...prompts import PackedPrompts
from ...timer import StageListener, timed
from ..base import Backend, GpuOptions
from .cuda import Cuda
from .driver import Device
from .engines import EngineFile, EngineSet, EngineTarget
from .features import DeviceFeatures
from .imaging import DeviceImaging
from .lane import Lane, Pictures
from .memory import Block, Memory
from .network import Network
from .pool import LanePool
from .shapes import usual_classes
from .sidecar import BackendName
from .trt import Engine, KernelCache, Library

_LOG = logging.getLogger(__name__)

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


def open_platform(flavour: BackendName, device: Device, *, blocking: bool = False) -> Platform:
    """Load the libraries for a GPU.

    Ask the driver first, with :func:`.driver.probe`: TensorRT ends the process where it finds none.

    Args:
        flavour: which TensorRT.
        device: what the driver said.
        blocking: see :class:`sam3rt.GpuOptions`.

    Raises:
        BackendError: cuda-python or TensorRT is missing, or does not fit the driver; the message
            says what to do.
    """
    cuda = Cuda(device.index, blocking=blocking)
    with cuda.active():
        return Platform(device, cuda, Library(flavour))


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
        memory = Memory(cuda, gpu.memory)
        with cuda.active():
            imaging = DeviceImaging(bundle.manifest, cuda, device.gpu.compute_capability)
            self._pool = LanePool(
                lambda encodes: Lane(network, cuda, memory, imaging, encodes),
                gpu.lanes,
                cuda,
                memory,
            )
        # The engines themselves belong to the pool, which gives them back when it is closed.
        self._limits, self.images_at_once = network.limits, network.max_images
        self._layout, self._outputs = network.features, network.output_names
        self._masks_each = network.masks_each
        self._dlpack_device = cuda.dlpack_device
        self.imaging = imaging
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

    def close(self) -> None:
        """Give back lanes and engines, once the calls under way are done."""
        super().close()
        self._pool.close()

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> DeviceFeatures:
        """Bring feature maps to the device."""
        self.check_process()
        return self._features(self._pool.run(lambda lane: lane.upload(maps)))

    def _encode(self, pixels: NDArray[np.float32]) -> DeviceFeatures:
        (block,) = self._pool.run(lambda lane: lane.encode(pixels), encode=True)
        return self._features(block)

    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        self._check_points(prompts)
        block = self._block(features)
        return self._pool.run(lambda lane: lane.decode(block, prompts, outputs), holding=block)

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
        """As many images in one run as the encoder was built for."""
        found: list[Features] = []
        most = self.images_at_once
        for first in range(0, len(images), most):
            part, places = images[first : first + most], geometries[first : first + most]
            found += self._encode_part(part, places, on_stage)
        return found

    def _encode_part(
        self,
        images: Sequence[NDArray[np.uint8]],
        places: Sequence[ImageGeometry],
        on_stage: StageListener | None,
    ) -> list[DeviceFeatures]:
        self.check_process()
        if self.imaging.preprocess_allowed and all(map(self.imaging.preprocess_fits, places)):
            with timed("encode", on_stage):
                # Any lane uploads, so that this goes on while another image is being encoded.
                uploaded = [(self._upload_image(i), p) for i, p in zip(images, places, strict=True)]
                blocks = self._pool.run(lambda lane: lane.encode_images(uploaded), encode=True)
        else:
            with timed("preprocess", on_stage):
                spec = self.bundle.manifest.image
                pixels = np.concatenate([preprocess(spec, image)[0] for image in images])
            with timed("encode", on_stage):
                blocks = self._pool.run(lambda lane: lane.encode(pixels), encode=True)
        return [self._features(block) for block in blocks]

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

        Masks cross the bus as one byte per pixel, whatever type they are asked for in.
        """
        if not self.imaging.postprocess_allowed or options.return_logits or not len(prompts.labels):
            return super().decode_masks(features, prompts, outputs, geometry, options, on_stage)
        self.check_process()
        self._check_points(prompts)
        block = self._block(features)
        at_once = self.imaging.objects_at_once(geometry, self._limits.objects)

        shape = (len(prompts.labels), self._masks_each[outputs[0]], *geometry.original_size)

        def decode(lane: Lane) -> tuple[list[list[NDArray[np.float32]]], NDArray[np.uint8]]:
            masks, done, runs = lane.room_for_masks(shape), 0, []
            for part in prompts.split(at_once):
                room = masks.part(done, done + len(part.labels))
                runs.append(lane.decode(block, part, outputs, Pictures(geometry, options, room)))
                done += len(part.labels)
            return runs, masks.array

        with timed("decode", on_stage):
            runs, masks = self._pool.run(decode, holding=block)
        found = zip(*runs, strict=True)
        # Bytes of 0 and 1 are what a bool is, too.
        dtype = np.dtype(options.dtype)
        return [_joined(parts, axis=1) for parts in found], (
            masks.view(dtype) if dtype.itemsize == 1 else masks.astype(dtype)
        )

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
        return self._pool.run(lambda lane: lane.pixels(block, geometry), encode=True)

    def _upload_image(self, image: NDArray[np.uint8]) -> Block:
        return self._pool.run(lambda lane: lane.upload_image(image))

    def _check_points(self, prompts: PackedPrompts) -> None:
        points, most = prompts.labels.shape[1], self._limits.points
        if points > most:
            raise BackendError(
                f"{points} points for one object, corners and padding included; this engine "
                f"takes {most}. Build one that takes more: sam3rt build --max-points "
                f"{1 << (points - 1).bit_length()}"
            )

    def _features(self, block: Block) -> DeviceFeatures:
        return DeviceFeatures(block, self._layout, self._pool, self._dlpack_device)

    def _block(self, features: Features) -> Block:
        if not isinstance(features, DeviceFeatures) or features.pool is not self._pool:
            raise EmbeddingError(
                f"features are {type(features).__name__} of another model or backend; "
                "save the embedding and load it with this model"
            )
        return features.block


class TensorRtBackend(LaneBackend):
    """Runs one set of engines on one GPU. Engines are loaded at once.

    Args:
        bundle: the bundle the engines were built from.
        engines: the set, as chosen for this machine.
        platform: the GPU and the libraries.
        gpu: how to use the GPU.

    Attributes:
        engines: the set.

    Raises:
        BundleError: an engine file is missing or was changed.
        BackendError: an engine cannot be loaded or is not what the manifest describes, or there
            is not enough device memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: EngineSet,
        platform: Platform,
        gpu: GpuOptions | None = None,
    ) -> None:
        self.engines = engines
        self._platform = platform
        flavour, device = platform.library.flavour, platform.device
        self._kernels: KernelCache | None = None
        if flavour == "tensorrt-rtx":
            file = f"kernels-sm{device.gpu.compute_capability.replace('.', '')}.cache"
            self._kernels = KernelCache(engines.encoder.path.with_name(file))
        with platform.cuda.active():
            encoder, decoder = self._load(engines.encoder), self._load(engines.decoder)
            network = Network(bundle, encoder, decoder, self._kernels)
        super().__init__(
            bundle,
            flavour,
            engines.precision,
            network,
            platform.cuda,
            device,
            gpu or GpuOptions(),
        )

    def close(self) -> None:
        """Give back lanes and engines, and keep what was compiled for them."""
        super().close()
        if self._kernels is not None:
            self._kernels.save()

    def versions(self) -> dict[str, str]:
        """Versions of TensorRT and the driver."""
        library = self._platform.library
        return {self.name: library.version, "driver": self._platform.device.driver_version}

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
