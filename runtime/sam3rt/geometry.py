"""From an image to the encoder's input, and from image coordinates to the input's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from .bundle import ImageSpec
from .errors import ImageError

Image = NDArray[np.uint8] | PIL.Image.Image

# The largest image that is taken: pixels in all, and along a side. Its masks take four times
# MAX_PIXELS bytes each as float32, so 3.2 GB for the three masks of an object. Programs that know
# their images may assign other values, as with Pillow's MAX_IMAGE_PIXELS.
MAX_PIXELS = 1 << 28
MAX_SIDE = 1 << 16

# Modes whose conversion to RGB keeps 8 bits per channel. Transparency is dropped, not blended:
# the model was trained on the colours, and the colours are what is under the alpha channel.
_CONVERTIBLE_MODES = frozenset(
    ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)


@dataclass(frozen=True)
class ImageGeometry:
    """Where an image lies in the encoder's input.

    Attributes:
        original_size: (height, width) of the image, pixels.
        input_size: (height, width) of the part of the encoder's input that the image fills.

    Raises:
        ImageError: a size is not two positive whole numbers, or the image is larger than
            :data:`MAX_PIXELS` or :data:`MAX_SIDE` allow.
    """

    original_size: tuple[int, int]
    input_size: tuple[int, int]

    def __post_init__(self) -> None:
        check_size(self.original_size)
        _check_sides(self.input_size, "input_size")

    def to_input(self, coords: NDArray[np.float32], normalize: bool) -> NDArray[np.float32]:
        """Map (x, y) coordinates to pixels of the encoder's input.

        Args:
            coords: float32 [..., 2], in image pixels, or in [0, 1] of the image if not
                ``normalize``.
            normalize: whether to divide by the image's size first.

        Returns:
            float32 [..., 2].
        """
        height, width = self.original_size
        size = np.array([width, height] if normalize else [1, 1], np.float32)
        mapped: NDArray[np.float32] = coords / size * np.array(self.input_size[::-1], np.float32)
        return mapped


def check_size(size: tuple[int, int], argument: str = "image") -> None:
    """Refuse an image that is empty or larger than :data:`MAX_PIXELS` and :data:`MAX_SIDE` allow.

    Args:
        size: (height, width), pixels.
        argument: what to call the image in error messages.

    Raises:
        ImageError: saying what the limit is and where it is set.
    """
    _check_sides(size, argument)
    height, width = size
    if height * width > MAX_PIXELS or max(size) > MAX_SIDE:
        raise ImageError(
            argument,
            f"{width} x {height} pixels",
            f"at most {MAX_PIXELS} pixels and {MAX_SIDE} along a side (MAX_PIXELS and MAX_SIDE of "
            "sam3rt.geometry, or --max-pixels)",
        )


def _check_sides(size: tuple[int, int], argument: str) -> None:
    sides = isinstance(size, tuple) and len(size) == 2 and all(isinstance(s, int) for s in size)
    if not sides or min(size) < 1:
        raise ImageError(argument, f"size {size!r}", "a height and width of at least one pixel")


def to_rgb(image: Any, argument: str = "image") -> NDArray[np.uint8]:
    """Check an image and return it as an RGB array.

    An EXIF orientation is not applied, as in the reference: coordinates refer to the pixels as
    stored. Use ``PIL.ImageOps.exif_transpose`` first where that is not what you want.

    Args:
        image: uint8 [H, W, 3] RGB, or a PIL image (palette, grey, CMYK and alpha modes are
            converted; alpha is dropped).
        argument: what to call it in error messages.

    Returns:
        uint8 [H, W, 3]; the caller's own array where it already is one.

    Raises:
        ImageError: anything else, naming what came; also more bits a channel, which Pillow would
            cut to 8, and images larger than :data:`MAX_PIXELS` or :data:`MAX_SIDE` allow.
    """
    if isinstance(image, PIL.Image.Image):
        check_size((image.height, image.width), argument)
        if _is_deep(image):
            raise ImageError(
                argument,
                f"an image of mode {image.mode!r} with more than 8 bits a channel",
                "8 bits a channel; convert it first, since scaling to 8 bits is your choice",
            )
        if image.mode == "RGB" or image.mode in _CONVERTIBLE_MODES:
            try:
                return np.asarray(image.convert("RGB") if image.mode != "RGB" else image)
            except Exception as error:  # Pillow decodes here; its plugins raise many classes
                raise ImageError(
                    argument, f"an image that cannot be read ({error})", "a readable image"
                ) from error
        raise ImageError(
            argument,
            f"an image of mode {image.mode!r}",
            "a mode that Pillow makes RGB of, such as RGB, RGBA, L, P or CMYK; convert it first"
            + (", since scaling to 8 bits is your choice" if image.mode != "LAB" else ""),
        )
    if not isinstance(image, np.ndarray):
        raise ImageError(
            argument,
            f"{type(image).__module__}.{type(image).__qualname__}",
            "a uint8 NumPy array [H, W, 3] or a PIL image",
        )
    if image.dtype != np.uint8:
        raise ImageError(
            argument, f"a {image.dtype} array", "uint8 with values 0..255 in RGB order"
        )
    if image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(argument, f"an array of shape {image.shape}", "[height, width, 3]")
    if 0 in image.shape:
        raise ImageError(argument, f"an array of shape {image.shape}", "at least one pixel")
    if np.ma.is_masked(image):
        raise ImageError(argument, "a masked array with masked pixels", "every pixel's colour")
    check_size((image.shape[0], image.shape[1]), argument)
    return np.asarray(image)


def _is_deep(image: PIL.Image.Image) -> bool:
    """Whether an image that Pillow has opened and not yet decoded has over 8 bits a channel.

    Pillow keeps the high bits of such colours without a word. Once it has decoded them, nothing
    tells that there were others.
    """
    for codec, _, _, given in getattr(image, "tile", None) or ():
        arguments = given if isinstance(given, tuple) else (given,)
        raw_mode, limit = arguments[0], arguments[1] if len(arguments) > 1 else 0
        # Without a byte order, ";16" stands for 16 bits a pixel.
        if isinstance(raw_mode, str) and raw_mode.endswith((";16B", ";16L", ";16N")):
            return True
        if codec.startswith("ppm") and isinstance(limit, int) and limit > 255:
            return True
        if codec == "SGI16" or (codec == "jpeg2k" and _bits_of_jpeg2000(image) > 8):
            return True
    return False


def _bits_of_jpeg2000(image: Any) -> int:
    """The most bits of a channel, by the codestream's header; 0 where none can be read."""
    try:
        before = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(before)
    except (AttributeError, OSError, ValueError):  # closed: whoever decodes it says so
        return 0
    start = content.find(b"\xff\x4f\xff\x51")
    channels = int.from_bytes(content[start + 40 : start + 42], "big") if start >= 0 else 0
    # Three bytes a channel; the first has its bits less one, and whether it is signed.
    return max((1 + (b & 127) for b in content[start + 42 :][: 3 * channels : 3]), default=0)


def geometry(spec: ImageSpec, original_size: tuple[int, int]) -> ImageGeometry:
    """Where an image of a given (height, width) lies in the encoder's input."""
    if spec.resize == "stretch":
        return ImageGeometry(original_size, spec.size)
    # ResizeLongestSide.get_preprocess_shape of SAM 1 and MobileSAM.
    scale = max(spec.size) / max(original_size)
    height, width = (max(1, int(side * scale + 0.5)) for side in original_size)
    return ImageGeometry(original_size, (height, width))


def preprocess(
    spec: ImageSpec, image: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], ImageGeometry]:
    """Resize, normalize and pad an RGB image.

    Pillow's bilinear filter widens when it shrinks, as torchvision's antialiased resize does;
    on 32-bit float planes it does not round either.

    Args:
        spec: the model's image rules.
        image: uint8 [H, W, 3].

    Returns:
        float32 [1, 3, height, width] of the spec's size, and where the image lies in it.
    """
    inside = geometry(spec, (image.shape[0], image.shape[1]))
    height, width = inside.input_size
    size = (width, height)
    bilinear = PIL.Image.Resampling.BILINEAR
    pixels = np.full((1, 3, *spec.size), spec.pad_value, np.float32)
    if spec.resize_dtype == "uint8":
        resized = PIL.Image.fromarray(np.ascontiguousarray(image)).resize(size, bilinear)
        planes = np.asarray(resized).transpose(2, 0, 1)
    else:
        planes = np.stack(
            [
                np.asarray(
                    PIL.Image.fromarray(image[..., channel].astype(np.float32)).resize(
                        size, bilinear
                    )
                )
                for channel in range(3)
            ]
        )
    filled = pixels[0, :, :height, :width]
    mean = np.array(spec.mean, np.float32)[:, None, None]
    std = np.array(spec.std, np.float32)[:, None, None]
    np.subtract(planes, mean, out=filled)
    np.divide(filled, std, out=filled)
    return pixels, inside


def rows_first(image: ImageGeometry) -> bool:
    """Whether Pillow 13 resizes an image's rows before its columns.

    It matters where intermediate values are rounded. Earlier versions always begin with the
    columns; since 13, rows go first where they lose more than twice as many as the columns do.
    """
    lost_rows, lost_columns = (
        before - after for before, after in zip(image.original_size, image.input_size, strict=True)
    )
    return lost_rows > max(0, 2 * lost_columns)
