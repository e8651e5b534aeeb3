"""Reading image files, upright."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from . import geometry
from .errors import ImageError, InvalidInputError

# What Pillow decodes in this process. Others start a program (EPS: Ghostscript) or need a handler.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000", "PPM"),
    *("ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "PSD", "QOI"),
)
_ORIENTATION = 0x0112  # EXIF's tag
# Pillow's limit and the warnings' filters belong to the whole process.
_ONE_READER = threading.Lock()


def read_image(path: Path, content: BinaryIO | None = None) -> NDArray[np.uint8]:
    """Read an image file, upright, as uint8 [H, W, 3]. Calls from several threads take turns.

    Args:
        path: the file; only its name in messages where there is ``content``.
        content: the file's content, already open.

    Raises:
        ImageError: it is missing, cut, larger than :data:`sam3rt.geometry.MAX_PIXELS` or of a type
            that does not convert.
    """
    with _ONE_READER:
        return _read(path, path if content is None else content)


def load_image(image: str | os.PathLike[str] | geometry.Image, bgr: bool) -> NDArray[np.uint8]:
    """An image as uint8 [H, W, 3] RGB: a file's, upright, or one that is loaded, as it is.

    Args:
        image: a path, a PIL image or uint8 [H, W, 3].
        bgr: an array's channels are blue, green, red.

    Raises:
        ImageError: it cannot be read or used.
        InvalidInputError: ``bgr`` with anything but an array.
    """
    if bgr and not isinstance(image, np.ndarray):
        raise InvalidInputError("bgr", f"True with {type(image).__name__}", "False or an array")
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    rgb = geometry.to_rgb(image)
    return rgb[..., ::-1] if bgr else rgb


def _read(path: Path, source: Path | BinaryIO) -> NDArray[np.uint8]:
    pillows_limit = PIL.Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which play no part here
            PIL.Image.init()
            # Pillow refuses twice its limit, also for pictures within pictures.
            PIL.Image.MAX_IMAGE_PIXELS = max(1, geometry.MAX_PIXELS // 2)
            formats = [name for name in _FORMATS if name in PIL.Image.OPEN]
            with PIL.Image.open(source, formats=formats) as image:
                array = geometry.to_rgb(image, f"image {path}")
                return _upright(array, _orientation(image))
    except ImageError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(
            "image", f"{path}: {error}", f"at most {geometry.MAX_PIXELS} pixels, or --max-pixels"
        ) from error
    except MemoryError as error:
        raise ImageError("image", f"{path}: too large for this machine's memory", "less") from error
    except Exception as error:  # Pillow's plugins raise many classes on damaged files
        raise ImageError(
            "image", f"{path}: {error or type(error).__name__}", "a readable image file"
        ) from error
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = pillows_limit


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, 1 for upright. Nothing else is read, and nothing is written back."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata are no reason to refuse a picture
        return 1
    return orientation if isinstance(orientation, int) else 1


def _upright(array: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation; anything but 2 to 8 means upright."""
    turned = {
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array),
    }
    return np.ascontiguousarray(turned.get(orientation, array))
