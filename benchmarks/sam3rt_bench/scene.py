"""What every benchmark segments: one image and a few prompts, scaled to its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3rt.prompts import Prompts

FULL_HD = (1080, 1920)


@dataclass(frozen=True)
class Request:
    """One call of ``predict``.

    Attributes:
        name: what to call it.
        prompts: its prompts.
        multimask: three masks per object, or one.
    """

    name: str
    prompts: Prompts
    multimask: bool

    def arguments(self) -> dict[str, Any]:
        """As the predictor takes them."""
        return {
            "point_coords": self.prompts.point_coords,
            "point_labels": self.prompts.point_labels,
            "box": self.prompts.box,
            "multimask_output": self.multimask,
        }


def draw_scene(height: int, width: int) -> NDArray[np.uint8]:
    """Smooth blobs of colour with texture, uint8 [height, width, 3]; always the same."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / np.float32(height)
    canvas = 10 * rng.standard_normal((height, width, 3), np.float32)
    for _ in range(12):
        centre = rng.uniform(0, width / height), rng.uniform(0, 1)
        distance = np.hypot(x - centre[0], y - centre[1]) / rng.uniform(0.1, 0.4)
        canvas += np.exp(-(distance**2))[..., None] * rng.uniform(-120, 120, 3)
    return np.clip(canvas + 128, 0, 255).astype(np.uint8)


def click(size: tuple[int, int]) -> Request:
    """One click near the middle of an image of (height, width)."""
    return requests(size)[0]


def requests(size: tuple[int, int]) -> list[Request]:
    """The prompts of the side-by-side part, for an image of (height, width)."""
    clicks = _scaled([[0.47, 0.46], [0.16, 0.19], [0.78, 0.74], [0.03, 0.83], [0.52, 0.1]], size)
    boxes = _scaled(
        [
            [[0.26, 0.19], [0.78, 0.83]],
            [[0.05, 0.09], [0.36, 0.56]],
            [[0.47, 0.28], [0.99, 0.93]],
            [[0.16, 0.28], [0.31, 0.46]],
        ],
        size,
    ).reshape(4, 4)
    return [
        Request("one click", Prompts(clicks[:1], [1]), True),
        Request("one click, single mask", Prompts(clicks[:1], [1]), False),
        Request("one box, single mask", Prompts(box=boxes[0]), False),
        Request("five clicks", Prompts(clicks, [1, 0, 1, 0, 1]), True),
        Request("four boxes, single masks", Prompts(box=boxes), False),
    ]


def many_points(size: tuple[int, int], objects: int, points: int) -> Prompts:
    """Clicks spread over an image, [objects, points, 2]."""
    rng = np.random.default_rng(objects * 1000 + points)
    coords = rng.uniform(0.05, 0.95, (objects, points, 2)) * np.array(size[::-1])
    return Prompts(coords.astype(np.float32), np.ones((objects, points), np.int64))


def _scaled(fractions: list[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = np.array(fractions, np.float32) * np.array(size[::-1], np.float32)
    return scaled
