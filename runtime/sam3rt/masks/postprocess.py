"""From low-resolution logits to masks of the image's size.

The order is the reference's: small holes and sprinkles on the unclamped low-resolution logits,
then upsampling, then the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..arguments import flag, number
from ..bundle import ImageSpec, MaskSpec
from ..errors import InvalidInputError
from ..geometry import ImageGeometry
from .components import small_components
from .upsampling import direct, resize, unpadded

# The reference moves a filled pixel this far from the threshold (SAM2Transforms).
_FILL_MARGIN = np.float32(10.0)


def clean(
    logits: NDArray[np.float32],
    threshold: float,
    max_hole_area: float,
    max_sprinkle_area: float,
) -> NDArray[np.float32]:
    """Fill small holes and remove small islands of one mask.

    Components are 8-connected. Islands are found on the logits as they came, not as the hole
    filling left them.

    Args:
        logits: float32 [h, w].
        threshold: logits above it are foreground.
        max_hole_area: background components of at most this many pixels are filled; 0 for none.
        max_sprinkle_area: foreground components of at most this many are removed; 0 for none.

    Returns:
        float32 [h, w]: the input itself where nothing changed, else a changed copy.
    """
    cleaned = logits
    inside = logits > np.float32(threshold)
    for area, wanted, value in (
        (max_hole_area, ~inside, np.float32(threshold) + _FILL_MARGIN),
        (max_sprinkle_area, inside, np.float32(threshold) - _FILL_MARGIN),
    ):
        if area <= 0:
            continue
        small = small_components(wanted, area)
        if small is not None:
            cleaned = np.where(small, value, cleaned)
    return cleaned


def clamp(low_res: NDArray[np.float32], masks: MaskSpec) -> NDArray[np.float32]:
    """Low-resolution logits as the model's own predictor returns them, within its limit."""
    limit = masks.low_res_limit
    return low_res if limit is None else np.clip(low_res, -limit, limit)


def upsample(
    logits: NDArray[np.float32],
    geometry: ImageGeometry,
    image: ImageSpec,
    masks: MaskSpec,
    out: NDArray[Any],
    threshold: float | None = None,
) -> None:
    """Resize one mask's logits to the original image, bilinear without antialiasing.

    Args:
        logits: float32 [h, w].
        geometry: where the image lies in the encoder's input.
        image: the model's image rules.
        masks: the model's mask rules.
        out: [H, W] of the original image to write to; see :func:`sam3rt.masks.upsampling.resize`.
        threshold: ``None`` writes logits, a number 0 and 1.
    """
    shape = (logits.shape[0], logits.shape[1])
    if masks.upsampling == "unpad":
        resampling = unpadded(shape, image.size, geometry.input_size, geometry.original_size)
    else:
        resampling = direct(shape, geometry.original_size)
    resize(logits, resampling, out, threshold)


@dataclass(frozen=True)
class MaskOptions:
    """How low-resolution logits become masks.

    Attributes:
        threshold: logits above it are foreground.
        max_hole_area: see :func:`clean`.
        max_sprinkle_area: see :func:`clean`.
        return_logits: skip the threshold.
        dtype: type of thresholded masks: float32, bool or uint8. Logits are always float32.

    Raises:
        InvalidInputError: one of them is not such a value.
    """

    threshold: float = 0.0
    max_hole_area: float = 0.0
    max_sprinkle_area: float = 0.0
    return_logits: bool = False
    dtype: DTypeLike = np.float32

    def __post_init__(self) -> None:
        for name in ("threshold", "max_hole_area", "max_sprinkle_area"):
            number(name, getattr(self, name))
        flag("return_logits", self.return_logits)
        mask_dtype("dtype", self.dtype)


def mask_dtype(argument: str, value: DTypeLike) -> np.dtype[Any]:
    """A type that masks can have.

    Raises:
        InvalidInputError: it is another one, or none.
    """
    try:
        dtype = np.dtype(value)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(argument, repr(value), "a NumPy dtype") from error
    if dtype not in (np.float32, np.bool_, np.uint8):
        raise InvalidInputError(argument, str(dtype), "float32, bool or uint8")
    return dtype


def finish(
    low_res: NDArray[np.float32],
    geometry: ImageGeometry,
    image: ImageSpec,
    masks: MaskSpec,
    options: MaskOptions,
) -> NDArray[Any]:
    """Clean, upsample and threshold the masks of a decoder call.

    Args:
        low_res: float32 [P, C, h, w], unclamped logits.
        geometry: where the image lies in the encoder's input.
        image: the model's image rules.
        masks: the model's mask rules.
        options: the caller's choices.

    Returns:
        [P, C, H, W], 0 and 1 in the type asked for, or float32 logits.
    """
    objects, count = low_res.shape[:2]
    result = np.empty(
        (objects, count, *geometry.original_size),
        np.float32 if options.return_logits else options.dtype,
    )
    limit = None if options.return_logits else options.threshold
    for index in np.ndindex(objects, count):
        logits = clean(
            low_res[index], options.threshold, options.max_hole_area, options.max_sprinkle_area
        )
        upsample(logits, geometry, image, masks, result[index], limit)
    return result
