"""The OpenVINO backend. Importing this package needs OpenVINO."""

from __future__ import annotations

from ..telemetry import unreported_openvino

with unreported_openvino():
    from .backend import OpenVinoBackend, known_recipes, offer

__all__ = ["OpenVinoBackend", "known_recipes", "offer"]
