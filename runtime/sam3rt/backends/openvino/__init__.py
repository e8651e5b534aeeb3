"""The OpenVINO backend. Importing this package needs OpenVINO."""

from __future__ import annotations

from .backend import OpenVinoBackend

__all__ = ["OpenVinoBackend"]
