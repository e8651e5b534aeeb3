"""Draw segmentation masks and the prompts that produced them over a photograph.

Everything is sized from the image, so that a 64 px thumbnail and an 8K frame both look right, and
everything is drawn in one fixed order: mask tints, mask outlines, boxes, clicks, score labels. What
the user asked for is therefore never hidden by what the model answered.

Pixel coordinates are continuous: the image spans ``[0, W] x [0, H]`` and the pixel in column ``i``
covers ``[i, i + 1)``.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

__all__ = ["PALETTE", "TINT_ALPHA", "draw_overlay", "mask_colour"]

Colour: TypeAlias = tuple[int, int, int]
Rect: TypeAlias = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

PALETTE: tuple[Colour, ...] = (
    (0, 132, 214),
    (240, 148, 0),
    (204, 95, 165),
    (240, 228, 66),
    (86, 196, 240),
    (213, 84, 0),
    (0, 158, 115),
)
"""RGB colours of the first masks: Okabe and Ito's colour-blind-safe set, slightly more saturated to
survive being mixed with a photograph. Vermilion and green come last because clicks use them."""

TINT_ALPHA = 0.45
"""Share of the mask's colour in a tinted pixel; the photograph keeps the rest."""

_WHITE: Colour = (255, 255, 255)
_DARK: Colour = (18, 20, 26)
_FOREGROUND: Colour = (22, 170, 82)
_BACKGROUND: Colour = (222, 42, 52)
_IGNORED: Colour = (138, 142, 150)
_CLICK_COLOURS: dict[int, Colour] = {1: _FOREGROUND, 0: _BACKGROUND, -1: _IGNORED}

_SUPERSAMPLE = 4
_MIN_FONT_PX = 7  # below this the digits of the built-in font run together
_TILE = 128  # rows and columns worked on at a time: small enough for the processor's cache


@dataclass(frozen=True)
class _Sizes:
    """Sizes in pixels of everything drawn on an image of a given size."""

    line: float  # coloured part of a mask outline
    rim: float  # white part of a mask outline
    click: int  # radius of a click, rim included
    font: int

    @classmethod
    def of_image(cls, height: int, width: int) -> "_Sizes":
        # Affine, not proportional: a thumbnail is seen closer to its pixels than an 8K frame is.
        # The geometric mean keeps strips (1 x 10000) from getting the strokes of a huge image.
        unit = math.sqrt(height * width) / 1000
        return cls(
            line=0.8 + 2.0 * unit,
            rim=0.7 + 0.8 * unit,
            click=round(3.6 + 8.5 * unit),
            font=round(9 + 13 * unit),
        )


@dataclass(frozen=True)
class _Anchor:
    """Where a mask's label may point to, in pixels."""

    centre: tuple[int, int]  # x, y of a pixel in the bulk of the mask
    extent: Rect  # the mask's extent along the centre's row and column


def mask_colour(index: int) -> Colour:
    """Return the RGB colour in which `draw_overlay` shows mask number ``index`` (from 0).

    Indices past the end of `PALETTE` reuse its hues in other shades, so that each mask still has a
    colour of its own.
    """
    base = PALETTE[index % len(PALETTE)]
    lap = index // len(PALETTE)
    # Multiples of the golden ratio never repeat, so neither do the shades.
    amount = 0.6 * (lap * 0.618034 % 1)
    target = 255 if lap % 2 else 0
    red, green, blue = (round(value + (target - value) * amount) for value in base)
    return red, green, blue


def draw_overlay(
    image: npt.NDArray[np.uint8],
    masks: npt.NDArray[np.bool_],
    *,
    scores: Sequence[float] = (),
    points: npt.NDArray[Any] | None = None,
    labels: npt.NDArray[Any] | None = None,
    boxes: npt.NDArray[Any] | None = None,
) -> Image.Image:
    """Draw masks, their scores and the prompts over an image.

    Args:
        image: uint8 ``[H, W, 3]``, RGB, with ``H`` and ``W`` at least 1.
        masks: bool ``[M, H, W]``; ``M`` may be 0. Mask ``i`` is drawn in ``mask_colour(i)``.
            Smaller masks are drawn over larger ones, so that nested masks all stay visible. A mask
            without a true pixel draws nothing, its score included.
        scores: One number per mask, or empty for no labels. Shown with three decimals near its
            mask; left out where the image is too small for readable text.
        points: float or integer ``[N, 2]``, ``x, y`` in pixels, given together with ``labels``.
        labels: integer ``[N]``: 1 foreground (green, plus), 0 background (red, minus), -1 ignored
            (grey).
        boxes: float or integer ``[K, 4]``, two opposite corners ``x0, y0, x1, y1`` in pixels.

    Points and boxes may lie partly or wholly outside the image; what is outside is not drawn.

    Returns:
        A new RGB image of ``W x H`` pixels. The arguments are not modified.

    Raises:
        ValueError: An argument has the wrong shape, dtype or count, or a coordinate is not finite;
            the message names the argument.
    """
    height, width = _check_image(image)
    _check_masks(masks, height, width)
    score_values = _check_scores(scores, len(masks))
    clicks = _check_clicks(points, labels)
    box_values = _check_coordinates("boxes", boxes, 4)

    sizes = _Sizes.of_image(height, width)
    pixels = np.array(image, order="C")
    anchors = _draw_masks(pixels, masks, sizes)
    canvas = Image.fromarray(pixels)
    _draw_boxes(canvas, box_values, sizes)
    occupied = _draw_clicks(canvas, clicks, sizes)
    if score_values:
        _draw_scores(canvas, score_values, anchors, occupied, sizes)
    return canvas


# --- arguments ------------------------------------------------------------------------------------


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    return type(value).__name__


def _check_image(image: object) -> tuple[int, int]:
    expected = "uint8 array of shape [H, W, 3] with H, W >= 1"
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] != 3
        or image.size == 0
    ):
        raise ValueError(f"image: got {_describe(image)}, expected {expected}")
    return image.shape[0], image.shape[1]


def _check_masks(masks: object, height: int, width: int) -> None:
    if (
        not isinstance(masks, np.ndarray)
        or masks.dtype != np.bool_
        or masks.ndim != 3
        or masks.shape[1:] != (height, width)
    ):
        raise ValueError(
            f"masks: got {_describe(masks)}, expected bool array of shape [M, {height}, {width}] "
            "(the height and width of image)"
        )


def _check_scores(scores: Sequence[float], mask_count: int) -> list[float]:
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError):
        raise ValueError(f"scores: got {scores!r}, expected a sequence of numbers") from None
    if values and len(values) != mask_count:
        raise ValueError(
            f"scores: got {len(values)} scores, expected {mask_count} (one per mask) or none"
        )
    return values


def _check_coordinates(name: str, array: object, columns: int) -> npt.NDArray[np.float64]:
    if array is None:
        return np.zeros((0, columns))
    if (
        not isinstance(array, np.ndarray)
        or array.dtype.kind not in "iuf"
        or array.ndim != 2
        or array.shape[1] != columns
    ):
        raise ValueError(
            f"{name}: got {_describe(array)}, expected float array of shape [N, {columns}]"
        )
    values = array.astype(np.float64)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"{name}: got {values[row].tolist()} in row {row}, expected finite coordinates"
        )
    return values


def _check_clicks(points: object, labels: object) -> list[tuple[float, float, int]]:
    coordinates = _check_coordinates("points", points, 2)
    if labels is None:
        if points is not None:
            raise ValueError("labels: got None, expected one label per point")
        return []
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"labels: got {_describe(labels)}, expected integer array of shape [N]")
    if len(labels) != len(coordinates):
        raise ValueError(
            f"labels: got {len(labels)} labels, expected {len(coordinates)} (one per point)"
        )
    unknown = sorted(set(labels.tolist()) - set(_CLICK_COLOURS))
    if unknown:
        raise ValueError(f"labels: got {unknown[0]}, expected only 1, 0 and -1")
    pairs = zip(coordinates.tolist(), labels.tolist(), strict=True)
    return [(x, y, label) for (x, y), label in pairs]


# --- masks ----------------------------------------------------------------------------------------


def _draw_masks(
    pixels: npt.NDArray[np.uint8], masks: npt.NDArray[np.bool_], sizes: _Sizes
) -> dict[int, _Anchor]:
    """Draw all masks on ``pixels`` in place; return the label anchors of the non-empty ones."""
    areas = [int(np.count_nonzero(mask)) for mask in masks]
    order = sorted((i for i, area in enumerate(areas) if area), key=lambda i: -areas[i])
    regions = {i: _bounds(masks[i]) for i in order}
    for i in order:
        _tint(pixels, masks[i], regions[i], mask_colour(i))
    # Outlines come after all tints: a tint over another mask's outline would wash it out.
    return {i: _outline(pixels, masks[i], regions[i], mask_colour(i), sizes) for i in order}


def _bounds(mask: npt.NDArray[np.bool_]) -> Rect:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _tint(
    pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], region: Rect, colour: Colour
) -> None:
    values = np.arange(256)[:, None] * (1 - TINT_ALPHA) + np.array(colour) * TINT_ALPHA
    tables = np.rint(values).astype(np.uint8).T.copy()
    for tile in _tiles(region):
        inside = mask[tile]
        if inside.any():
            for channel, table in enumerate(tables):
                target = pixels[tile][..., channel]
                np.copyto(target, table.take(target), where=inside)


def _tiles(region: Rect) -> Iterator[tuple[slice, slice]]:
    """Cut a rectangle into tiles; yield the rows and columns of each."""
    x0, y0, x1, y1 = region
    for top in range(y0, y1, _TILE):
        for left in range(x0, x1, _TILE):
            yield slice(top, min(top + _TILE, y1)), slice(left, min(left + _TILE, x1))


def _outline(
    pixels: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.bool_],
    region: Rect,
    colour: Colour,
    sizes: _Sizes,
) -> _Anchor:
    """Draw a coloured line just inside the mask's edge and a white one just outside it."""
    height, width = mask.shape
    margin = math.ceil(sizes.rim) + 2
    x0, y0 = max(region[0] - margin, 0), max(region[1] - margin, 0)
    x1, y1 = min(region[2] + margin, width), min(region[3] + margin, height)
    inset = _inset_from_border(mask, math.ceil(sizes.rim))[y0:y1, x0:x1]

    # Distances are smoothed, so those of a blended pixel's neighbours must be known as well.
    reach = math.ceil(max(sizes.line + 1.5, sizes.rim + 2.5))
    halo = reach + 2  # how far off a pixel of the mask can influence a tile
    padded = np.pad(inset, halo)  # what is off the image is outside the mask
    target = pixels[y0:y1, x0:x1]
    for rows, columns in _tiles((0, 0, x1 - x0, y1 - y0)):
        window = padded[rows.start : rows.stop + 2 * halo, columns.start : columns.stop + 2 * halo]
        if window.any() and not window.all():
            depth = _depth(window, reach)[halo:-halo, halo:-halo]
            _ink(target[rows, columns], depth, colour, sizes)
    return _anchor(inset, x0, y0)


def _ink(
    target: npt.NDArray[np.uint8],
    depth: npt.NDArray[np.float32],
    colour: Colour,
    sizes: _Sizes,
) -> None:
    """Draw the part of the outline that runs through a tile of the image, given its depths."""
    # Blending only the band around the edge keeps the cost down.
    band = (depth > -sizes.rim - 0.5) & (depth < sizes.line + 0.5)
    distance = depth[band]
    blended = target[band].astype(np.float32)
    for start, end, ink in ((-sizes.rim, 0.5, _WHITE), (0.0, sizes.line, colour)):
        # How much of a one-pixel-wide step around `distance` lies between start and end.
        coverage = np.clip(distance - start + 0.5, 0, 1) * np.clip(end - distance + 0.5, 0, 1)
        blended += (np.array(ink, dtype=np.float32) - blended) * coverage[:, None]
    target[band] = np.rint(blended).astype(np.uint8)


def _inset_from_border(mask: npt.NDArray[np.bool_], distance: int) -> npt.NDArray[np.bool_]:
    """Pull the mask off the image border, so that its outline closes inside the image.

    Without this the white line would be cut away along the border, and the outline of a mask that
    leaves the frame would look torn.
    """
    height, width = mask.shape
    distance = min(distance, (min(height, width) - 1) // 4)
    inset = np.zeros_like(mask)
    inner = np.s_[distance : height - distance, distance : width - distance]
    inset[inner] = mask[inner]
    return inset if inset.any() else mask  # a sliver along the border must not vanish


def _depth(window: npt.NDArray[np.bool_], reach: int) -> npt.NDArray[np.float32]:
    """Return each pixel's distance to the mask's edge, positive inside; float32 [H, W], pixels.

    What lies further than ``reach`` is only known to do so. Within ``reach + 2`` of the window's
    border nothing is known, for want of the pixels beyond it.
    """
    edge = window & ~_eroded(window)
    # Squares of whole numbers, in the narrowest type that holds them, are exact and fast.
    far = reach**2 + 1
    squared = np.where(edge, 0, np.full((), far, dtype=np.min_scalar_type(far + reach**2)))
    squared = _spread(_spread(squared, reach).T.copy(), reach).T
    distance = np.sqrt(squared, dtype=np.float32)
    # Edge pixels are the outermost ones inside: the edge itself runs half a pixel further out.
    signed = np.where(window, distance + np.float32(0.5), np.float32(0.5) - distance)
    smooth = _smoothed(signed)  # rounds off the staircase of a binary mask
    # Smoothing must not push specks and hairlines out of the mask: they would be all white rim.
    return np.where(window, np.maximum(smooth, np.float32(0.25)), smooth)


def _eroded(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels whose eight neighbours all are in the mask."""
    rows = np.zeros_like(mask)
    rows[1:-1] = mask[:-2] & mask[1:-1] & mask[2:]
    result = np.zeros_like(mask)
    result[:, 1:-1] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return result


def _spread(costs: npt.NDArray[Any], reach: int) -> npt.NDArray[Any]:
    """Return for each pixel the least ``cost + steps**2`` over the pixels of its column.

    Over the columns of an image that is 0 on the edge, then over the rows of the result, this makes
    squared distances to the edge.
    """
    least = costs.copy()
    for steps in range(1, min(reach, len(costs) - 1) + 1):
        offered = costs + costs.dtype.type(steps**2)
        np.minimum(least[steps:], offered[:-steps], out=least[steps:])
        np.minimum(least[:-steps], offered[steps:], out=least[:-steps])
    return least


def _smoothed(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Weigh each value 2 : 1 : 1 with its neighbours, along columns and then along rows."""
    columns = values.copy()
    columns[1:-1] = 0.5 * values[1:-1] + 0.25 * (values[:-2] + values[2:])
    result = columns.copy()
    result[:, 1:-1] = 0.5 * columns[:, 1:-1] + 0.25 * (columns[:, :-2] + columns[:, 2:])
    return result


def _anchor(mask: npt.NDArray[np.bool_], x0: int, y0: int) -> _Anchor:
    x, y = _centre(mask)
    row, column = np.flatnonzero(mask[y]), np.flatnonzero(mask[:, x])
    left, right = x0 + int(row[0]), x0 + int(row[-1]) + 1
    top, bottom = y0 + int(column[0]), y0 + int(column[-1]) + 1
    return _Anchor(centre=(x0 + x, y0 + y), extent=(left, top, right, bottom))


def _centre(mask: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Return x, y of the middle of the largest square that fits into a non-empty mask.

    It lies in the bulk of the mask, whatever specks the mask has elsewhere.
    """
    cell = 1
    while mask.size > 2**20:  # a label needs no better place than this gives it
        height, width = mask.shape[0] // 2 * 2, mask.shape[1] // 2 * 2
        pairs = mask[:height:2] & mask[1:height:2]
        halved = pairs[:, :width:2] & pairs[:, 1:width:2]
        if not halved.any():
            break
        mask, cell = halved, 2 * cell
    # `corners` are the pixels with a square of `side` in the mask to their right and below them.
    # Four such squares make one of up to twice the side: double it while that fits, then close in.
    corners, side, step, doubling = mask, 1, 1, True
    while step:
        pairs = corners[:-step] & corners[step:]
        larger = pairs[:, :-step] & pairs[:, step:]
        if larger.any():
            corners, side = larger, side + step
        else:
            doubling = False
        step = side if doubling else step // 2
    ys, xs = np.nonzero(corners)
    # A long mask holds many such squares: the one nearest to the middle of them all is taken.
    nearest = int(np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2))
    x, y = (int(corner[nearest]) * cell + side * cell // 2 for corner in (xs, ys))
    return x, y


# --- prompts --------------------------------------------------------------------------------------


def _draw_boxes(canvas: Image.Image, boxes: npt.NDArray[np.float64], sizes: _Sizes) -> None:
    """Draw each box as a green frame between white rims, all of it inside the box.

    Keeping the frame inside shows a box that spans the whole image in full.
    """
    draw = ImageDraw.Draw(canvas)
    rim, core = max(1, round(sizes.rim)), max(1, round(sizes.line))
    stroke = core + 2 * rim
    for box in boxes:
        x0, x1 = _span(box[0], box[2], stroke, canvas.width)
        y0, y1 = _span(box[1], box[3], stroke, canvas.height)
        for inset, thickness, ink in ((0, stroke, _WHITE), (rim, core, _FOREGROUND)):
            draw.rectangle(
                (x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset),
                outline=ink,
                width=thickness,
            )


def _span(a: float, b: float, stroke: int, size: int) -> tuple[int, int]:
    """Round one side of a box to pixels, at least a stroke long and not far outside the image."""
    # One stroke beyond the border is as invisible as a million pixels, and cannot overflow.
    low, high = (
        round(min(max(value, -stroke - 1), size + stroke + 1)) for value in (min(a, b), max(a, b))
    )
    return low, max(high, low + stroke)


def _draw_clicks(
    canvas: Image.Image, clicks: Iterable[tuple[float, float, int]], sizes: _Sizes
) -> list[Rect]:
    """Draw the clicks; return the rectangles that they cover."""
    tiles = {label: _click_tile(label, sizes.click) for label in _CLICK_COLOURS}
    covered: list[Rect] = []
    for x, y, label in clicks:
        tile = tiles[label]
        left, top = math.floor(x) - tile.width // 2, math.floor(y) - tile.height // 2
        rect = (left, top, left + tile.width, top + tile.height)
        if _overlap(rect, (0, 0, canvas.width, canvas.height)):
            canvas.paste(tile, (left, top), tile)
            covered.append(rect)
    return covered


def _click_tile(label: int, radius: int) -> Image.Image:
    """Return the RGBA picture of a click, of odd side length so that it has a central pixel."""
    side = 2 * (radius + 1) + 1
    tile = Image.new("RGBA", (side * _SUPERSAMPLE,) * 2)
    draw = ImageDraw.Draw(tile)
    centre = (tile.width - 1) / 2

    def disc(pixels: float, ink: tuple[int, ...]) -> None:
        r = pixels * _SUPERSAMPLE
        draw.ellipse((centre - r, centre - r, centre + r, centre + r), fill=ink)

    def bar(half_width: float, half_height: float) -> None:
        w, h = half_width * _SUPERSAMPLE, half_height * _SUPERSAMPLE
        draw.rounded_rectangle(
            (centre - w, centre - h, centre + w, centre + h), radius=min(w, h), fill=_WHITE
        )

    rim = max(1.0, radius * 0.2)
    disc(radius + max(0.6, radius * 0.06), (*_DARK, 130))  # sets the white rim off a white wall
    disc(radius, _WHITE)
    disc(radius - rim, _CLICK_COLOURS[label])
    # The sign tells the clicks apart for those who cannot tell green from red.
    if label >= 0:
        bar(radius * 0.48, radius * 0.13)
    if label == 1:
        bar(radius * 0.13, radius * 0.48)
    return tile.reduce(_SUPERSAMPLE)


# --- scores ---------------------------------------------------------------------------------------


def _draw_scores(
    canvas: Image.Image,
    scores: Sequence[float],
    anchors: dict[int, _Anchor],
    occupied: list[Rect],
    sizes: _Sizes,
) -> None:
    """Draw each mask's score where it covers the least of clicks, other labels and the mask."""
    texts = {i: _score_text(scores[i]) for i in sorted(anchors)}
    font_px = _fitting_font_px(texts.values(), canvas.size, sizes.font)
    if font_px is None:
        return
    font = ImageFont.load_default(size=font_px)
    taken = list(occupied)
    for i, text in texts.items():
        chip = _chip(text, mask_colour(i), font, font_px)
        candidates = _chip_places(anchors[i], chip.size, canvas.size, gap=round(sizes.rim) + 2)
        avoid = [*taken, anchors[i].extent]
        rect = min(candidates, key=lambda place: sum(_overlap(place, other) for other in avoid))
        canvas.paste(chip, rect[:2], chip)
        taken.append(rect)


def _score_text(score: float) -> str:
    # A stray logit of 1e30 must not make a label wider than the image.
    return f"{score:.3f}" if abs(score) < 1000 else f"{score:.3g}"


def _fitting_font_px(texts: Iterable[str], image_size: tuple[int, int], wanted: int) -> int | None:
    """Return the largest font size, up to ``wanted``, whose chips fit the image; None if none."""
    longest = max(texts, key=len, default="")
    for font_px in range(min(wanted, image_size[1]), _MIN_FONT_PX - 1, -1):
        width, height = _chip_size(longest, ImageFont.load_default(size=font_px), font_px)
        if width <= image_size[0] and height <= image_size[1]:
            return font_px
    return None


def _chip_size(text: str, font: Font, font_px: int) -> tuple[int, int]:
    left, _, right, _ = font.getbbox(text)
    return math.ceil(right - left + 1.75 * font_px), math.ceil(1.55 * font_px)


def _chip(text: str, colour: Colour, font: Font, font_px: int) -> Image.Image:
    """Return an RGBA label: a dark rounded chip with a dot of the mask's colour and the text."""
    width, height = _chip_size(text, font, font_px)
    big = Image.new("RGBA", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    draw = ImageDraw.Draw(big)
    corner = 0.32 * big.height
    draw.rounded_rectangle((0, 0, big.width - 1, big.height - 1), corner, fill=(*_DARK, 222))
    dot, dot_x, dot_y = 0.26 * font_px * _SUPERSAMPLE, 0.72 * font_px * _SUPERSAMPLE, big.height / 2
    draw.ellipse((dot_x - dot, dot_y - dot, dot_x + dot, dot_y + dot), fill=(*colour, 255))
    chip = big.reduce(_SUPERSAMPLE)

    left, top, _, bottom = font.getbbox(text)
    # Centring what is inked, not the line box: the latter leaves room for descenders.
    origin = (round(1.25 * font_px - left), round((height - top - bottom) / 2))
    ImageDraw.Draw(chip).text(origin, text, font=font, fill=(*_WHITE, 255))
    return chip


def _chip_places(
    anchor: _Anchor, size: tuple[int, int], image_size: tuple[int, int], gap: int
) -> list[Rect]:
    """Return where the label may go, best first, each moved to lie inside the image."""
    width, height = size
    x, y = anchor.centre
    x0, y0, x1, y1 = anchor.extent
    mid_x, mid_y = x - width // 2, y - height // 2
    above, below = y0 - gap - height, y1 + gap
    corners = [(mid_x, above), (mid_x, below), (x1 + gap, mid_y), (x0 - gap - width, mid_y)]
    # Nested masks often share an edge: then the labels stack up, outwards or into the mask.
    for step in range(1, 4):
        shift = step * (height + gap)
        corners += [(mid_x, above - shift), (mid_x, above + shift), (mid_x, below + shift)]
    places = []
    for left, top in corners:
        left = min(max(left, 0), image_size[0] - width)
        top = min(max(top, 0), image_size[1] - height)
        places.append((left, top, left + width, top + height))
    return places


def _overlap(a: Rect, b: Rect) -> int:
    """Return the area in pixels that two rectangles share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
