"""Read tensors from an untrusted checkpoint file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sam3rt.bundle.files import sha256_file

from ..errors import CheckpointError


def load_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Load a ``torch.save``d dict of tensors, or one under its ``"model"`` key.

    Nothing in the file is executed (``weights_only=True``). The file is mapped where its format
    allows, so that unused tensors take no memory.

    Returns:
        Tensors by name, floating point ones as FP32, and the file's SHA-256.

    Raises:
        CheckpointError: the file cannot be read as such.
    """
    try:
        digest = sha256_file(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files older than PyTorch 1.6 are not zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a malformed file provokes
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected named tensors")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {name: as_float32(tensor) for name, tensor in tensors.items()}, digest


def as_float32(tensor: Tensor) -> Tensor:
    """A detached tensor; FP32 where it was another floating point type."""
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() else tensor
