"""What is traced: the two graphs, with types and axes of their tensors.

Names are those of :mod:`sam3rt.bundle.contract`.

Axes: ``batch`` images, ``num_objects`` P, ``num_points`` N (which may be 0), ``num_masks`` 1 or P,
``num_images`` 1 or P.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import Dim

from sam3rt.bundle import TensorSpec, contract

from .graphs.sam_decoder import DecoderArchitecture
from .source import ExportSource
from .tracing import TraceRequest, Weights


def encoder_request(source: ExportSource, weights: Weights, export_id: str) -> TraceRequest:
    """How to trace a model's encoder, with weights stored in a type."""
    height, width = source.image.size
    return TraceRequest(
        module=source.encoder,
        # Two images: a batch of one would be traced as a constant.
        arguments=(torch.zeros(2, 3, height, width),),
        dynamic_shapes=({0: Dim.DYNAMIC},),
        inputs=encoder_inputs(height),
        outputs=encoder_outputs(source.feature_shapes),
        weights=weights,
        metadata=_metadata(export_id, "encoder"),
    )


def decoder_request(source: ExportSource, weights: Weights, export_id: str) -> TraceRequest:
    """How to trace its decoder."""
    architecture = source.decoder.architecture
    levels = len(source.feature_shapes)
    objects_points = {1: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    features: tuple[Tensor, ...] = tuple(torch.zeros(3, *s) for s in source.feature_shapes)
    side = 4 * architecture.grid
    return TraceRequest(
        module=source.decoder,
        # Counts that differ from each other and from every fixed size. The tracer ties the numbers
        # of images and masks to the number of objects; the graph itself does not, see
        # size_free_inputs.
        arguments=(
            features,
            torch.zeros(1, 3, 5, 2),
            torch.ones(1, 3, 5, dtype=torch.int64),
            torch.zeros(1, 3, side, side),
            torch.zeros(1),
        ),
        dynamic_shapes=(
            ({0: Dim.DYNAMIC},) * levels,
            objects_points,
            objects_points,
            {1: Dim.DYNAMIC},
            None,
        ),
        inputs=decoder_inputs(architecture, source.feature_shapes),
        outputs=decoder_outputs(architecture, source.masks.multimask),
        weights=weights,
        metadata=_metadata(export_id, "decoder"),
        size_free_inputs=(contract.MASKS, *map(contract.feature_name, range(levels))),
    )


def _metadata(export_id: str, role: str) -> dict[str, str]:
    return {contract.EXPORT_ID: export_id, contract.ROLE: role}


def encoder_inputs(image_size: int) -> tuple[TensorSpec, ...]:
    """Normalized RGB pixels."""
    return (TensorSpec(contract.PIXELS, "float32", ("batch", 3, image_size, image_size)),)


def encoder_outputs(shapes: list[tuple[int, int, int]]) -> tuple[TensorSpec, ...]:
    """The feature maps, each (channels, height, width)."""
    return tuple(
        TensorSpec(contract.feature_name(level), "float32", ("batch", *shape))
        for level, shape in enumerate(shapes)
    )


def decoder_inputs(
    architecture: DecoderArchitecture, shapes: list[tuple[int, int, int]]
) -> tuple[TensorSpec, ...]:
    """Features, labelled points in input pixels, a mask prompt and whether it counts.

    Features are those of one image for all objects, or of one image for each.

    Labels are SAM's -1..3. A label below -1 marks padding: the result is as if the point were not
    there, so that points can be brought to a fixed number.

    ``has_input_masks`` is 0 or 1; at 0 the content of ``input_masks`` does not matter, and one
    zero mask serves all objects.
    """
    side = 4 * architecture.grid
    features = tuple(
        TensorSpec(contract.feature_name(level), "float32", (contract.IMAGES_AXIS, *shape))
        for level, shape in enumerate(shapes)
    )
    return (
        *features,
        TensorSpec(contract.POINTS, "float32", (1, "num_objects", "num_points", 2)),
        TensorSpec(contract.LABELS, "int64", (1, "num_objects", "num_points")),
        TensorSpec(contract.MASKS, "float32", (1, "num_masks", side, side)),
        TensorSpec(contract.HAS_MASKS, "float32", (1,)),
    )


def decoder_outputs(architecture: DecoderArchitecture, multimask: int) -> tuple[TensorSpec, ...]:
    """Three masks and the single mask per object, unclamped logits, with predicted IoUs."""
    side = 4 * architecture.grid
    outputs: tuple[TensorSpec, ...] = (
        TensorSpec(contract.MASK_LOGITS, "float32", (1, "num_objects", multimask, side, side)),
        TensorSpec(contract.IOU_SCORES, "float32", (1, "num_objects", multimask)),
        TensorSpec(contract.SINGLE_MASK_LOGITS, "float32", (1, "num_objects", 1, side, side)),
        TensorSpec(contract.SINGLE_IOU_SCORES, "float32", (1, "num_objects", 1)),
    )
    if architecture.object_score:
        outputs += (TensorSpec(contract.OBJECT_SCORE, "float32", (1, "num_objects", 1)),)
    return outputs
