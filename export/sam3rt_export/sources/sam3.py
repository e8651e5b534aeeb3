"""SAM 3, SAM 3.1 and EfficientSAM3, from tensors in ``sam3.pt`` naming to an export source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn

from sam3rt.bundle import ImageSpec, MaskSpec, PromptSpec

from ..checkpoint_keys import DECODER, PROMPT
from ..graphs.efficient_sam3 import EfficientSam3EncoderGraph, StudentArchitecture
from ..graphs.sam3_encoder import Sam3Architecture, Sam3EncoderGraph
from ..graphs.sam_decoder import DecoderArchitecture, SamDecoderGraph
from ..references.transformers_sam3 import TransformersReference, build_tracker_model
from ..source import ExportSource
from .sam3_architecture import read_architecture, resized

# (x - 0.5) / 0.5 on [0, 1] values (the reference's SAM2Transforms), on the 0..255 scale.
_MEAN = _STD = (127.5, 127.5, 127.5)
# The reference clamps the low-resolution logits it returns.
_LOW_RES_LIMIT = 32.0
# The reference predictor's default.
_MAX_HOLE_AREA = 256.0
_LICENSE = "SAM License"


def source_from_tensors(
    tensors: Mapping[str, Tensor], *, sigmoid_iou: bool = True, image_size: int | None = None
) -> ExportSource:
    """Prepare tensors in ``sam3.pt`` naming.

    Args:
        tensors: the parameters.
        sigmoid_iou: whether predicted IoUs go through a sigmoid, as SAM 3's do.
        image_size: side of the input, pixels; by default that of the training.

    Raises:
        ModelError: a tensor is missing, or the shapes contradict each other.
        CheckpointError: the model has no such size.
    """
    trained = read_architecture(tensors)
    architecture = resized(trained, image_size)
    model = build_tracker_model(architecture, tensors, sigmoid_iou=sigmoid_iou)
    notes = size_notes(architecture.image_size, trained.image_size)
    return sam3_source(architecture, tensors, model, notes=notes)


def size_notes(image_size: int, trained: int) -> tuple[str, ...]:
    """What a user should know of an input size."""
    if image_size == trained:
        return ()
    return (f"input of {image_size} pixels, trained at {trained}: accuracy was never measured",)


def sam3_source(
    architecture: Sam3Architecture,
    tensors: Mapping[str, Tensor],
    model: Any,
    *,
    notes: tuple[str, ...] = (),
    student: StudentArchitecture | None = None,
) -> ExportSource:
    """Build graphs and reference of one SAM 3.

    Args:
        architecture: its sizes.
        tensors: its parameters in ``sam3.pt`` naming.
        model: the same parameters in a transformers ``Sam3TrackerModel``; whether its IoU head
            ends in a sigmoid tells SAM 3 from SAM 3.1.
        notes: what a user should know of how the model came about.
        student: sizes of EfficientSAM3's encoder, where it stands in the ViT's place.
    """
    arch = architecture
    sigmoid_iou = model.mask_decoder.iou_prediction_head.sigmoid_output
    decoder_architecture = DecoderArchitecture(
        image_size=arch.image_size,
        grid=arch.grid,
        heads=arch.decoder_heads,
        sigmoid_iou=sigmoid_iou,
    )
    encoder: nn.Module = (
        Sam3EncoderGraph(arch, tensors)
        if student is None
        else EfficientSam3EncoderGraph(student, tensors)
    ).eval()
    decoder = SamDecoderGraph(decoder_architecture, tensors, PROMPT, DECODER).eval()
    grid = arch.grid
    name = "sam3" if sigmoid_iou else "sam3.1"
    return ExportSource(
        name=name if student is None else f"efficient_{name}_{student.variant}",
        model_type="sam3" if student is None else "efficient_sam3",
        license=_LICENSE,
        encoder=encoder,
        decoder=decoder,
        reference=TransformersReference(model),
        feature_shapes=[
            (tensors[DECODER + "conv_s0.weight"].shape[0], 4 * grid, 4 * grid),
            (tensors[DECODER + "conv_s1.weight"].shape[0], 2 * grid, 2 * grid),
            (arch.fpn_dim, grid, grid),
        ],
        image=ImageSpec(
            size=(arch.image_size, arch.image_size),
            resize="stretch",
            resize_dtype="float32",
            mean=_MEAN,
            std=_STD,
        ),
        prompts=PromptSpec(
            box_position="before_points",
            padding_point="always",
            mask_size=(4 * grid, 4 * grid),
        ),
        masks=MaskSpec(
            multimask=decoder.masks - 1,
            low_res_size=(4 * grid, 4 * grid),
            low_res_limit=_LOW_RES_LIMIT,
            upsampling="direct",
            max_hole_area=_MAX_HOLE_AREA,
        ),
        versions={"transformers": transformers.__version__},
        notes=notes,
    )
