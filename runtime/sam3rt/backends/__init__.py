"""Backends: ``table`` lists them, ``create`` makes one, ``base`` says what each can do."""

from __future__ import annotations

from .table import BACKENDS

__all__ = ["BACKENDS"]
