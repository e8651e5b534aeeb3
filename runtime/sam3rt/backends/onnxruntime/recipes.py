"""What ONNX Runtime offers for a bundle on this machine, and how it is opened."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os

import numpy as np
import onnxruntime as ort

from ...accuracy.select import Recipe
from ...accuracy.verdicts import Subject
from ...bundle import Bundle
from ...errors import BackendError
from ..base import Backend, Offer
from ..options import BackendOptions
from ..tensorrt.driver import Device, probe
from .backend import OnnxRuntimeBackend
from .typed import FP32, ON_REQUEST, TF32, TYPED_ORDER, Graphs, find_typed

_LOG = logging.getLogger(__name__)

# It can make ONNX Runtime add up FP16 products in FP16.
_GEMM_OPTIONS = "ORT_CUDA_GEMM_OPTIONS"


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
    kind, number = _choose_device(options.device)
    precision = options.precision
    card = _card(number) if kind == "cuda" else None
    found = {FP32: Graphs(bundle)}
    if card is not None:
        tf32 = Graphs(bundle, TF32, tf32=True)
        found = {graphs.precision: graphs for graphs in (*find_typed(bundle), tf32)} | found
    recipes = {_recipe(graphs, card): graphs for graphs in found.values()}
    names = [precision]
    if precision == "auto":
        names = [name for name in found if name not in ON_REQUEST]
    wanted = tuple(recipe for recipe in recipes if recipe.name in names)
    if not wanted:
        unbuilt = card is not None and precision in TYPED_ORDER
        advice = f"; build it: sam3rt build {bundle.path} --backend onnxruntime --precision "
        raise BackendError(
            f"precision {precision!r} was asked for; the onnxruntime backend offers "
            f"{', '.join(found)} on {kind}" + (advice + precision if unbuilt else "")
        )

    def open_recipe(recipe: Recipe) -> Backend:
        graphs = recipes[recipe]
        if card is not None and _has_cuda_python():
            from .lanes import open_lanes  # with all of the TensorRT backend, which a CPU needs not

            return open_lanes(bundle, graphs, card, options.gpu)
        where = "cpu" if kind == "cpu" else f"cuda:{number}"
        return OnnxRuntimeBackend(
            bundle, where, graphs, threads=options.threads, map_weights=options.map_weights
        )

    return Offer(wanted, open_recipe)


def providers() -> list[str]:
    """The execution providers that this ONNX Runtime was built with, for bug reports."""
    return list(ort.get_available_providers())


def _recipe(graphs: Graphs, card: Device | None) -> Recipe:
    if graphs.precision == FP32:
        return Recipe(FP32, FP32)
    assert card is not None
    version = str(ort.__version__)
    if set_to := os.environ.get(_GEMM_OPTIONS):
        version += f", {_GEMM_OPTIONS}={set_to}"
    kind = f"{card.gpu.name}, {card.gpu.compute_capability}, driver {card.driver_version}"
    subject = Subject("onnxruntime", version, kind, graphs.precision, graphs.digest)
    return Recipe(graphs.precision, graphs.precision, subject)


def _choose_device(device: str) -> tuple[str, int]:
    """Kind and number of the device to use; ``BackendOptions`` has checked how it is written."""
    if device == "cpu":
        return "cpu", 0
    usable = "CUDAExecutionProvider" in ort.get_available_providers() and _cuda_answers()
    if device == "auto":
        return ("cuda", 0) if usable else ("cpu", 0)
    if not usable:
        raise BackendError(
            f"device {device!r} was asked for, but CUDA is not usable here: it needs an NVIDIA "
            "driver and pip install 'sam3rt[gpu]' (without the plain onnxruntime beside it)"
        )
    return "cuda", int(device.partition(":")[2] or 0)


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


def _card(number: int) -> Device | None:
    """What the driver says of a GPU; ``None`` if it is silent.

    A verdict on an unknown GPU could not be remembered, so none is asked for.
    """
    try:
        return probe(number)
    except BackendError as error:
        _LOG.info("nothing but fp32 is offered: %s", error)
        return None


def _has_cuda_python() -> bool:
    try:
        found = importlib.util.find_spec("cuda.bindings") is not None
    except ImportError:  # there is no "cuda" at all
        found = False
    if not found:
        _LOG.warning(
            "images and masks are resized on the host: ONNX Runtime's lanes need cuda-python: "
            "pip install cuda-python"
        )
    return found
