"""Images as strangers send them."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sam3rt.errors import ImageError
from sam3rt.image_files import upright_rgb

from .errors import TooLargeError

_FORMATS = ("JPEG", "PNG")


def content_id(content: bytes | NDArray[np.uint8]) -> str:
    """A name for an image file, or for uint8 [H, W, 3], that no other content has."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()


def read_image(content: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a JPEG or PNG file, upright.

    Args:
        content: the file's content.
        max_pixels: of the largest image that is decoded; larger ones are refused by their header.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: it is no such image, or a damaged one.
        TooLargeError: it has more pixels.
    """
    try:
        with PIL.Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return upright_rgb(image)
    except (ImageError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise TooLargeError(
            f"an image of too many pixels, at most {max_pixels} are taken"
        ) from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError("image", "another kind of file", "a JPEG or PNG file") from error
    except Exception as error:  # Pillow's plugins raise many classes on damaged files
        what = str(error) or type(error).__name__
        raise ImageError("image", what, "a JPEG or PNG file") from error
    raise TooLargeError(f"an image of {width} x {height}, at most {max_pixels} pixels are taken")
