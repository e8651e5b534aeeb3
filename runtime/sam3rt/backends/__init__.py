"""Backends: ``table`` lists them, ``create`` makes one, ``base`` says what each can do."""

from __future__ import annotations

from .table import BACKENDS
from .telemetry import decline_onnxruntime

__all__ = ["BACKENDS"]

# Before anything here can import it.
decline_onnxruntime()
