"""The driver's probe, and the layer over cuda-python, as far as both go without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam3rt.backends.tensorrt.cuda import Cuda
from sam3rt.backends.tensorrt.driver import Gpu, probe, probe_all
from sam3rt.errors import BackendError, DeviceLostError

# A driver with two GPUs, in C: the probe's calls go through the real calling convention.
SOURCE = """
#include <string.h>
#include <stdlib.h>
static int number(const char *name, int fallback) {
    const char *text = getenv(name);
    return text ? atoi(text) : fallback;
}
int cuInit(unsigned flags) { return flags ? 1 : number("FAKE_INIT", 0); }
int cuDriverGetVersion(int *v) { *v = number("FAKE_CUDA", 12060); return 0; }
int cuDeviceGetCount(int *n) { *n = number("FAKE_COUNT", 2); return 0; }
int cuDeviceGet(int *d, int i) { *d = 40 + i; return 0; }
int cuDeviceGetName(char *name, int length, int d) {
    strncpy(name, d == 40 ? "NVIDIA Fake A" : "NVIDIA Fake B", length);
    return 0;
}
int cuDeviceGetAttribute(int *v, int attribute, int d) {
    *v = attribute == 75 ? (d == 40 ? 8 : 12) : attribute == 76 ? (d == 40 ? 9 : 0) : -1;
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int d) { *bytes = (size_t)d << 30; return 0; }
int nvmlInit_v2(void) { return number("FAKE_NVML", 0); }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    strncpy(text, "580.65.06", length);
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(SOURCE)
    library = folder / "libfake.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "driver.c")], check=True
    )
    loaded = ctypes.CDLL(str(library))
    return lambda name: loaded


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a driver here")
def test_this_machine_has_no_driver() -> None:
    with pytest.raises(BackendError, match=r"no NVIDIA driver here.*--gpus all"):
        probe()


def test_every_gpu_is_described(driver: Callable[[str], Any]) -> None:
    first, second = probe_all(driver)
    assert first.gpu == Gpu("NVIDIA Fake A", "8.9")
    assert second.gpu == Gpu("NVIDIA Fake B", "12.0")
    assert (first.index, second.index) == (0, 1)
    assert first.total_memory == 40 << 30
    assert first.driver_version == "580.65.06"
    assert first.cuda_version == (12, 6)
    assert probe(1, driver) == second


def test_a_gpu_that_is_not_there(driver: Callable[[str], Any]) -> None:
    with pytest.raises(BackendError, match=r"cuda:2 was asked for, but 2 GPUs .*cuda:0 to cuda:1"):
        probe(2, driver)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FAKE_INIT", "100", "no GPU is visible"),
        ("FAKE_INIT", "35", "update the NVIDIA driver"),
        ("FAKE_INIT", "803", "reboot"),
        ("FAKE_INIT", "999", "error 999: check the driver with nvidia-smi"),
        ("FAKE_COUNT", "0", "CUDA_VISIBLE_DEVICES"),
        ("FAKE_CUDA", "11080", r"CUDA up to 11\.8, TensorRT needs 12\.0 or newer: update"),
    ],
)
def test_what_is_wrong_with_a_driver(
    variable: str,
    value: str,
    message: str,
    driver: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match=message):
        probe(0, driver)


def test_without_nvml_the_cuda_version_stands_for_the_drivers(
    driver: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_cuda(name: str) -> Any:
        if "nvidia-ml" in name or "nvml" in name:
            raise OSError(name)
        return driver(name)

    assert probe(0, only_cuda).driver_version == "CUDA 12.6"
    monkeypatch.setenv("FAKE_NVML", "9")
    assert probe(0, driver).driver_version == "CUDA 12.6"


class Status(int):
    """What cuda-python returns first."""


def cuda_python(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> types.ModuleType:
    """A module in the place of ``cuda.bindings.runtime``, with some of its functions."""
    runtime = types.ModuleType("cuda.bindings.runtime")
    runtime.cudaError_t = types.SimpleNamespace(
        cudaErrorMemoryAllocation=Status(2), cudaErrorInsufficientDriver=Status(35)
    )
    runtime.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    defaults = {
        "cudaGetDevice": lambda: (Status(0), 0),
        "cudaSetDevice": lambda index: (Status(0),),
        "cudaThreadExchangeStreamCaptureMode": lambda mode: (Status(0), 0),
        "cudaGetLastError": lambda: (Status(0),),
        "cudaGetErrorName": lambda status: (Status(0), b"cudaErrorName"),
        "cudaGetErrorString": lambda status: (Status(0), b"the reason"),
        "cudaMemGetInfo": lambda: (Status(0), 1 << 30, 8 << 30),
    }
    for name, function in (defaults | functions).items():
        function.__name__ = name
        setattr(runtime, name, function)
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = runtime
    package = types.ModuleType("cuda")
    package.bindings = bindings
    for module in (package, bindings, runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return runtime


def test_out_of_memory_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_python(monkeypatch, cudaMalloc=lambda nbytes: (Status(2), None))
    cuda = Cuda(0)
    with pytest.raises(
        BackendError,
        match=r"3\.00 GiB were asked for, 1\.00 of 8\.00 GiB are free",
    ):
        cuda.allocate(3 << 30)


def test_an_error_names_the_call_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_python(monkeypatch, cudaStreamSynchronize=lambda stream: (Status(1),))
    with pytest.raises(
        BackendError, match=r"cudaStreamSynchronize failed: cudaErrorName, the reason"
    ):
        Cuda(0).synchronize(1)


def test_a_sticky_error_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_python(monkeypatch, cudaStreamSynchronize=lambda stream: (Status(700),))
    cuda = Cuda(3)
    assert cuda.lost is None
    with pytest.raises(DeviceLostError, match=r"cuda:3 .* the reason\. Start the process again"):
        cuda.synchronize(1)
    assert cuda.lost == "cudaStreamSynchronize failed: cudaErrorName, the reason"


def test_threads_may_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = []
    runtime = cuda_python(
        monkeypatch, cudaSetDeviceFlags=lambda value: (flags.append(value), (Status(0),))[1]
    )
    runtime.cudaDeviceScheduleBlockingSync = 4
    Cuda(0)
    assert flags == []
    Cuda(0, blocking=True)
    assert flags == [4]


def compiler(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> list[Any]:
    """Modules in the place of cuda-python's NVRTC and driver, and what they were called with."""
    calls: list[Any] = []

    def answer(name: str, *results: Any) -> Any:
        def function(*arguments: Any) -> tuple[Any, ...]:
            calls.append((name, *arguments))
            return (Status(0), *results)

        function.__name__ = name
        return function

    cuda_python(monkeypatch)
    package = sys.modules["cuda.bindings"]
    parts: dict[str, dict[str, tuple[Any, ...]]] = {
        "nvrtc": {
            "nvrtcCreateProgram": ("program",),
            "nvrtcCompileProgram": (),
            "nvrtcGetCUBINSize": (5,),
            "nvrtcGetCUBIN": (),
            "nvrtcDestroyProgram": (),
        },
        "driver": {
            "cuModuleLoadData": ("module",),
            "cuModuleGetFunction": ("kernel",),
            "cuModuleUnload": (),
            "cuLaunchKernel": (),
        },
    }
    for part, known in parts.items():
        module = types.ModuleType(f"cuda.bindings.{part}")
        for name, results in known.items():
            setattr(module, name, functions.get(name) or answer(name, *results))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(package, part, module)
    return calls


def test_kernels_are_compiled_for_the_gpu_and_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiler(monkeypatch)
    cuda = Cuda(0)
    kernels = cuda.load_kernels("source", ["one", "two"], "12.0")
    assert kernels == ("module", {"one": "kernel", "two": "kernel"})
    assert ("nvrtcDestroyProgram", "program") in calls
    options = [b"--gpu-architecture=sm_120", b"--fmad=false"]
    assert ("nvrtcCompileProgram", "program", 2, options) in calls
    cuda.launch_kernel("kernel", 7, 128, 0xABC, 5)
    arguments = ((0xABC,), (ctypes.c_void_p,))
    assert calls[-1] == ("cuLaunchKernel", "kernel", 7, 1, 1, 128, 1, 1, 0, 5, arguments, 0)
    cuda.unload_kernels(kernels.module)
    assert calls[-1] == ("cuModuleUnload", "module")


def test_a_source_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> tuple[Status]:
        return (Status(6),)

    refuse.__name__ = "nvrtcCompileProgram"
    compiler(monkeypatch, nvrtcCompileProgram=refuse)
    with pytest.raises(BackendError, match="nvrtcCompileProgram failed: 6"):
        Cuda(0).load_kernels("source", ["one"], "8.9")


def test_a_library_that_is_not_there_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise RuntimeError('Failure finding "libnvrtc.so.13"')

    missing.__name__ = "nvrtcCreateProgram"
    compiler(monkeypatch, nvrtcCreateProgram=missing)
    with pytest.raises(BackendError, match=r"libnvrtc\.so\.13.*pip install nvidia-cuda-nvrtc"):
        Cuda(0).load_kernels("source", ["one"], "8.9")


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(monkeypatch)
    monkeypatch.delitem(sys.modules, "cuda.bindings.nvrtc")
    monkeypatch.delattr(sys.modules["cuda.bindings"], "nvrtc")
    with pytest.raises(BackendError, match="cuda-python has no NVRTC"):
        Cuda(0).load_kernels("source", ["one"], "8.9")


def test_a_driver_older_than_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_python(monkeypatch, cudaSetDevice=lambda index: (Status(35),))
    with pytest.raises(BackendError, match="install the cuda-python of the driver's CUDA version"):
        Cuda(0)


def test_cuda_python_12_raises_where_it_cannot_load_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(index: int) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    cuda_python(monkeypatch, cudaSetDevice=missing)
    with pytest.raises(BackendError, match=r"CUDA is not usable: Failed to dlopen"):
        Cuda(0)


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match="pip install cuda-python") as caught:
        Cuda(0)
    # Of the CUDA that JetPack 6 has.
    assert "pip install 'cuda-python==12.9.*'" in str(caught.value)


def test_pinned_memory_is_the_drivers_and_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    backing = (ctypes.c_uint8 * 16)(*range(16))
    freed = []
    cuda_python(
        monkeypatch,
        cudaMallocHost=lambda nbytes: (Status(0), ctypes.addressof(backing)),
        cudaFreeHost=lambda address: (freed.append(address), (Status(0),))[1],
    )
    cuda = Cuda(0)
    array = cuda.allocate_host(16)
    np.testing.assert_array_equal(array, range(16))
    array[3] = 77
    assert backing[3] == 77
    cuda.free_host(array.ctypes.data)
    assert freed == [ctypes.addressof(backing)]


def test_copies_need_contiguous_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_python(monkeypatch)
    with pytest.raises(BackendError, match="contiguous"):
        Cuda(0).upload(0, np.zeros((4, 4), np.float32)[:, ::2], 1)


def test_a_graph_that_cannot_be_made_leaves_no_error_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = []
    cuda_python(
        monkeypatch,
        cudaStreamEndCapture=lambda stream: (Status(901), None),
        cudaGetLastError=lambda: (read.append(1), (Status(901),))[1],
    )
    with pytest.raises(BackendError, match="cudaStreamEndCapture failed"):
        Cuda(0).end_capture(1)
    assert read


@pytest.mark.parametrize(("caller", "calls"), [(0, [1, 0]), (1, [1])])
def test_the_callers_gpu_is_made_current_again(
    caller: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [caller]

    def set_device(index: int) -> tuple[Status]:
        current.append(index)
        return (Status(0),)

    cuda_python(
        monkeypatch,
        cudaGetDevice=lambda: (Status(0), current[-1]),
        cudaSetDevice=set_device,
    )
    cuda = Cuda(1)
    assert current[1:] == calls
    del current[1:]
    with cuda.active():
        assert current[-1] == 1
    assert current[1:] == calls


def test_another_threads_recording_does_not_concern_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ONNX Runtime records in CUDA's global mode, in which others may not even allocate."""
    modes = [0]

    def exchange(mode: int) -> tuple[Status, int]:
        modes.append(mode)
        return Status(0), modes[-2]

    cuda_python(monkeypatch, cudaThreadExchangeStreamCaptureMode=exchange)
    cuda = Cuda(0)
    del modes[1:]
    with contextlib.suppress(ValueError), cuda.active():
        assert modes == [0, 1]
        raise ValueError
    assert modes == [0, 1, 0]


def test_a_result_survives_a_caller_whose_gpu_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda_python(
        monkeypatch,
        cudaSetDevice=lambda index: (Status(0 if index == 1 else 46),),
    )
    with Cuda(1).active():
        pass
