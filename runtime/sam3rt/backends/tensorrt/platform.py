"""The GPU and the libraries that a backend stands on."""

from __future__ import annotations

from dataclasses import dataclass

from .cuda import Cuda, CudaRuntime, Device
from .engines.selection import Machine
from .engines.sidecar import BackendName
from .trt import Library


@dataclass(frozen=True)
class Platform:
    """One GPU, ready to use.

    Attributes:
        device: what the driver says of it.
        cuda: its memory, streams and graphs.
        library: the TensorRT flavour.
    """

    device: Device
    cuda: Cuda
    library: Library

    @property
    def machine(self) -> Machine:
        """What engines have to fit."""
        return Machine(
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
    return Platform(device, CudaRuntime(device.index), Library(flavour))
