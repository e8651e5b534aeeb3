"""The reference's own tracker object, live in memory."""

from __future__ import annotations

from torch import nn

from ..checkpoint_keys import from_reference_tracker
from ..source import ExportSource
from .checkpoint_file import as_float32
from .sam3_checkpoint import source_from_tensors


def is_reference_tracker(model: nn.Module) -> bool:
    """Whether a module is laid out like ``sam3``'s tracker built with its backbone."""
    return all(
        hasattr(model, name)
        for name in ("sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed", "backbone")
    )


def open_reference_tracker(model: nn.Module) -> ExportSource:
    """Prepare ``build_tracker(..., with_backbone=True)``'s module, or one loaded with weights.

    Raises:
        CheckpointError: it has no backbone or is not SAM 3.
    """
    state = {name: as_float32(tensor).cpu() for name, tensor in model.state_dict().items()}
    tensors = from_reference_tracker(state)
    return source_from_tensors(tensors, kind="reference tracker", reference=type(model).__name__)
