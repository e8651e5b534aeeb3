"""Checkpoints of every supported kind, as :class:`~sam3rt_export.source.ExportSource`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint_keys import TRUNK
from ..errors import CheckpointError
from ..source import ExportSource


def open_source(checkpoint: Any) -> ExportSource:
    """Recognize a checkpoint and load it.

    Args:
        checkpoint: Meta's ``sam3.pt``; MobileSAM's ``mobile_sam.pt``; a transformers folder or
            hub id; a live ``Sam3TrackerModel``; or the reference's own tracker object.

    Raises:
        CheckpointError: it is none of these, or cannot be read.
    """
    if isinstance(checkpoint, nn.Module):
        return _open_live(checkpoint)
    if not isinstance(checkpoint, str | os.PathLike):
        raise CheckpointError(
            f"checkpoint: got {type(checkpoint).__qualname__}, expected a path, a hub id or a model"
        )
    path = Path(checkpoint)
    if path.is_file():
        return _open_file(path)
    if path.is_dir() or _is_hub_id(os.fspath(checkpoint)):
        from .transformers_model import open_pretrained

        return open_pretrained(os.fspath(checkpoint))
    raise CheckpointError(f"checkpoint: {checkpoint} is no file, no folder and no hub id")


def _open_live(model: nn.Module) -> ExportSource:
    from .reference_tracker import is_reference_tracker, open_reference_tracker
    from .transformers_model import is_tracker_model, open_tracker_model

    if is_tracker_model(model):
        return open_tracker_model(model)
    if is_reference_tracker(model):
        return open_reference_tracker(model)
    raise CheckpointError(
        f"checkpoint: got a {type(model).__qualname__}, expected a Sam3TrackerModel or the "
        "reference's tracker built with its backbone"
    )


def _open_file(path: Path) -> ExportSource:
    from .checkpoint_file import load_tensors

    tensors, digest = load_tensors(path)
    # Each kind brings libraries of its own, so only the one that is needed is imported.
    if any(name.startswith(TRUNK) for name in tensors):
        from .sam3_checkpoint import open_sam3

        return open_sam3(tensors, path, digest)
    if any(name.startswith("image_encoder.patch_embed.seq.") for name in tensors):
        from .mobile_sam import open_mobile_sam

        return open_mobile_sam(tensors, path, digest)
    raise CheckpointError(f"{path}: holds neither SAM 3's nor MobileSAM's tensors")


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    named_file = Path(text).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx")
    return (
        len(parts) == 2
        and not named_file
        and all(part and not part.startswith(".") for part in parts)
    )
