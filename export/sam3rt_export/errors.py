"""Exceptions of the export stage. All derive from :class:`ExportError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sam3rt.errors import Sam3rtError


class ExportError(Sam3rtError):
    """An export cannot be done; nothing was written."""


class CheckpointError(ExportError):
    """A checkpoint cannot be read or is not a model that sam3rt can export."""


class ModelError(CheckpointError):
    """Tensors or a configuration cannot be used; :func:`tensors_of` adds whose they are."""


class GraphRuleError(ExportError):
    """An exported graph breaks a rule that TensorRT or the bundle asks for."""


class SelfCheckError(ExportError):
    """An exported graph does not reproduce the PyTorch model it was made from."""


@contextlib.contextmanager
def tensors_of(origin: str) -> Iterator[None]:
    """Name the checkpoint where its tensors are too few or do not fit a model built in the block.

    Raises:
        CheckpointError: looking up, arranging or running the tensors failed.
    """
    try:
        yield
    except ModelError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{origin}: tensor {error} is missing") from error
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{origin}: tensors do not fit together: {error}") from error
