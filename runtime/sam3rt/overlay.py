"""Draw masks, their scores and the prompts over an image.

Sizes follow from the image's, so that a thumbnail and an 8K frame both look right. Larger objects
are drawn first and prompts last: what was asked for is not hidden by what was answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import PIL.Image
from numpy.typing import ArrayLike, NDArray
from PIL import ImageDraw, ImageFilter, ImageFont

from .arguments import renamed
from .errors import InvalidInputError
from .geometry import Image, to_rgb
from .object_prompts import WRITTEN_AS, ObjectPrompts, by_object, with_labels
from .prompts import Prompts

Colour = tuple[int, int, int]
ScoreUnit = Literal["iou", "log_odds"]
_Rect = tuple[int, int, int, int]

# Okabe and Ito's set, which colour-blind people can tell apart too, a little more saturated.
PALETTE: tuple[Colour, ...] = (
    (0, 132, 214),
    (240, 148, 0),
    (204, 95, 165),
    (240, 228, 66),
    (86, 196, 240),
    (213, 84, 0),
    (0, 158, 115),
)
TINT = 0.45  # the colour's share inside a mask

_WHITE, _DARK, _GREY = (255, 255, 255), (18, 20, 26), (138, 142, 150)
_CLICKS = {1: (22, 170, 82), 0: (222, 42, 52)}
_SUPERSAMPLE = 4


def draw_overlay(
    image: Image,
    masks: ArrayLike,
    scores: ArrayLike | None = None,
    *,
    points: Sequence[Any] | NDArray[Any] | None = None,
    labels: Sequence[Any] | NDArray[Any] | None = None,
    boxes: ArrayLike | None = None,
    score_unit: ScoreUnit = "iou",
) -> PIL.Image.Image:
    """Draw each object's best mask, its outline and score, and the prompts.

    Args:
        image: uint8 [H, W, 3] or a PIL image.
        masks: what ``predict`` returns: [C, H, W] for one object or [B, C, H, W]; above 0 is
            object.
        scores: their scores, [C] or [B, C]. Without them the first mask of each object is drawn,
            and no label.
        points: (x, y) in pixels, as passed to ``predict``: [N, 2], [B, N, 2] or a list of arrays.
        labels: their labels, 1 for all by default. Points labelled -1 have no place and are not
            drawn.
        boxes: [4] or [B, 4], x0, y0, x1, y1 in pixels.
        score_unit: what scores are, :attr:`SegmentationModel.score_unit`: IoUs are shown within 0
            and 1, log-odds as they are.

    Returns:
        A new RGB image. Where there are several objects, everything of an object, its mask, label,
        clicks and box, has its colour and its number, from 0.

    Raises:
        ImageError: the image is not one that the predictor takes.
        InvalidInputError: masks or scores do not fit the image or each other.
        PromptError: points, labels or boxes are none that ``predict`` takes.
    """
    rgb = to_rgb(image)
    best, best_scores = _best(masks, scores, (rgb.shape[0], rgb.shape[1]))
    if score_unit not in get_args(ScoreUnit):
        raise InvalidInputError("score_unit", repr(score_unit), '"iou" or "log_odds"')
    with renamed(**WRITTEN_AS):
        asked = by_object(Prompts(*with_labels(points, labels), boxes))
    objects = [
        DrawnObject(
            number,
            int(np.count_nonzero(mask)),
            partial(np.asarray, mask),
            score_text(best_scores[number], score_unit) if len(best_scores) else "",
        )
        for number, mask in enumerate(best)
    ]
    return draw_objects(rgb, objects, list(enumerate(asked)))


class DrawnObject(NamedTuple):
    """One object of a picture.

    Attributes:
        number: its number, which gives its colour.
        area: of its mask, pixels; larger ones are drawn first.
        load: gives its mask, bool [H, W], when it is drawn, so that only one is held.
        text: what its label says after the number; without a text it has no label.
    """

    number: int
    area: int
    load: Callable[[], NDArray[np.bool_]]
    text: str


def draw_objects(
    image: NDArray[np.uint8],
    objects: Sequence[DrawnObject],
    asked: Sequence[tuple[int, ObjectPrompts]] = (),
) -> PIL.Image.Image:
    """Draw objects and prompts; see :func:`draw_overlay`.

    Args:
        image: uint8 [H, W, 3].
        objects: what was found.
        asked: numbers of objects, and the prompts of each.
    """
    clicks = [
        (number, x, y, label)
        for number, prompts in asked
        for (x, y), label in zip(prompts.points.tolist(), prompts.labels.tolist(), strict=True)
        if label >= 0
    ]
    boxes = [(number, p.box.astype(np.float64)) for number, p in asked if p.box is not None]
    canvas = PIL.Image.fromarray(np.array(image))
    unit = math.sqrt(canvas.width * canvas.height) / 1000
    extents: list[_Rect | None] = [None] * len(objects)
    for index in sorted(range(len(objects)), key=lambda i: -objects[i].area):
        picture = PIL.Image.fromarray(objects[index].load().astype(np.uint8) * 255)
        extents[index] = picture.getbbox()
        _draw_mask(canvas, picture, colour(objects[index].number), unit)
    many = len({entry.number for entry in objects}) > 1
    for number, box in boxes:
        _draw_box(canvas, box, colour(number), unit)
    taken = [
        _draw_click(canvas, (x, y), label, colour(number) if many else _WHITE, unit)
        for number, x, y, label in clicks
    ]
    if many:
        # Beside each prompt, its object's number. A box's stands inside its upper left corner.
        for (number, *_), rect in zip(clicks, list(taken), strict=True):
            _draw_label(canvas, str(number), colour(number), rect, taken, unit)
        for number, box in boxes:
            x, y = np.clip(box[:2], -9, np.array(canvas.size)).tolist()
            corner = (round(x), round(y), round(x), round(y))
            _draw_label(canvas, str(number), colour(number), corner, taken, unit)
    for entry, extent in zip(objects, extents, strict=True):
        if extent is not None and entry.text:
            text = f"{entry.number}: {entry.text}" if many else entry.text
            _draw_label(canvas, text, colour(entry.number), extent, taken, unit)
    return canvas


def score_text(score: float, unit: ScoreUnit) -> str:
    """A score as a label says it."""
    if unit == "log_odds":
        return f"log-odds {score:.2f}"
    return f"{min(max(float(score), 0.0), 1.0):.3f}"


def colour(index: int) -> Colour:
    """The RGB colour of an object, from 0; the palette is used again after its end."""
    return PALETTE[index % len(PALETTE)]


def _best(
    masks: ArrayLike, scores: ArrayLike | None, size: tuple[int, int]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Each object's best mask, bool [B, H, W], and its score, [B] or empty."""
    expected = f"[C, {size[0]}, {size[1]}] or [B, C, {size[0]}, {size[1]}], of the image's size"
    array = _numbers("masks", masks, expected)
    if array.ndim not in (3, 4) or array.shape[-2:] != size or 0 in array.shape[1:]:
        raise InvalidInputError("masks", f"shape {array.shape}", expected)
    array = array.reshape(-1, *array.shape[-3:])
    if scores is None:
        return array[:, 0] > 0, np.zeros(0)
    values = _numbers("scores", scores, "numbers, one for each mask").astype(np.float64)
    if values.shape != array.shape[:2] and (len(array) > 1 or values.size != array.shape[1]):
        expected = f"one score for each of {array.shape[0]} x {array.shape[1]} masks"
        raise InvalidInputError("scores", f"shape {values.shape}", expected)
    values = np.nan_to_num(values.reshape(array.shape[:2]))
    which = values.argmax(axis=1)
    rows = np.arange(len(array))
    return array[rows, which] > 0, values[rows, which]


def _numbers(argument: str, value: ArrayLike, expected: str) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, or a tensor on a GPU
        raise InvalidInputError(argument, f"what NumPy cannot read ({error})", expected) from error
    if array.dtype.kind not in "biufV":  # V: bfloat16
        raise InvalidInputError(argument, f"dtype {array.dtype}", expected)
    return array


def _draw_mask(canvas: PIL.Image.Image, mask: PIL.Image.Image, ink: Colour, unit: float) -> None:
    """Tint a mask; draw a line in its colour inside its edge and a white one outside."""
    extent = mask.getbbox()
    if extent is None:
        return
    line, rim = 0.8 + 2.0 * unit, 0.7 + 0.8 * unit
    sigma = 0.5 + 0.6 * line
    margin = math.ceil(3 * sigma)
    x0, y0 = max(extent[0] - margin, 0), max(extent[1] - margin, 0)
    x1, y1 = min(extent[2] + margin, mask.width), min(extent[3] + margin, mask.height)
    mask = mask.crop((x0, y0, x1, y1))
    # Blurred, a straight edge is the normal distribution's integral: level by level that tells the
    # distance to the edge, positive inside.
    soft = mask.filter(ImageFilter.GaussianBlur(sigma))
    steps = np.linspace(-4, 4, 2001)
    integral = 0.5 * (1 + np.array([math.erf(step / math.sqrt(2)) for step in steps]))
    distance = sigma * np.interp(np.arange(256) / 255, integral, steps)
    # A blurred hairline looks as if it were outside itself.
    inside, outside = np.maximum(distance, 0.25), np.minimum(distance, 0.0)

    def layer(alpha: Callable[[NDArray[Any]], NDArray[Any]], floor: float) -> PIL.Image.Image:
        tables = [np.rint(255 * alpha(d)) for d in (inside, outside)]
        tables[0] = np.maximum(tables[0], round(255 * floor))
        within, beyond = (soft.point(table.astype(int).tolist()) for table in tables)
        return PIL.Image.composite(within, beyond, mask)

    def step(distances: NDArray[Any]) -> NDArray[Any]:
        return np.clip(distances + 0.5, 0.0, 1.0)

    canvas.paste(_WHITE, (x0, y0), layer(lambda d: step(d + rim) * (1 - step(d)), 0.0))
    canvas.paste(ink, (x0, y0), layer(lambda d: step(d) * step(line - d), TINT))


def _draw_box(canvas: PIL.Image.Image, box: NDArray[Any], ink: Colour, unit: float) -> None:
    """Draw a frame between white rims, all of it inside the box."""
    draw = ImageDraw.Draw(canvas)
    rim, core = max(1, round(0.7 + 0.8 * unit)), max(1, round(0.8 + 2.0 * unit))
    stroke = core + 2 * rim
    # Far corners are brought near, where they are as invisible and cannot overflow.
    low = np.clip(box[:2], -stroke, np.array(canvas.size) + stroke)
    high = np.clip(box[2:], -stroke, np.array(canvas.size) + stroke)
    x0, y0 = np.rint(low).astype(int).tolist()
    x1, y1 = np.maximum(np.rint(high).astype(int), np.rint(low).astype(int) + stroke).tolist()
    for inset, width, fill in ((0, stroke, _WHITE), (rim, core, ink)):
        frame = (x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset)
        draw.rectangle(frame, outline=fill, width=width)


def _draw_click(
    canvas: PIL.Image.Image, at: tuple[float, float], label: int, rim: Colour, unit: float
) -> _Rect:
    """Draw a click: green with a plus for the object, red with a minus for background."""
    radius = round(3.6 + 8.5 * unit)
    side = 2 * radius + 3
    tile = PIL.Image.new("RGBA", (side * _SUPERSAMPLE,) * 2)
    draw = ImageDraw.Draw(tile)
    centre = (tile.width - 1) / 2

    def shape(half_width: float, half_height: float, fill: tuple[int, ...], disc: bool) -> None:
        w, h = half_width * radius * _SUPERSAMPLE, half_height * radius * _SUPERSAMPLE
        corners = (centre - w, centre - h, centre + w, centre + h)
        draw.ellipse(corners, fill) if disc else draw.rounded_rectangle(corners, min(w, h), fill)

    for share, fill in ((1.08, (*_DARK, 130)), (1.0, rim), (0.8, _CLICKS.get(label, _GREY))):
        shape(share, share, fill, disc=True)
    if label in _CLICKS:
        shape(0.48, 0.13, _WHITE, disc=False)
    if label == 1:
        shape(0.13, 0.48, _WHITE, disc=False)
    # Far clicks are brought near, where they are as invisible and cannot overflow.
    left = math.floor(min(max(at[0], -side), canvas.width + side)) - side // 2
    top = math.floor(min(max(at[1], -side), canvas.height + side)) - side // 2
    small = tile.reduce(_SUPERSAMPLE)
    canvas.paste(small, (left, top), small)
    return left, top, left + side, top + side


def _draw_label(
    canvas: PIL.Image.Image, text: str, ink: Colour, extent: _Rect, taken: list[_Rect], unit: float
) -> None:
    """Draw a text on a dark chip above or below a mask, where it covers the least of others."""
    size = round(9 + 13 * unit)
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    width, height = math.ceil(right - left + 1.75 * size), math.ceil(1.55 * size)
    if width > canvas.width or height > canvas.height:
        return  # too small an image for any text
    big = PIL.Image.new("RGBA", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    draw = ImageDraw.Draw(big)
    draw.rounded_rectangle((0, 0, big.width - 1, big.height - 1), 0.32 * big.height, (*_DARK, 222))
    dot, x, y = 0.26 * size * _SUPERSAMPLE, 0.72 * size * _SUPERSAMPLE, big.height / 2
    draw.ellipse((x - dot, y - dot, x + dot, y + dot), ink)
    chip = big.reduce(_SUPERSAMPLE)
    origin = (1.25 * size - left, (height - top - bottom) / 2)
    ImageDraw.Draw(chip).text(origin, text, fill=_WHITE, font=font)

    gap, step = round(2 + unit), height + round(2 + unit)
    x0 = min(max((extent[0] + extent[2] - width) // 2, 0), canvas.width - width)
    tops = [extent[1] - step, extent[3] + gap, extent[1] + gap, extent[1] - 2 * step]
    tops += [extent[1] + gap + k * step for k in range(1, 5)]
    places = [min(max(y0, 0), canvas.height - height) for y0 in tops]
    rects = [(x0, y0, x0 + width, y0 + height) for y0 in places]
    rect = min(rects, key=lambda r: sum(_shared(r, other) for other in taken))
    canvas.paste(chip, rect[:2], chip)
    taken.append(rect)


def _shared(a: _Rect, b: _Rect) -> int:
    """The area that two rectangles share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
