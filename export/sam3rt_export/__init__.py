"""The export stage of sam3rt: PyTorch checkpoints to bundles. Needs the ``export`` extra."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import CheckpointError, ExportError, GraphRuleError, SelfCheckError
    from .exporter import ExportOptions, export_bundle
    from .sources import SourceOptions

__all__ = [
    "CheckpointError",
    "ExportError",
    "ExportOptions",
    "GraphRuleError",
    "SelfCheckError",
    "SourceOptions",
    "export_bundle",
]


def __getattr__(name: str) -> Any:
    """Import PyTorch when it is needed: the command line loads this package to describe itself."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = ".errors" if name.endswith("Error") else ".exporter"
    home = ".sources" if name == "SourceOptions" else home
    return getattr(importlib.import_module(home, __name__), name)
