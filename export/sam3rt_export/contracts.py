"""Types and axes of the two graphs' tensors, under the names of :mod:`sam3rt.bundle.contract`.

Axes: ``batch`` images, ``num_objects`` P, ``num_points`` N (which may be 0), ``num_masks`` 1 or P,
``num_images`` 1 or P.
"""

from __future__ import annotations

from sam3rt.bundle import TensorSpec, contract

from .graphs.sam_decoder import DecoderArchitecture


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
