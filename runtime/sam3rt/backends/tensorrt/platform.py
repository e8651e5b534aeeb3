"""The GPU and the libraries that a backend stands on."""

from __future__ import annotations

from dataclasses import dataclass

from ...cuda import Cuda, CudaRuntime, Device, probe
from ...engines.selection import Machine
from ...engines.sidecar import BackendName
from .engine import Library


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


def open_platform(flavour: BackendName, index: int = 0) -> Platform:
    """Ask the driver, then load the libraries.

    The order matters: TensorRT ends the process where it finds no driver.

    Args:
        flavour: which TensorRT.
        index: the GPU's number among the visible ones.

    Raises:
        BackendError: the driver, the GPU, cuda-python or TensorRT is missing or too old; the
            message says what to do.
    """
    device = probe(index)
    return Platform(device, CudaRuntime(index), Library(flavour))
