"""SAM 3, SAM 3.1 and EfficientSAM3, from tensors in ``sam3.pt`` naming to an export source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import transformers
from torch import Tensor, nn

from sam3rt.bundle import ImageSpec, MaskSpec, PromptSpec

from ..checkpoint_keys import DECODER, PROMPT
from ..graphs.efficient_sam3 import EfficientSam3EncoderGraph, StudentArchitecture
from ..graphs.sam3_encoder import Sam3Architecture, Sam3EncoderGraph
from ..graphs.sam_decoder import DecoderArchitecture, SamDecoderGraph
from ..references.transformers_sam3 import TransformersReference, build_tracker_model
from ..source import ExportSource, Reference
from .sam3_architecture import read_architecture, resized

# (x - 0.5) / 0.5 on [0, 1] values (the reference's SAM2Transforms), on the 0..255 scale.
_MEAN = _STD = (127.5, 127.5, 127.5)
# Both references clamp the low-resolution logits they return.
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


def size_notes(image_size: int, usual: int) -> tuple[str, ...]:
    """What a user should know of an input size. No tensor says what a model was trained at."""
    if image_size == usual:
        return ()
    return (f"input of {image_size} pixels instead of {usual}: accuracy was never measured",)


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
    name = "sam3" if sigmoid_iou else "sam3.1"
    return sam_source(
        name if student is None else f"efficient_{name}_{student.variant}",
        "sam3" if student is None else "efficient_sam3",
        encoder,
        decoder,
        TransformersReference(model),
        tensors,
        coarsest=arch.fpn_dim,
        mean=_MEAN,
        std=_STD,
        max_hole_area=_MAX_HOLE_AREA,
        license=_LICENSE,
        notes=notes,
    )


def sam_source(
    name: str,
    model_type: Literal["sam3", "efficient_sam3", "sam2"],
    encoder: nn.Module,
    decoder: SamDecoderGraph,
    reference: Reference,
    tensors: Mapping[str, Tensor],
    *,
    coarsest: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    max_hole_area: float,
    license: str,
    notes: tuple[str, ...],
) -> ExportSource:
    """What SAM 2 and SAM 3 share: square inputs, three feature maps, prompts and masks.

    Args:
        name, model_type, encoder, decoder, reference, license, notes: see
            :class:`~sam3rt_export.source.ExportSource`.
        tensors: the decoder's, in ``sam3.pt`` naming.
        coarsest: channels of the coarsest map.
        mean, std: of pixels, on the 0..255 scale.
        max_hole_area: that the reference predictor fills by default.
    """
    grid, image_size = decoder.architecture.grid, decoder.architecture.image_size
    size = (4 * grid, 4 * grid)
    return ExportSource(
        name=name,
        model_type=model_type,
        license=license,
        encoder=encoder,
        decoder=decoder,
        reference=reference,
        feature_shapes=[
            (tensors[DECODER + "conv_s0.weight"].shape[0], *size),
            (tensors[DECODER + "conv_s1.weight"].shape[0], 2 * grid, 2 * grid),
            (coarsest, grid, grid),
        ],
        image=ImageSpec((image_size, image_size), "stretch", "float32", mean, std),
        prompts=PromptSpec(box_position="before_points", padding_point="always", mask_size=size),
        masks=MaskSpec(
            multimask=decoder.masks - 1,
            low_res_size=size,
            low_res_limit=_LOW_RES_LIMIT,
            upsampling="direct",
            max_hole_area=max_hole_area,
        ),
        versions={"transformers": transformers.__version__},
        notes=notes,
    )
