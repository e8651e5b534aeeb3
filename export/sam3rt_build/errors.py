"""Exceptions of the build."""

from __future__ import annotations

from sam3rt.errors import BackendError


class BuildError(BackendError):
    """An engine cannot be built; the message says of what and why."""


class RecipeError(BuildError):
    """A precision recipe cannot be applied to a graph, such as for a weight beyond FP16."""
