"""What all SAM 3 sources share: from canonical tensors to an export source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from sam3rt.bundle import ImageSpec, MaskSpec, PromptSpec

from ..architecture import Sam3Architecture
from ..checkpoint_keys import DECODER, PROMPT
from ..errors import CheckpointError
from ..graphs.sam3_encoder import Sam3EncoderGraph
from ..graphs.sam_decoder import DecoderArchitecture, SamDecoderGraph
from ..references.transformers_sam3 import TransformersOracle
from ..source import ExportSource

# (x - 0.5) / 0.5 on [0, 1] values (the reference's SAM2Transforms), on the 0..255 scale.
_MEAN = _STD = (127.5, 127.5, 127.5)
# The reference clamps the low-resolution logits it returns.
_LOW_RES_LIMIT = 32.0
# The reference predictor's default.
_MAX_HOLE_AREA = 256.0
_LICENSE = "SAM License"


def sam3_source(
    architecture: Sam3Architecture,
    tensors: Mapping[str, Tensor],
    model: Any,
    *,
    kind: str,
    reference: str,
    sha256: str = "",
) -> ExportSource:
    """Build graphs and oracle of one SAM 3.

    Args:
        architecture: its sizes.
        tensors: its parameters in ``sam3.pt`` naming.
        model: the same parameters in a transformers ``Sam3TrackerModel``.
        kind: checkpoint format.
        reference: where it came from.
        sha256: of the checkpoint file.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
    """
    arch = architecture
    decoder_architecture = DecoderArchitecture(
        image_size=arch.image_size, grid=arch.grid, heads=arch.decoder_heads
    )
    try:
        encoder = Sam3EncoderGraph(arch, tensors).eval()
        decoder = SamDecoderGraph(decoder_architecture, tensors, PROMPT, DECODER).eval()
    except KeyError as error:
        raise CheckpointError(f"{reference}: tensor {error} is missing") from error
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{reference}: tensors do not fit together: {error}") from error
    grid = arch.grid
    return ExportSource(
        name="sam3",
        model_type="sam3",
        kind=kind,
        reference=reference,
        sha256=sha256,
        license=_LICENSE,
        license_path=None,
        encoder=encoder,
        decoder=decoder,
        oracle=TransformersOracle(model),
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


def describe(path: str) -> str:
    """What to call a checkpoint in a manifest: its last path component, not the whole path."""
    return Path(path).name if Path(path).exists() else path
