"""MobileSAM's ``mobile_sam.pt``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sam3rt.bundle import ImageSpec, MaskSpec, PromptSpec

from ..graphs.sam_decoder import DecoderArchitecture, SamDecoderGraph
from ..graphs.tiny_vit import TinyViTArchitecture, TinyViTGraph
from ..references.mobile_sam import MobileSamReference
from ..source import ExportSource

# The ImageNet statistics on the 0..255 scale that build_sam.py of the original sets.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


def open_mobile_sam(tensors: Mapping[str, Tensor]) -> ExportSource:
    """Prepare MobileSAM.

    Raises:
        CheckpointError: MobileSAM's own code is not installed, or a tensor is missing, too many or
            has the wrong shape.
    """
    reference = MobileSamReference(tensors)
    vit = TinyViTArchitecture()
    architecture = DecoderArchitecture(
        image_size=vit.image_size,
        grid=vit.grid,
        object_score=False,
        high_resolution=False,
        single_mask="token0",
        sigmoid_iou=False,
    )
    encoder = TinyViTGraph(vit, tensors, "image_encoder.").eval()
    decoder = SamDecoderGraph(architecture, tensors, "prompt_encoder.", "mask_decoder.").eval()
    side = 4 * vit.grid
    return ExportSource(
        name="mobile_sam",
        model_type="mobile_sam",
        license="Apache-2.0",
        encoder=encoder,
        decoder=decoder,
        reference=reference,
        feature_shapes=[(tensors["image_encoder.neck.0.weight"].shape[0], vit.grid, vit.grid)],
        image=ImageSpec(
            size=(vit.image_size, vit.image_size),
            resize="longest_side",
            resize_dtype="uint8",
            mean=_MEAN,
            std=_STD,
        ),
        prompts=PromptSpec(
            box_position="after_points",
            padding_point="without_box",
            mask_size=(side, side),
        ),
        masks=MaskSpec(
            multimask=decoder.masks - 1,
            low_res_size=(side, side),
            low_res_limit=None,
            upsampling="unpad",
            max_hole_area=0.0,
        ),
    )
