"""What ONNX Runtime offers for a bundle on this machine, and how it is opened."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort

from ...accuracy.select import Recipe
from ...accuracy.verdicts import Subject
from ...bundle import Bundle
from ...errors import BackendError
from ..base import Backend, Offer, UnfitError
from ..options import BackendOptions
from ..tensorrt.driver import Device, probe, processor
from .backend import OnnxRuntimeBackend
from .typed import FP32, ON_REQUEST, TF32, TYPED_ORDER, Graphs, find_typed

_LOG = logging.getLogger(__name__)

# What ONNX Runtime leaves products and convolutions to, and the major versions in file names.
_MATH_LIBRARIES = {"cublas": (13, 12), "cudnn": (9,)}


def offer(bundle: Bundle, options: BackendOptions) -> Offer:
    """What ONNX Runtime can do here: FP32; on CUDA what the gate allows of the rest, too.

    That is TF32, which takes an option alone, and the recipes whose graphs
    ``sam3rt build --backend onnxruntime`` has written. BF16 is not tried unless it is named.

    Args:
        bundle: an opened bundle.
        options: the device ``"auto"`` is CUDA where it works and the CPU otherwise; precisions are
            ``"auto"``, ``"fp32"`` or, on CUDA, ``"tf32"`` or a recipe that was built.

    Raises:
        BackendError: the device or the precision is not to be had here.
    """
    gpu, precision = _choose_gpu(options.device), options.precision
    offered = [Graphs(bundle)]
    if gpu is not None:
        offered = [*find_typed(bundle), Graphs(bundle, TF32, tf32=True), *offered]
    names = [precision]
    if precision == "auto":
        names = [graphs.precision for graphs in offered if graphs.precision not in ON_REQUEST]
    recipes = {_recipe(graphs, gpu): graphs for graphs in offered if graphs.precision in names}
    if not recipes:
        unbuilt = gpu is not None and precision in TYPED_ORDER
        advice = f"; build it: sam3rt build {bundle.path} --backend onnxruntime --precision "
        raise BackendError(
            f"precision {precision!r} was asked for; the onnxruntime backend offers "
            f"{', '.join(graphs.precision for graphs in offered)} on "
            f"{'cpu' if gpu is None else 'cuda'}" + (advice + precision if unbuilt else "")
        )

    def open_recipe(recipe: Recipe) -> Backend:
        if gpu is None:
            return OnnxRuntimeBackend(
                bundle, recipes[recipe], threads=options.threads, map_weights=options.map_weights
            )
        # With all of the TensorRT backend, which a CPU needs not.
        from .lanes import OnnxRuntimeLanes

        return OnnxRuntimeLanes(bundle, recipes[recipe], gpu, options.gpu)

    return Offer(tuple(recipes), open_recipe)


def providers() -> list[str]:
    """The execution providers that this ONNX Runtime was built with, for bug reports."""
    return list(ort.get_available_providers())


def _recipe(graphs: Graphs, gpu: Device | None) -> Recipe:
    if graphs.precision == FP32:
        return Recipe(FP32, FP32)
    assert gpu is not None
    version = ", ".join([str(ort.__version__), *math_libraries()])
    kind = processor(gpu.gpu, gpu.driver_version)
    subject = Subject("onnxruntime", version, kind, graphs.precision, graphs.digest)
    return Recipe(graphs.precision, graphs.precision, subject)


def math_libraries(load: Callable[..., Any] = ctypes.CDLL) -> list[str]:
    """The cuBLAS and cuDNN in this process, which choose ONNX Runtime's kernels and may be updated.

    Args:
        load: loads a shared library by name.

    Returns:
        Name and version of each; what is not loaded, or does not say, is left out.
    """
    found = []
    mode = ctypes.DEFAULT_MODE | getattr(os, "RTLD_NOLOAD", 0)
    for name, majors in _MATH_LIBRARIES.items():
        for major in majors:
            file = f"{name}64_{major}.dll" if sys.platform == "win32" else f"lib{name}.so.{major}"
            numbers = [ctypes.c_int() for _ in range(3)]
            try:
                ask = getattr(load(file, mode=mode), f"{name}GetProperty")
            except (OSError, AttributeError):
                continue
            if not any(ask(index, ctypes.byref(value)) for index, value in enumerate(numbers)):
                found.append(f"{name} " + ".".join(str(value.value) for value in numbers))
    return found


def _choose_gpu(device: str) -> Device | None:
    """The GPU to use, ``None`` for the CPU; ``BackendOptions`` has checked how it is written.

    Raises:
        BackendError: a GPU was asked for and cannot be used.
    """
    if device == "cpu":
        return None
    try:
        if "CUDAExecutionProvider" not in ort.get_available_providers() or not _cuda_answers():
            raise BackendError(
                f"device {device!r} was asked for, but CUDA is not usable here: it needs an NVIDIA "
                "driver and pip install 'sam3rt[gpu]' (without the plain onnxruntime beside it)"
            )
        if not _has_cuda_python():
            raise UnfitError(
                "on CUDA, the onnxruntime backend needs cuda-python, too: pip install cuda-python"
            )
        return probe(int(device.partition(":")[2] or 0))
    except BackendError as error:
        if device != "auto":
            raise
        level = logging.WARNING if isinstance(error, UnfitError) else logging.INFO
        _LOG.log(level, "the CPU is used: %s", error)
        return None


def _cuda_answers() -> bool:
    """Whether a value can be placed on the first CUDA device.

    onnxruntime-gpu lists its CUDA provider even where there is no driver.
    """
    try:
        # It loads the CUDA libraries that lie among the Python packages, and prints what it misses.
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
        _LOG.debug("%s", said.getvalue())
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception as error:  # whatever the provider's libraries raise means "no"
        _LOG.info("CUDA is not usable: %s", error)
        return False
    return True


def _has_cuda_python() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ImportError:  # there is no "cuda" at all
        return False
