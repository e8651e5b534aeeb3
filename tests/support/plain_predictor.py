"""The predictor's arithmetic once more, slow and plain, from the references' descriptions.

It shares the two graphs with the runtime, and nothing else: not the manifest, in which every rule
below could be stated wrongly, and no line of code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Rules:
    """What differs between SAM 3's predictor and MobileSAM's.

    Attributes:
        side: of the encoder's square input, pixels.
        keeps_shape: the longer side is resized to ``side`` and the rest padded with zeros, or both
            sides are.
        rounds: the resized image is rounded to whole levels.
        mean: subtracted from red, green and blue levels.
        std: then divided by.
        box_first: box corners come before points.
        pads_boxes: a padding point follows prompts with a box too.
    """

    side: int
    keeps_shape: bool
    rounds: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    box_first: bool
    pads_boxes: bool


SAM3 = Rules(1008, False, False, (127.5,) * 3, (127.5,) * 3, True, True)
MOBILE_SAM = Rules(
    1024, True, True, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False, False
)


class PlainPredictor:
    """Runs a bundle's graphs, with everything around them done the slow way."""

    def __init__(self, bundle: Path, rules: Rules) -> None:
        self.rules = rules
        options = ort.SessionOptions()
        # Gigabytes, for the encoders, that other tests want as well.
        options.enable_mem_pattern = options.enable_cpu_mem_arena = False
        self._encoder, self._decoder = (
            ort.InferenceSession(
                bundle / f"{role}.onnx", options, providers=["CPUExecutionProvider"]
            )
            for role in ("encoder", "decoder")
        )
        self._features: dict[str, NDArray[np.float32]] = {}
        self._size = self._filled = (0, 0)

    def set_image(self, rgb: NDArray[np.uint8]) -> None:
        """Encode uint8 [H, W, 3]."""
        height, width, _ = rgb.shape
        side = self.rules.side
        filled = (side, side)
        if self.rules.keeps_shape:
            scale = side / max(height, width)
            filled = (max(1, floor(height * scale + 0.5)), max(1, floor(width * scale + 0.5)))
        pixels = np.zeros((1, 3, side, side), np.float32)
        for channel in range(3):
            plane = resized(rgb[:, :, channel], filled, self.rules.rounds)
            pixels[0, channel, : filled[0], : filled[1]] = (
                plane - self.rules.mean[channel]
            ) / self.rules.std[channel]
        names = [output.name for output in self._encoder.get_outputs()]
        maps = self._encoder.run(names, {self._encoder.get_inputs()[0].name: pixels})
        self._features = dict(zip(names, maps, strict=True))
        self._size, self._filled = (height, width), filled

    def decode(
        self,
        points: NDArray[np.float64] | None,
        labels: NDArray[np.int64] | None,
        boxes: NDArray[np.float64] | None,
        mask: Logits | None,
        multimask: bool,
        in_pixels: bool,
    ) -> tuple[Logits, Logits]:
        """Low-resolution logits and predicted IoUs.

        Args:
            points: [P, N, 2] or nothing.
            labels: [P, N] or nothing.
            boxes: [P, 4] or nothing.
            mask: [h, w] or nothing.
            multimask: three masks, or one.
            in_pixels: what coordinates are in; else shares of the image.
        """
        count = 1
        for given in (points, boxes):
            count = len(given) if given is not None else count
        objects: list[list[tuple[float, float, int]]] = []
        for index in range(count):
            clicks, corners = [], []
            if points is not None and labels is not None:
                clicks = [
                    (*self._place(x, y, in_pixels), int(label))
                    for (x, y), label in zip(points[index], labels[index], strict=True)
                ]
            if boxes is not None:
                x0, y0, x1, y1 = boxes[index]
                corners = [
                    (*self._place(x0, y0, in_pixels), 2),
                    (*self._place(x1, y1, in_pixels), 3),
                ]
            prompt = corners + clicks if self.rules.box_first else clicks + corners
            if self.rules.pads_boxes if boxes is not None else points is not None:
                prompt.append((0.0, 0.0, -1))
            objects.append(prompt)
        side = self._decoder_mask_side()
        inputs = {
            **self._features,
            "input_points": np.array(
                [[(x, y) for x, y, _ in prompt] for prompt in objects], np.float32
            ).reshape(1, count, -1, 2),
            "input_labels": np.array(
                [[label for _, _, label in prompt] for prompt in objects], np.int64
            ).reshape(1, count, -1),
            "input_masks": np.zeros((1, 1, side, side), np.float32)
            if mask is None
            else mask[None, None],
            "has_input_masks": np.array([mask is not None], np.float32),
        }
        prefix = "" if multimask else "single_"
        logits, iou = self._decoder.run([f"{prefix}pred_masks", f"{prefix}iou_scores"], inputs)
        return logits[0], iou[0]

    def finish(
        self, low_res: Logits, threshold: float, holes: float, sprinkles: float
    ) -> NDArray[np.float64]:
        """Logits of the image's size, of low-resolution logits [..., h, w]."""
        masks = []
        for logits in low_res.reshape(-1, *low_res.shape[-2:]):
            grid = slow_clean(logits, threshold, holes, sprinkles).astype(np.float64)
            if self.rules.keeps_shape:
                grid = interpolated(grid, (self.rules.side, self.rules.side))
                grid = grid[: self._filled[0], : self._filled[1]]
            masks.append(interpolated(grid, self._size))
        return np.array(masks).reshape(*low_res.shape[:-2], *self._size)

    def _place(self, x: float, y: float, in_pixels: bool) -> tuple[float, float]:
        height, width = self._size
        if in_pixels:
            x, y = x / width, y / height
        return x * self._filled[1], y * self._filled[0]

    def _decoder_mask_side(self) -> int:
        (found,) = (i for i in self._decoder.get_inputs() if i.name == "input_masks")
        return int(found.shape[-1])


def resized(plane: NDArray[np.uint8], size: tuple[int, int], rounds: bool) -> NDArray[np.float64]:
    """An antialiased bilinear resize of [H, W].

    One that rounds does so after each axis, to 22 fractional bits of its weights, as Pillow does;
    rows go first where they lose more than twice as many pixels as columns (Pillow 13).
    """
    down, across = (triangle_weights(*sides) for sides in zip(plane.shape, size, strict=True))
    if not rounds:
        result: NDArray[np.float64] = down @ plane.astype(np.float64) @ across.T
        return result
    lost = [before - after for before, after in zip(plane.shape, size, strict=True)]
    values = plane.astype(np.int64)
    for axis in (0, 1) if lost[0] > max(0, 2 * lost[1]) else (1, 0):
        if plane.shape[axis] == size[axis]:
            continue
        weights = np.floor((down, across)[axis] * 2**22 + 0.5).astype(np.int64)
        total = weights @ values if axis == 0 else values @ weights.T
        values = np.clip((total + 2**21) >> 22, 0, 255)
    return values.astype(np.float64)


def triangle_weights(inputs: int, outputs: int) -> NDArray[np.float64]:
    """How much of each input pixel an output pixel is made of, [outputs, inputs]."""
    scale = inputs / outputs
    reach = max(scale, 1.0)
    weights = np.zeros((outputs, inputs))
    for o in range(outputs):
        centre = (o + 0.5) * scale
        for i in range(max(0, floor(centre - reach)), min(inputs, ceil(centre + reach))):
            weights[o, i] = max(0.0, 1 - abs(i + 0.5 - centre) / reach)
        weights[o] /= weights[o].sum()
    return weights


def interpolated(grid: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """A bilinear resize of [h, w] between pixel centres, without antialiasing."""
    down, across = (between_centres(*sides) for sides in zip(grid.shape, size, strict=True))
    result: NDArray[np.float64] = down @ grid @ across.T
    return result


def between_centres(inputs: int, outputs: int) -> NDArray[np.float64]:
    """How much of each input pixel an output pixel is made of, [outputs, inputs]."""
    weights = np.zeros((outputs, inputs))
    for o in range(outputs):
        position = max(0.0, (o + 0.5) * inputs / outputs - 0.5)
        left = floor(position)
        share = position - left
        weights[o, min(left, inputs - 1)] += 1 - share
        weights[o, min(left + 1, inputs - 1)] += share
    return weights


def components(wanted: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """The 8-connected components, each as a list of (row, column), by flood fill."""
    height, width = wanted.shape
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(wanted), strict=True)}
    found = []
    while left:
        queue = [left.pop()]
        for y, x in queue:
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            queue.extend(around)
        found.append(queue)
    assert sum(map(len, found)) == wanted.sum() <= height * width
    return found


def slow_clean(logits: Logits, threshold: float, holes: float, sprinkles: float) -> Logits:
    """The reference's order of operations, pixel by pixel."""
    result = logits.copy()
    limit = np.float32(threshold)
    if holes > 0:
        for component in components(logits <= limit):
            if len(component) <= holes:
                for place in component:
                    result[place] = limit + np.float32(10)
    if sprinkles > 0:
        for component in components(logits > limit):  # of the logits as they came
            if len(component) <= sprinkles:
                for place in component:
                    result[place] = limit - np.float32(10)
    return result
