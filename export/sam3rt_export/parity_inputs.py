"""The small inputs on which an export is compared, and on which every engine will be."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from sam3rt.accuracy.record import ParityCase
from sam3rt.bundle import ImageSpec, PromptSpec
from sam3rt.errors import PromptWarning
from sam3rt.geometry import geometry
from sam3rt.prompts import Prompts, pack

_BOXES = np.array(
    [[0.2, 0.25, 0.7, 0.8], [0.1, 0.1, 0.95, 0.95], [0.3, 0.15, 0.85, 0.7]], np.float32
)
_CLICKS = np.array([[0.3, 0.6], [0.75, 0.2], [0.55, 0.5]])
# Two shapes, so that a swapped height and width cannot go unnoticed.
_SIZES = ((168, 224), (240, 152))


def default_images() -> list[NDArray[np.uint8]]:
    """Synthetic scenes: shaded discs and bars with texture over a gradient, uint8 [H, W, 3].

    Drawn rather than stored photographs, so that no licence is involved; they have smooth
    areas, edges and noise.
    """
    return [_scene(seed, *size) for seed, size in enumerate(_SIZES)]


def _scene(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    canvas = 60.0 + 90.0 * np.stack([x, y, 1.0 - x], axis=-1)
    for _ in range(5):
        centre_x, centre_y = rng.uniform(0.0, 1.0, 2)
        radius = rng.uniform(0.06, 0.22)
        distance = np.hypot(x - centre_x, (y - centre_y) * rng.uniform(0.6, 1.6)) / radius
        colour = rng.uniform(20.0, 235.0, 3)
        shade = colour * (1.15 - 0.4 * np.clip(distance, 0.0, 1.0))[..., None]
        canvas = np.where((distance < 1.0)[..., None], shade, canvas)
    bar = np.abs(x - y * rng.uniform(0.4, 1.2) - 0.1) < 0.03
    canvas = np.where(bar[..., None], rng.uniform(0.0, 255.0, 3), canvas)
    canvas += rng.normal(0.0, 6.0, canvas.shape)
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8)


def cases_for(
    images: list[NDArray[np.uint8]],
    image: ImageSpec,
    prompts: PromptSpec,
    shift: tuple[float, float] = (0.0, 0.0),
) -> list[ParityCase]:
    """Decoder calls that reach every input of the graph and every axis of it.

    Args:
        images: the images.
        image: the model's image rules.
        prompts: the model's prompt rules.
        shift: moves every prompt by this share of the image, (x, y); at most 0.05.
    """
    cases = []
    for index, array in enumerate(images):
        height, width = array.shape[:2]
        place = geometry(image, (height, width))
        mask = _mask_prompt(prompts.mask_size, shift)
        at = np.array([width, height], np.float32)
        click = at * (np.array([0.42, 0.37]) + shift)
        boxes = np.tile(at, 2) * (_BOXES + np.tile(shift, 2).astype(np.float32))
        box = boxes[0]
        calls = {
            "click": Prompts(click[None], [1]),
            "clicks": Prompts(at * (_CLICKS + shift), [1, 0, 1]),
            "box": Prompts(box=box),
            "box_click": Prompts(click[None], [1], box=box),
            "objects": Prompts(box=boxes),
            "refine": Prompts(click[None], [1], mask_input=mask),
            "objects_mask": Prompts(box=boxes, mask_input=mask),
            "objects_masks": Prompts(
                box=boxes, mask_input=np.stack([mask, mask[..., ::-1], mask * 0.5])
            ),
            "mask_only": Prompts(mask_input=mask),
            "nothing": Prompts(),
        }
        # The first image gets every kind of call, the others the everyday ones.
        names = list(calls) if index == 0 else ["click", "box"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)  # no prompt at all is one of the cases
            cases += [
                ParityCase(f"{name}_{index}", index, pack(calls[name], prompts, place))
                for name in names
            ]
    return cases


def _mask_prompt(size: tuple[int, int], shift: tuple[float, float]) -> NDArray[np.float32]:
    """Logits of a soft ellipse, float32 [1, h, w]; whole numbers, so that they store well."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    distance = ((x / size[1] - 0.45 - shift[0]) / 0.25) ** 2
    distance += ((y / size[0] - 0.5 - shift[1]) / 0.3) ** 2
    logits: NDArray[np.float32] = np.round(np.clip(10.0 * (1.0 - distance), -10.0, 10.0))
    return logits.astype(np.float32)[None]
