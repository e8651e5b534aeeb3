"""The export stage of sam3rt: PyTorch checkpoints to bundles. Needs the ``export`` extra."""

from __future__ import annotations

from .errors import CheckpointError, ExportError, GraphRuleError, SelfCheckError
from .exporter import ExportOptions, export_bundle

__all__ = [
    "CheckpointError",
    "ExportError",
    "ExportOptions",
    "GraphRuleError",
    "SelfCheckError",
    "export_bundle",
]
