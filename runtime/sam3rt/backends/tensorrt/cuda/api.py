"""The part of CUDA's runtime API that this project uses, over NVIDIA's ``cuda-python``.

Everything above takes the :class:`Cuda` protocol. Handles and device addresses are plain
integers, as TensorRT takes them. Work is queued on streams and runs in their order; host memory
that a copy reads or writes must neither change nor go away before the stream is synchronized.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ....errors import BackendError

HostArray = NDArray[Any]

_GIB = 1 << 30


class Cuda(Protocol):
    """One GPU. Every method may be called from many threads at once."""

    @property
    def index(self) -> int:
        """The GPU's number among the visible ones."""

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """What DLPack calls memory of this device: (device type, number)."""

    def activate(self) -> None:
        """Make the GPU the calling thread's current one. Every other method needs that."""

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, bytes."""

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes; the address.

        Raises:
            BackendError: there is not so much; the message says how much there is.
        """

    def free(self, address: int) -> None:
        """Give device memory back. Nothing queued may still use it."""

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that copies need not stage, uint8 [nbytes]."""

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give such host memory back."""

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""

    def synchronize(self, stream: int) -> None:
        """Wait until everything queued on a stream is done."""

    def create_event(self) -> int:
        """An event that can be timed."""

    def destroy_event(self, event: int) -> None:
        """Give an event back."""

    def record(self, event: int, stream: int) -> None:
        """Let an event happen when everything queued so far is done."""

    def milliseconds(self, start: int, end: int) -> float:
        """Time between two events that have happened."""

    def upload(self, target: int, source: HostArray, stream: int) -> None:
        """Queue a copy of a contiguous host array to a device address."""

    def download(self, target: HostArray, source: int, stream: int) -> None:
        """Queue a copy from a device address that fills a contiguous host array."""

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy within the device."""

    def begin_capture(self, stream: int) -> None:
        """Record what this thread queues on a stream instead of running it."""

    def end_capture(self, stream: int) -> int:
        """Stop recording; the recorded work as a graph that can be launched.

        Raises:
            BackendError: something was queued that cannot be recorded. The stream is usable again.
        """

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""


class CudaRuntime:
    """The real thing: ``cuda.bindings.runtime`` of cuda-python 12.6.2 or newer, and 13.

    Call :func:`probe` first: it says what to do about a missing driver.

    Args:
        index: the GPU's number among the visible ones.

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
        self._index = index
        self.activate()

    @property
    def index(self) -> int:
        """The GPU's number among the visible ones."""
        return self._index

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """(2, number): kDLCUDA."""
        return 2, self._index

    def activate(self) -> None:
        """Make the GPU the calling thread's current one."""
        self._call(self._runtime.cudaSetDevice, self._index)

    def memory(self) -> tuple[int, int]:
        """Free and total device memory, bytes."""
        free, total = self._call(self._runtime.cudaMemGetInfo)
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes; the address."""
        status, address = self._runtime.cudaMalloc(nbytes)
        if int(status) == int(self._runtime.cudaError_t.cudaErrorMemoryAllocation):
            # The error sticks to the thread until it is read.
            self._runtime.cudaGetLastError()
            raise out_of_memory(nbytes, *self.memory())
        self._check(status, "cudaMalloc")
        return int(address)

    def free(self, address: int) -> None:
        """Give device memory back."""
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

    def create_event(self) -> int:
        """An event that can be timed."""
        (event,) = self._call(self._runtime.cudaEventCreateWithFlags, 0)
        return int(event)

    def destroy_event(self, event: int) -> None:
        """Give an event back."""
        self._call(self._runtime.cudaEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        """Let an event happen when everything queued so far is done."""
        self._call(self._runtime.cudaEventRecord, event, stream)

    def milliseconds(self, start: int, end: int) -> float:
        """Time between two events that have happened."""
        (elapsed,) = self._call(self._runtime.cudaEventElapsedTime, start, end)
        return float(elapsed)

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
        """Stop recording; the recorded work as a graph that can be launched."""
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
