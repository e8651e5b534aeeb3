"""CUDA, as little of it as this backend needs: is there a GPU, and its memory, streams and graphs.

The driver is asked first, through its C API, which reports and does not crash: deserializing a
TensorRT engine without a driver ends the process. The rest goes through NVIDIA's ``cuda-python``,
which is imported when a :class:`Cuda` is made. Handles and device addresses are plain integers, as
TensorRT takes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

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
_GIB = 1 << 30

HostArray = NDArray[Any]
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


class Cuda:
    """One GPU through ``cuda.bindings.runtime`` of cuda-python 12.6.2 or newer, and 13.

    Every method may be called from many threads at once, and needs the GPU to be the thread's
    current one: see :meth:`active`. Work is queued on streams and runs in their order; host memory
    that a copy reads or writes must neither change nor go away before the stream is synchronized.

    Ask the driver first, with :func:`probe`: it says what to do where there is none.

    Args:
        index: the GPU's number among the visible ones.

    Attributes:
        index: the same.
        dlpack_device: what DLPack calls memory of this device: (device type, number).

    Raises:
        BackendError: cuda-python is not installed or does not fit the driver.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(
                "the TensorRT backend needs NVIDIA's cuda-python, 12.6.2 or newer, of the driver's "
                "CUDA version or older: pip install cuda-python"
            ) from error
        self._runtime = runtime
        self.index = index
        self.dlpack_device = (2, index)
        with self.active():
            pass

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the GPU the calling thread's current one, and the caller's again afterwards."""
        (before,) = self._call(self._runtime.cudaGetDevice)
        self._call(self._runtime.cudaSetDevice, self.index)
        try:
            yield
        finally:
            if int(before) != self.index:
                # A result must not be lost because the caller's own GPU cannot be used.
                with contextlib.suppress(BackendError):
                    self._call(self._runtime.cudaSetDevice, int(before))

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes; the address.

        Raises:
            BackendError: there is not so much; the message says how much there is.
        """
        status, address = self._runtime.cudaMalloc(nbytes)
        if int(status) == int(self._runtime.cudaError_t.cudaErrorMemoryAllocation):
            # The error sticks to the thread until it is read.
            self._runtime.cudaGetLastError()
            free, total = self._call(self._runtime.cudaMemGetInfo)
            raise out_of_memory(nbytes, int(free), int(total))
        self._check(status, "cudaMalloc")
        return int(address)

    def free(self, address: int) -> None:
        """Give device memory back. Waits until the device is idle."""
        self._call(self._runtime.cudaFree, address)

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned host memory, uint8 [nbytes]."""
        (address,) = self._call(self._runtime.cudaMallocHost, nbytes)
        buffer = (ctypes.c_uint8 * nbytes).from_address(int(address))
        return np.ctypeslib.as_array(buffer)

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give pinned host memory back."""
        self._call(self._runtime.cudaFreeHost, array.ctypes.data)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        (stream,) = self._call(
            self._runtime.cudaStreamCreateWithFlags, int(self._runtime.cudaStreamNonBlocking)
        )
        return int(stream)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call(self._runtime.cudaStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until everything queued on a stream is done."""
        self._call(self._runtime.cudaStreamSynchronize, stream)

    def upload(self, target: int, source: HostArray, stream: int) -> None:
        """Queue a copy of a contiguous host array to a device address."""
        self._copy(target, _address(source), source.nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, target: HostArray, source: int, stream: int) -> None:
        """Queue a copy from a device address that fills a contiguous host array."""
        self._copy(_address(target), source, target.nbytes, "cudaMemcpyDeviceToHost", stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy within the device."""
        self._copy(target, source, nbytes, "cudaMemcpyDeviceToDevice", stream)

    def begin_capture(self, stream: int) -> None:
        """Record what this thread queues on a stream instead of running it.

        Thread-local, so that other threads may allocate meanwhile.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._runtime.cudaStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        """Stop recording; the recorded work as a graph that can be launched.

        Raises:
            BackendError: something was queued that cannot be recorded. The stream is usable again.
        """
        try:
            (graph,) = self._call(self._runtime.cudaStreamEndCapture, stream)
            try:
                (executable,) = self._call(self._runtime.cudaGraphInstantiate, graph, 0)
            finally:
                self._call(self._runtime.cudaGraphDestroy, graph)
        except BackendError:
            self._runtime.cudaGetLastError()
            raise
        return int(executable)

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""
        self._call(self._runtime.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""
        self._call(self._runtime.cudaGraphExecDestroy, graph)

    def _copy(self, target: int, source: int, nbytes: int, kind: str, stream: int) -> None:
        direction = getattr(self._runtime.cudaMemcpyKind, kind)
        self._call(self._runtime.cudaMemcpyAsync, target, source, nbytes, direction, stream)

    def _call(self, function: Any, *arguments: Any) -> tuple[Any, ...]:
        """Call a function of the runtime API, which returns its status and then its results."""
        try:
            status, *results = function(*arguments)
        except RuntimeError as error:  # cuda-python 12 where the driver cannot be loaded
            raise BackendError(f"CUDA is not usable: {error}") from error
        self._check(status, function.__name__)
        return tuple(results)

    def _check(self, status: Any, call: str) -> None:
        if int(status) == 0:
            return
        _, name = self._runtime.cudaGetErrorName(status)
        _, text = self._runtime.cudaGetErrorString(status)
        advice = ""
        if int(status) == int(self._runtime.cudaError_t.cudaErrorInsufficientDriver):
            advice = (
                "; the driver is older than this cuda-python: update the driver, or install the "
                "cuda-python of the driver's CUDA version (nvidia-smi shows it)"
            )
        raise BackendError(f"{call} failed: {_text(name)}, {_text(text)}{advice}")


def out_of_memory(nbytes: int, free: int, total: int) -> BackendError:
    """What to say where device memory does not suffice."""
    return BackendError(
        f"out of device memory: {nbytes / _GIB:.2f} GiB were asked for, {free / _GIB:.2f} of "
        f"{total / _GIB:.2f} GiB are free; keep fewer embeddings or models at a time, close what "
        "else uses the GPU, or build engines with fewer objects at once (--max-objects)"
    )


def _address(array: HostArray) -> int:
    if not array.flags.c_contiguous:
        raise BackendError("a copy between host and device needs a contiguous array")
    return int(array.ctypes.data)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
