"""Exceptions of the export stage. All derive from :class:`ExportError`."""

from __future__ import annotations

from sam3rt.errors import Sam3rtError


class ExportError(Sam3rtError):
    """An export cannot be done; nothing was written."""


class CheckpointError(ExportError):
    """A checkpoint cannot be read or is not a model that sam3rt can export."""


class GraphRuleError(ExportError):
    """An exported graph breaks a rule that TensorRT or the bundle asks for."""


class SelfCheckError(ExportError):
    """An exported graph does not reproduce the PyTorch model it was made from."""
