"""CUDA, as little of it as this backend needs: memory, streams, graphs and kernels of one GPU.

It goes through NVIDIA's ``cuda-python``, which is imported when a :class:`Cuda` is made. Handles
and device addresses are plain integers, as TensorRT takes them. Ask the driver first: see
:func:`.driver.probe`.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, DeviceLostError

_GIB = 1 << 30
# cudaError_t after which nothing works any more in this process: what a kernel did wrong, or what
# broke in the GPU.
_STICKY = frozenset([214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721])

HostArray = NDArray[Any]


class OutOfDeviceMemoryError(BackendError):
    """There is not as much device memory as was asked for."""


class Kernels(NamedTuple):
    """Kernels on the GPU.

    Attributes:
        module: what holds them; see :meth:`Cuda.unload_kernels`.
        functions: by name.
    """

    module: Any
    functions: Mapping[str, Any]


class Cuda:
    """One GPU through ``cuda.bindings.runtime`` of cuda-python 12.9.1 or newer, and 13.

    Older ones keep Python's lock while they wait for the GPU, so that every thread stands still.

    Every method may be called from many threads at once, and needs the GPU to be the thread's
    current one: see :meth:`active`. Work is queued on streams and runs in their order; host memory
    that a copy reads or writes must neither change nor go away before the stream is synchronized.

    Ask the driver first, with :func:`.driver.probe`: it says what to do where there is none.

    Args:
        index: the GPU's number among the visible ones.
        blocking: let threads sleep while they wait for the GPU, instead of keeping a core busy.
            It holds for the whole process, and costs some tens of microseconds a call.

    Attributes:
        index: the GPU's number.
        lost: the error after which the GPU cannot be used in this process any more, or ``None``.
        dlpack_device: what DLPack calls memory of this device: (device type, number).

    Raises:
        BackendError: cuda-python is not installed or does not fit the driver.
    """

    def __init__(self, index: int = 0, *, blocking: bool = False) -> None:
        self.lost: str | None = None
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(
                "the GPU is used through NVIDIA's cuda-python, 12.9.1 or newer, of the driver's "
                "CUDA version or older: pip install cuda-python, and on a Jetson with JetPack 6 "
                "pip install 'cuda-python==12.9.*'"
            ) from error
        self._runtime = runtime
        self.index = index
        self.dlpack_device = (2, index)
        with self.active():
            if blocking:
                self._call(runtime.cudaSetDeviceFlags, int(runtime.cudaDeviceScheduleBlockingSync))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the GPU the calling thread's current one, and the caller's again afterwards.

        While one thread records a CUDA graph in the mode that ONNX Runtime does, CUDA refuses
        other threads most calls, unless they say that recordings elsewhere do not concern them.
        Within this block the calling thread says so.
        """
        (before,) = self._call(self._runtime.cudaGetDevice)
        self._call(self._runtime.cudaSetDevice, self.index)
        exchange = self._runtime.cudaThreadExchangeStreamCaptureMode
        try:
            own = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            (callers,) = self._call(exchange, own)
            try:
                yield
            finally:
                self._restore(exchange, callers)
        finally:
            if int(before) != self.index:
                self._restore(self._runtime.cudaSetDevice, int(before))

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes; the address.

        Raises:
            BackendError: there is not so much; the message says how much there is.
        """
        status, address = self._runtime.cudaMalloc(nbytes)
        if int(status) == int(self._runtime.cudaError_t.cudaErrorMemoryAllocation):
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

    def free_host(self, address: int) -> None:
        """Give pinned host memory back."""
        self._call(self._runtime.cudaFreeHost, address)

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
        (graph,) = self._call(self._runtime.cudaStreamEndCapture, stream)
        try:
            (executable,) = self._call(self._runtime.cudaGraphInstantiate, graph, 0)
        finally:
            self._call(self._runtime.cudaGraphDestroy, graph)
        return int(executable)

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""
        self._call(self._runtime.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""
        self._call(self._runtime.cudaGraphExecDestroy, graph)

    def load_kernels(self, source: str, names: Sequence[str], capability: str) -> Kernels:
        """Compile kernels for the GPU, and load them.

        Args:
            source: CUDA C++.
            names: of the kernels.
            capability: the GPU's compute capability, such as ``"8.9"``.

        Raises:
            BackendError: NVRTC is not there, or refuses the source.
        """
        try:
            from cuda.bindings import driver, nvrtc
        except ImportError as error:
            raise BackendError(f"cuda-python has no NVRTC: {error}") from error
        arguments: tuple[Any, ...] = (source.encode(), b"sam3rt.cu", 0, [], [])
        try:
            # The first call loads the library.
            (program,) = self._call(nvrtc.nvrtcCreateProgram, *arguments)
        except BackendError as error:
            raise BackendError(
                f"NVRTC cannot be used ({error}): pip install nvidia-cuda-nvrtc, or "
                "nvidia-cuda-nvrtc-cu12 with CUDA 12"
            ) from error
        try:
            # No contraction: a result is the same as on the CPU, which tests hold to the host's.
            options = [
                b"--gpu-architecture=sm_" + capability.replace(".", "").encode(),
                b"--fmad=false",
            ]
            self._call(nvrtc.nvrtcCompileProgram, program, len(options), options)
            (size,) = self._call(nvrtc.nvrtcGetCUBINSize, program)
            image = b" " * size
            self._call(nvrtc.nvrtcGetCUBIN, program, image)
        finally:
            self._call(nvrtc.nvrtcDestroyProgram, program)
        self._driver = driver
        (module,) = self._call(driver.cuModuleLoadData, np.frombuffer(image, np.uint8).ctypes.data)
        try:
            find = partial(self._call, driver.cuModuleGetFunction, module)
            return Kernels(module, {name: find(name.encode())[0] for name in names})
        except BaseException:
            self.unload_kernels(module)
            raise

    def unload_kernels(self, module: Any) -> None:
        """Give kernels back, once nothing is queued or recorded that would run them again."""
        self._call(self._driver.cuModuleUnload, module)

    def launch_kernel(self, kernel: Any, blocks: int, threads: int, job: int, stream: int) -> None:
        """Queue a kernel whose one argument is a device address."""
        arguments = ((job,), (ctypes.c_void_p,))
        shape = (blocks, 1, 1, threads, 1, 1)
        self._call(self._driver.cuLaunchKernel, kernel, *shape, 0, stream, arguments, 0)

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

    def _restore(self, function: Any, value: Any) -> None:
        """Put back what was the caller's. No result must be lost because that fails."""
        with contextlib.suppress(BackendError):
            self._call(function, value)

    def _check(self, status: Any, call: str) -> None:
        if int(status) == 0:
            return
        if not call.startswith("cuda"):  # of the driver's API and of NVRTC, which name their own
            raise BackendError(f"{call} failed: {getattr(status, 'name', int(status))}")
        # The error stays the thread's until it is read: nobody else must take it for theirs.
        self._runtime.cudaGetLastError()
        _, name = self._runtime.cudaGetErrorName(status)
        _, text = self._runtime.cudaGetErrorString(status)
        message = f"{call} failed: {_text(name)}, {_text(text)}"
        if int(status) in _STICKY:
            self.lost = message
            raise self.lost_error()
        if int(status) == int(self._runtime.cudaError_t.cudaErrorInsufficientDriver):
            message += (
                "; the driver is older than this cuda-python: update the driver, or install the "
                "cuda-python of the driver's CUDA version (nvidia-smi shows it)"
            )
        raise BackendError(message)

    def lost_error(self) -> DeviceLostError:
        """What to raise once :attr:`lost` is set."""
        return DeviceLostError(
            f"cuda:{self.index} cannot be used in this process any more: {self.lost}. Start the "
            "process again; where that does not help, look into the system's log for Xid errors"
        )


def out_of_memory(nbytes: int, free: int, total: int, whose: str = "") -> OutOfDeviceMemoryError:
    """What to say where device memory does not suffice.

    Args:
        nbytes: asked for.
        free: there are.
        total: of the GPU, or of what limits it.
        whose: what the total is, where that is not the GPU's memory.
    """
    return OutOfDeviceMemoryError(
        f"out of device memory: {nbytes / _GIB:.2f} GiB were asked for, {free / _GIB:.2f} of "
        f"{total / _GIB:.2f} GiB are free{f' of {whose}' if whose else ''}; keep fewer embeddings "
        "or models at a time, close what else uses the GPU, or build engines with fewer objects "
        "at once (--max-objects)"
    )


def _address(array: HostArray) -> int:
    if not array.flags.c_contiguous:
        raise BackendError("a copy between host and device needs a contiguous array")
    return int(array.ctypes.data)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
