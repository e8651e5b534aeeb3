"""Meta's ``sam3.pt``, or a model of any size in the same naming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..read_architecture import read_architecture
from ..references.transformers_sam3 import build_tracker_model
from ..source import ExportSource
from .sam3 import sam3_source


def open_sam3(tensors: Mapping[str, Tensor], path: Path, digest: str) -> ExportSource:
    """Prepare the tensors of a ``sam3.pt``.

    Raises:
        CheckpointError: a tensor is missing or the shapes contradict each other.
    """
    return source_from_tensors(tensors, kind="sam3.pt", reference=path.name, sha256=digest)


def source_from_tensors(
    tensors: Mapping[str, Tensor], *, kind: str, reference: str, sha256: str = ""
) -> ExportSource:
    """Prepare tensors in ``sam3.pt`` naming, wherever they came from."""
    architecture = read_architecture(tensors)
    model = build_tracker_model(architecture, tensors)
    return sam3_source(architecture, tensors, model, kind=kind, reference=reference, sha256=sha256)
