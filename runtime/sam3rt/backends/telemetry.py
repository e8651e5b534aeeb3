"""Keeps other libraries from reporting to their makers: sam3rt opens no network connection.

ONNX Runtime from 1.29 on sends, on Linux too, which models and devices a process uses, and keeps an
identifier of the machine in ``~/.cache/Microsoft``. OpenVINO sends to Google Analytics that it was
imported, and keeps one in ``~/intel``. A library that the caller imported before sam3rt, or a
variable that the caller set, is the caller's choice and stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

_OPENVINO_TELEMETRY = "openvino_telemetry"


def decline_onnxruntime() -> None:
    """Tell ONNX Runtime to report nothing. It asks once, when it is imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@contextlib.contextmanager
def unreported_openvino() -> Iterator[None]:
    """For the length of the block, importing OpenVINO reports nothing.

    It has no variable for that. Where the package that sends is not installed, it does without, so
    that package cannot be imported here.
    """
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    if _OPENVINO_TELEMETRY in modules:
        yield
        return
    modules[_OPENVINO_TELEMETRY] = None
    try:
        yield
    finally:
        del modules[_OPENVINO_TELEMETRY]
