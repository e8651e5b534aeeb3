"""SAM 2 and SAM 2.1, from tensors in canonical naming to an export source.

The two differ in training and in parts for video, not in what an image goes through.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checkpoint_keys import DECODER, PROMPT, SAM2_NECK, SAM2_TRUNK
from ..errors import ModelError
from ..graphs.hiera import PATCH_STRIDE, HieraArchitecture, HieraGraph, plan_blocks
from ..graphs.operators import count_children
from ..graphs.sam_decoder import DecoderArchitecture, SamDecoderGraph
from ..references.transformers_sam2 import Sam2Reference, build_sam2_model
from ..source import ExportSource
from .sam3 import sam_source, size_notes


def _published(
    depths: tuple[int, ...],
    width: int,
    heads: int,
    windows: tuple[int, ...],
    global_blocks: tuple[int, ...],
) -> HieraArchitecture:
    """Widths and heads double from stage to stage."""
    stages = range(len(depths))
    return HieraArchitecture(
        image_size=1024,
        depths=depths,
        widths=tuple(width << stage for stage in stages),
        heads=tuple(heads << stage for stage in stages),
        windows=windows,
        global_blocks=global_blocks,
    )


# The published models by depths and width of the first stage, which tensors show. They do not show
# heads, windows and which blocks attend globally (sam2/configs/sam2.1 of the reference).
PUBLISHED: dict[tuple[tuple[int, ...], int], tuple[str, HieraArchitecture]] = {
    (arch.depths, arch.widths[0]): (name, arch)
    for name, arch in {
        "tiny": _published((1, 2, 7, 2), 96, 1, (8, 4, 14, 7), (5, 7, 9)),
        "small": _published((1, 2, 11, 2), 96, 1, (8, 4, 14, 7), (7, 10, 13)),
        "base_plus": _published((2, 3, 16, 3), 112, 2, (8, 4, 14, 7), (12, 16, 20)),
        "large": _published((2, 6, 36, 4), 144, 2, (8, 4, 16, 8), (23, 33, 43)),
    }.items()
}

# ImageNet's statistics (the reference's SAM2Transforms) on the 0..255 scale.
_MEAN = (0.485 * 255.0, 0.456 * 255.0, 0.406 * 255.0)
_STD = (0.229 * 255.0, 0.224 * 255.0, 0.225 * 255.0)
# The reference predictor's default: it fills no holes unless it is asked to.
_MAX_HOLE_AREA = 0.0
_LICENSE = "Apache-2.0"
# Published files of SAM 2.1 have it, those of SAM 2 do not.
_ONLY_IN_2_1 = "no_obj_embed_spatial"


def version_of(names: Mapping[str, Any]) -> str:
    """``"sam2.1"`` or ``"sam2"``, by the parts for video in a whole checkpoint."""
    return "sam2.1" if any(name.endswith(_ONLY_IN_2_1) for name in names) else "sam2"


def source_from_tensors(
    tensors: Mapping[str, Tensor], *, version: str = "sam2.1", image_size: int | None = None
) -> ExportSource:
    """Prepare tensors in canonical naming; see :func:`sam2_source` for the rest.

    Raises:
        ModelError: a tensor is missing, the shapes contradict each other, they are not those of a
            published model, or it has no such size.
    """
    published = read_architecture(tensors)
    architecture = resized(published, image_size)
    model = build_sam2_model(architecture, tensors)
    notes = size_notes(architecture.image_size, published.image_size)
    return sam2_source(architecture, tensors, model, version=version, notes=notes)


def resized(architecture: HieraArchitecture, image_size: int | None) -> HieraArchitecture:
    """The same model for another input: its position grid is enlarged to any size.

    Raises:
        ModelError: the size does not fit the windows.
    """
    if image_size is None:
        return architecture
    changed = dataclasses.replace(architecture, image_size=image_size)
    _check_architecture(changed)
    return changed


def read_architecture(tensors: Mapping[str, Tensor]) -> HieraArchitecture:
    """The published architecture that the tensors' shapes are those of.

    Raises:
        ModelError: naming what was found.
    """
    try:
        count = count_children(tensors, SAM2_TRUNK + "blocks.")
        widths = [tensors[f"{SAM2_TRUNK}blocks.{i}.norm2.weight"].shape[0] for i in range(count)]
    except KeyError as error:
        raise ModelError(f"the image encoder is incomplete: {error}") from error
    stages = [(width, len(list(group))) for width, group in itertools.groupby(widths)]
    depths = tuple(depth for _, depth in stages)
    _, found = PUBLISHED.get((depths, widths[0] if widths else 0), ("", None))
    if found is None or found.widths != tuple(width for width, _ in stages):
        known = "; ".join(
            f"{name} {list(arch.depths)} of width {arch.widths[0]}"
            for name, arch in PUBLISHED.values()
        )
        raise ModelError(
            f"an image encoder of {list(depths)} blocks of widths {[w for w, _ in stages]} is no "
            f"published SAM 2 ({known}). Shapes do not show its heads and windows: pass it as a "
            "transformers folder, whose config.json has them"
        )
    return found


def architecture_of(config: Any) -> HieraArchitecture:
    """The architecture in a ``Sam2Config``.

    Raises:
        ModelError: the graphs cannot express it.
    """
    vision, decoder = config.vision_config, config.mask_decoder_config
    hiera = vision.backbone_config
    prompt = config.prompt_encoder_config
    side = prompt.image_size
    for what, value, expected in (
        ("backbone image_size", _pair(hiera.image_size), [side, side]),
        ("patch_kernel_size", _pair(hiera.patch_kernel_size), [7, 7]),
        ("patch_stride", _pair(hiera.patch_stride), [PATCH_STRIDE, PATCH_STRIDE]),
        ("patch_padding", _pair(hiera.patch_padding), [3, 3]),
        ("prompt encoder patch_size", prompt.patch_size, 16),
        ("query_stride", _pair(hiera.query_stride), [2, 2]),
        ("num_query_pool_stages", hiera.num_query_pool_stages, 3),
        ("number of stages", len(hiera.blocks_per_stage), 4),
        ("hidden_act", hiera.hidden_act, "gelu"),
        ("decoder hidden_act", decoder.hidden_act, "gelu"),
        ("prompt encoder hidden_act", prompt.hidden_act, "gelu"),
        ("prompt encoder layer_norm_eps", prompt.layer_norm_eps, 1e-6),
        ("fpn_kernel_size", vision.fpn_kernel_size, 1),
        ("fpn_stride", vision.fpn_stride, 1),
        ("fpn_padding", vision.fpn_padding, 0),
        ("fpn_top_down_levels", sorted(vision.fpn_top_down_levels), [2, 3]),
        ("num_feature_levels", vision.num_feature_levels, 3),
        ("num_multimask_outputs", decoder.num_multimask_outputs, 3),
        ("decoder num_attention_heads", decoder.num_attention_heads, 8),
        ("dynamic_multimask_via_stability", decoder.dynamic_multimask_via_stability, True),
        ("dynamic_multimask_stability_delta", decoder.dynamic_multimask_stability_delta, 0.05),
        ("dynamic_multimask_stability_thresh", decoder.dynamic_multimask_stability_thresh, 0.98),
    ):
        if value != expected:
            raise ModelError(f"{what} is {value}, expected {expected} as in every SAM 2")
    architecture = HieraArchitecture(
        image_size=side,
        depths=tuple(hiera.blocks_per_stage),
        widths=tuple(hiera.embed_dim_per_stage),
        heads=tuple(hiera.num_attention_heads_per_stage),
        windows=tuple(hiera.window_size_per_stage),
        global_blocks=tuple(hiera.global_attention_blocks),
        layer_norm_eps=hiera.layer_norm_eps,
    )
    _check_architecture(architecture)
    return architecture


def _pair(value: Any) -> Any:
    return [value, value] if isinstance(value, int) else list(value)


def _check_architecture(architecture: HieraArchitecture) -> None:
    arch = architecture
    if (
        arch.image_size < 1
        or arch.image_size % (8 * PATCH_STRIDE)
        or arch.side(0) % arch.windows[0]
    ):
        raise ModelError(
            f"image_size is {arch.image_size}, expected a multiple of {8 * PATCH_STRIDE} and of "
            f"{arch.windows[0]} patches of {PATCH_STRIDE} pixels"
        )

    starts = set(itertools.accumulate(arch.depths[:-1]))
    if starts & set(arch.global_blocks):
        raise ModelError(
            f"global_attention_blocks is {list(arch.global_blocks)}: the blocks {sorted(starts)} "
            "start a stage, and the reference has them attend in windows"
        )
    if any(stage[0].window % 2 for stage in plan_blocks(arch)[1:]):
        raise ModelError(f"windows are {arch.windows}: those that are pooled must be even")
    for width, heads in zip(arch.widths, arch.heads, strict=True):
        if width % heads:
            raise ModelError(f"width {width} is not a multiple of {heads} heads")


def sam2_source(
    architecture: HieraArchitecture,
    tensors: Mapping[str, Tensor],
    model: Any,
    *,
    version: str = "sam2",
    notes: tuple[str, ...] = (),
) -> ExportSource:
    """Build graphs and reference of one SAM 2.

    Args:
        architecture: the image encoder's sizes.
        tensors: its parameters in canonical naming.
        model: the same parameters in a transformers ``Sam2Model``.
        version: ``"sam2"`` or ``"sam2.1"``, for the name.
        notes: see :class:`~sam3rt_export.source.ExportSource`.
    """
    arch = architecture
    decoder_architecture = DecoderArchitecture(image_size=arch.image_size, grid=arch.grid)
    encoder = HieraGraph(arch, tensors).eval()
    decoder = SamDecoderGraph(decoder_architecture, tensors, PROMPT, DECODER).eval()
    return sam_source(
        _name(version, arch),
        "sam2",
        encoder,
        decoder,
        Sam2Reference(model),
        tensors,
        coarsest=tensors[SAM2_NECK + "1.conv.weight"].shape[0],
        mean=_MEAN,
        std=_STD,
        max_hole_area=_MAX_HOLE_AREA,
        license=_LICENSE,
        notes=notes,
    )


def _name(version: str, architecture: HieraArchitecture) -> str:
    key = (architecture.depths, architecture.widths[0])
    size, published = PUBLISHED.get(key, ("", None))
    if published is None or not _same_model(published, architecture):
        return version
    return f"{version}_hiera_{size}"


def _same_model(one: HieraArchitecture, other: HieraArchitecture) -> bool:
    return one == dataclasses.replace(other, image_size=one.image_size)
