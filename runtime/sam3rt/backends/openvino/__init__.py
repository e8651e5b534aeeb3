"""The OpenVINO backend. Importing this package needs OpenVINO."""

from __future__ import annotations

from .backend import OpenVinoBackend, known_recipes, offer

__all__ = ["OpenVinoBackend", "known_recipes", "offer"]
