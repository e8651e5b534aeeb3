"""Is there a GPU? The driver is asked through its C API, which reports and does not crash.

TensorRT ends the process where it deserializes an engine without a driver, so this comes first.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from ...errors import BackendError

# The oldest CUDA that TensorRT 10 runs on.
_OLDEST_CUDA = 12000
# CUdevice_attribute of cuda.h.
_MAJOR, _MINOR = 75, 76
# CUresult of cuda.h.
_NO_DEVICE = 100
_ADVICE = {
    3: "the process is shutting down, or was forked after CUDA was used: use spawn",
    35: "the driver is older than this CUDA: update the NVIDIA driver",
    _NO_DEVICE: "no GPU is visible: check nvidia-smi, CUDA_VISIBLE_DEVICES and, in a container, "
    "--gpus or --runtime nvidia",
    802: "the system is not ready: on machines with NVSwitch, start nvidia-fabricmanager",
    803: "the driver's kernel module and library differ: reboot after the update",
    804: "the driver is too old for this GPU in a container: update the host's driver",
}
Loader = Callable[[str], Any]


class Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of GPU.

    Attributes:
        name: as the driver gives it, such as ``"NVIDIA GeForce RTX 4090"``.
        compute_capability: such as ``"8.9"``.
    """

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Device:
    """A GPU and its driver.

    Attributes:
        index: its number among the visible GPUs.
        gpu: name and compute capability.
        total_memory: bytes.
        driver_version: such as ``"550.54.15"``, or the CUDA version, as ``"CUDA 12.6"``, where
            the driver does not say.
        cuda_version: the newest CUDA version the driver knows, (major, minor).
    """

    index: int
    gpu: Gpu
    total_memory: int
    driver_version: str
    cuda_version: tuple[int, int]


def processor(gpu: Gpu, driver_version: str) -> str:
    """What a verdict is about: the same GPU with another driver is another processor."""
    return f"{gpu.name}, {gpu.compute_capability}, driver {driver_version}"


def probe(index: int = 0, load: Loader = ctypes.CDLL) -> Device:
    """Ask the driver about one GPU.

    Args:
        index: the GPU's number among the visible ones.
        load: loads a shared library by name.

    Raises:
        BackendError: there is no driver, it is too old or does not work, or it drives no such
            GPU; the message says what to do.
    """
    devices = probe_all(load)
    if index >= len(devices):
        raise BackendError(
            f"device cuda:{index} was asked for, but {len(devices)} GPUs are visible "
            f"(cuda:0 to cuda:{len(devices) - 1})"
        )
    return devices[index]


def probe_all(load: Loader = ctypes.CDLL) -> tuple[Device, ...]:
    """Every visible GPU; at least one.

    Raises:
        BackendError: see :func:`probe`.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = load(name)
    except OSError as error:
        raise BackendError(
            f"there is no NVIDIA driver here ({name} cannot be loaded: {error}); install one, or "
            "in a container pass --gpus all, or --runtime nvidia on a Jetson"
        ) from error
    _check_driver(library.cuInit(0), "cuInit")
    version = _integer(library.cuDriverGetVersion)
    cuda_version = (version // 1000, version % 1000 // 10)
    if version < _OLDEST_CUDA:
        raise BackendError(
            f"the NVIDIA driver knows CUDA up to {cuda_version[0]}.{cuda_version[1]}, TensorRT "
            f"needs {_OLDEST_CUDA // 1000}.0 or newer: update the driver"
        )
    count = _integer(library.cuDeviceGetCount)
    if count < 1:
        raise BackendError(_ADVICE[_NO_DEVICE])
    driver_version = _driver_version(load) or f"CUDA {cuda_version[0]}.{cuda_version[1]}"
    return tuple(_describe(library, index, driver_version, cuda_version) for index in range(count))


def _describe(
    library: Any, index: int, driver_version: str, cuda_version: tuple[int, int]
) -> Device:
    handle = ctypes.c_int()
    _check_driver(library.cuDeviceGet(ctypes.byref(handle), index), "cuDeviceGet")
    name = ctypes.create_string_buffer(256)
    _check_driver(library.cuDeviceGetName(name, len(name), handle), "cuDeviceGetName")
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _check_driver(
            library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle),
            "cuDeviceGetAttribute",
        )
        capability.append(str(value.value))
    memory = ctypes.c_size_t()
    _check_driver(library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle), "cuDeviceTotalMem")
    gpu = Gpu(name.value.decode("utf-8", "replace"), ".".join(capability))
    return Device(index, gpu, memory.value, driver_version, cuda_version)


def _driver_version(load: Loader) -> str | None:
    """What NVML calls the driver's version. A Jetson may have no NVML."""
    try:
        library = load("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2() != 0:
        return None
    try:
        text = ctypes.create_string_buffer(96)
        if library.nvmlSystemGetDriverVersion(text, len(text)) != 0:
            return None
        return text.value.decode("ascii", "replace")
    finally:
        library.nvmlShutdown()


def _integer(function: Any) -> int:
    value = ctypes.c_int()
    _check_driver(function(ctypes.byref(value)), function.__name__)
    return value.value


def _check_driver(status: int, call: str) -> None:
    if status != 0:
        advice = _ADVICE.get(status, "check the driver with nvidia-smi")
        raise BackendError(f"the NVIDIA driver failed in {call} with error {status}: {advice}")
