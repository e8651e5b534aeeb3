"""SAM 3 and SAM 3.1, from tensors in ``sam3.pt`` naming to an export source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor

from sam3rt.bundle import ImageSpec, MaskSpec, PromptSpec

from ..checkpoint_keys import DECODER, PROMPT
from ..errors import CheckpointError
from ..graphs.sam3_encoder import Sam3Architecture, Sam3EncoderGraph
from ..graphs.sam_decoder import DecoderArchitecture, SamDecoderGraph
from ..references.transformers_sam3 import TransformersReference, build_tracker_model
from ..source import ExportSource
from .sam3_architecture import read_architecture

# (x - 0.5) / 0.5 on [0, 1] values (the reference's SAM2Transforms), on the 0..255 scale.
_MEAN = _STD = (127.5, 127.5, 127.5)
# The reference clamps the low-resolution logits it returns.
_LOW_RES_LIMIT = 32.0
# The reference predictor's default.
_MAX_HOLE_AREA = 256.0
_LICENSE = "SAM License"


def source_from_tensors(
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    origin: str,
    sha256: str = "",
    sigmoid_iou: bool = True,
) -> ExportSource:
    """Prepare tensors in ``sam3.pt`` naming; see :func:`sam3_source` for the rest.

    Raises:
        CheckpointError: a tensor is missing or the shapes contradict each other.
    """
    architecture = read_architecture(tensors)
    model = build_tracker_model(architecture, tensors, sigmoid_iou=sigmoid_iou)
    return sam3_source(architecture, tensors, model, kind=kind, origin=origin, sha256=sha256)


def sam3_source(
    architecture: Sam3Architecture,
    tensors: Mapping[str, Tensor],
    model: Any,
    *,
    kind: str,
    origin: str,
    sha256: str = "",
) -> ExportSource:
    """Build graphs and reference of one SAM 3.

    Args:
        architecture: its sizes.
        tensors: its parameters in ``sam3.pt`` naming.
        model: the same parameters in a transformers ``Sam3TrackerModel``; whether its IoU head
            ends in a sigmoid tells SAM 3 from SAM 3.1.
        kind: checkpoint format.
        origin: where it came from.
        sha256: of the checkpoint file.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
    """
    arch = architecture
    sigmoid_iou = model.mask_decoder.iou_prediction_head.sigmoid_output
    decoder_architecture = DecoderArchitecture(
        image_size=arch.image_size,
        grid=arch.grid,
        heads=arch.decoder_heads,
        sigmoid_iou=sigmoid_iou,
    )
    try:
        encoder = Sam3EncoderGraph(arch, tensors).eval()
        decoder = SamDecoderGraph(decoder_architecture, tensors, PROMPT, DECODER).eval()
    except KeyError as error:
        raise CheckpointError(f"{origin}: tensor {error} is missing") from error
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{origin}: tensors do not fit together: {error}") from error
    grid = arch.grid
    return ExportSource(
        name="sam3" if sigmoid_iou else "sam3.1",
        model_type="sam3",
        kind=kind,
        origin=origin,
        sha256=sha256,
        license=_LICENSE,
        license_path=None,
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
    )
