"""Reading image files, upright."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from . import geometry
from .arguments import flag
from .errors import ImageError, InvalidInputError

# What Pillow decodes in this process. Others start a program (EPS: Ghostscript) or need a handler.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000", "PPM"),
    *("ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "PSD", "QOI"),
)
_ORIENTATION = 0x0112  # EXIF's tag
# Pillow's limit belongs to the whole process.
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
        try:
            return _read(path, path if content is None else content)
        except ImageError as error:
            error.argument = "image"  # the message names the file, too
            raise


def load_image(image: str | os.PathLike[str] | geometry.Image, bgr: bool) -> NDArray[np.uint8]:
    """An image as uint8 [H, W, 3] RGB: a file's, upright, or one that is loaded, as it is.

    Args:
        image: a path, a PIL image or uint8 [H, W, 3].
        bgr: an array's channels are blue, green, red.

    Raises:
        ImageError: it cannot be read or used.
        InvalidInputError: ``bgr`` is neither true nor false, or true with anything but an array.
    """
    if flag("bgr", bgr) and not isinstance(image, np.ndarray):
        raise InvalidInputError("bgr", f"True with {type(image).__name__}", "False or an array")
    if isinstance(image, str | os.PathLike):
        return read_image(Path(os.fsdecode(image)))
    rgb = geometry.to_rgb(image)
    return rgb[..., ::-1] if bgr else rgb


def upright_rgb(image: PIL.Image.Image, argument: str = "image") -> NDArray[np.uint8]:
    """A picture as people see it, uint8 [H, W, 3]: its EXIF orientation is applied.

    Of the metadata, nothing but the orientation is read, and nothing is written back.

    Args:
        image: as opened; it is decoded here.
        argument: what to call it in error messages.

    Raises:
        ImageError: see :func:`sam3rt.geometry.to_rgb`.
    """
    array = geometry.to_rgb(image, argument)
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata are no reason to refuse a picture
        return array
    turned = {
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array),
    }
    upright = turned.get(orientation, array) if isinstance(orientation, int) else array
    return np.ascontiguousarray(upright)


def _read(path: Path, source: Path | BinaryIO) -> NDArray[np.uint8]:
    argument, pillows_limit = f"image {path}", PIL.Image.MAX_IMAGE_PIXELS
    try:
        PIL.Image.init()
        # Pillow refuses twice its limit, also for pictures within pictures.
        PIL.Image.MAX_IMAGE_PIXELS = max(1, geometry.MAX_PIXELS // 2)
        if source is path and path.is_fifo():  # nobody else could read meanwhile
            raise ImageError(argument, "a pipe", "a file")
        formats = [name for name in _FORMATS if name in PIL.Image.OPEN]
        with PIL.Image.open(source, formats=formats) as image:
            return upright_rgb(image, argument)
    except ImageError:
        raise
    except PIL.Image.DecompressionBombError as error:
        most = f"{geometry.MAX_PIXELS} (MAX_PIXELS of sam3rt.geometry, or --max-pixels)"
        raise ImageError(argument, "too many pixels", f"at most {most}") from error
    except MemoryError as error:
        raise ImageError(argument, "more pixels than memory holds", "a smaller one") from error
    except PIL.UnidentifiedImageError as error:
        known = "JPEG, PNG, WebP, TIFF or another format that Pillow decodes"
        raise ImageError(argument, "no image", known) from error
    except Exception as error:  # Pillow's plugins raise many classes on damaged files
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(argument, problem, "a readable image file") from error
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = pillows_limit
