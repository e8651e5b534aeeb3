"""The best this machine does: matrix products and copies, measured by every library at hand.

The largest figure counts as the machine's ceiling, whichever library reached it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from sam3rt.backends.telemetry import unreported_openvino

from .document import Ceiling
from .timing import fastest

# Large enough that reading the operands does not matter, small enough for a second a product.
_SIDE = 2048
_COPY_BYTES = 1 << 28


def measure_ceilings(threads: int | None, device: str, with_pytorch: bool) -> Iterator[Ceiling]:
    """Measure what can be measured here, one after the other.

    Args:
        threads: CPU threads the candidates use, or ``None`` for all.
        device: ``"cpu"``, or a CUDA device, which PyTorch must be there for.
        with_pytorch: whether PyTorch may be imported.
    """
    yield from _numpy()
    with contextlib.suppress(ImportError):
        yield from _openvino(threads)
    if with_pytorch:
        with contextlib.suppress(ImportError):
            from . import pytorch_backend

            yield from pytorch_backend.measure_ceilings(device, threads)


def best(ceilings: list[Ceiling], what: str, element: str, device: str) -> Ceiling | None:
    """The highest ceiling of a kind, or ``None`` where none was measured."""
    kind = device.partition(":")[0]
    fitting = [
        c
        for c in ceilings
        if c.what == what
        and c.device.partition(":")[0] == kind
        and (what == "copy" or c.element == element)
    ]
    return max(fitting, key=lambda c: c.per_second, default=None)


def _numpy() -> Iterator[Ceiling]:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_SIDE, _SIDE), np.float32) for _ in range(2))
    out = np.empty_like(a)
    seconds = fastest(lambda: np.matmul(a, b, out=out))
    yield Ceiling("matrix product", "fp32", "cpu", "numpy", 2 * _SIDE**3 / seconds)
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    seconds = fastest(lambda: np.copyto(target, source))
    yield Ceiling("copy", "", "cpu", "numpy", 2 * _COPY_BYTES / seconds)


def _openvino(threads: int | None) -> Iterator[Ceiling]:
    with unreported_openvino():
        import openvino as ov
        import openvino.opset13 as op

    core = ov.Core()
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_SIDE, _SIDE), np.float32) for _ in range(2))
    for element, hint in (("fp32", "f32"), *((("bf16", "bf16"),) if has_bf16 else ())):
        source = op.parameter([_SIDE, _SIDE], np.float32)
        # Several products after each other, so that entering and leaving BF16 does not count.
        value = source
        for _ in range(4):
            value = op.matmul(value, op.constant(b), False, False)
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        request = core.compile_model(
            ov.Model([value], [source]), "CPU", options
        ).create_infer_request()
        request.set_input_tensor(0, ov.Tensor(a))
        seconds = fastest(request.infer)
        yield Ceiling("matrix product", element, "cpu", "openvino", 4 * 2 * _SIDE**3 / seconds)
