"""What TensorRT offers for a bundle on this machine, and the backend that runs a set of engines.

An engine is a program. Hashes catch damage and mix-ups, not malice: load only engines from a folder
that nobody else can write to.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ...accuracy.select import Recipe
from ...bundle import Bundle
from ...errors import BackendError, BundleError, InvalidInputError
from ..base import Offer
from ..options import BackendOptions, GpuOptions
from .backend import LaneBackend, allow_imaging
from .cuda import Cuda
from .driver import Device, probe
from .engines import EngineFile, EngineSet, EngineTarget, candidates, find_engines, recipe_of
from .network import Network
from .sidecar import BackendName
from .trt import Engine, KernelCache, Library

# Of an engine file, bytes at a time while it is hashed.
_CHUNK = 1 << 20


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
            backend = TensorRtBackend(bundle, sets[recipe], platform, options.gpu)
            allow_imaging(backend)
        except BundleError as error:
            raise BackendError(f"an engine cannot be used: {error}") from error
        return backend

    advice = f"Build others: sam3rt build {bundle.path} --backend {flavour}"
    return Offer(tuple(sets), open_recipe, advice)


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
