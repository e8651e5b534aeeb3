"""What a service takes at most, and the options that say so. Imports nothing that takes time."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sam3rt.cli.options import positive_int

# The image that an instance of Triton decodes once before it is ready. No hash is like it.
WARM_UP = "warm-up"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait.

    Attributes:
        image_bytes: length of an image file.
        pixels: of an image.
        objects: in a request.
        points: of an object.
        mask_pixels: of all masks of a request together.
        waiting_images: images that may wait for the encoder.
        waiting_clicks: requests for masks that may wait for the decoder.
        seconds: time that a request has.
        session_bytes: memory for the low-resolution masks of all sessions.
    """

    image_bytes: int = 32 << 20
    pixels: int = 1 << 26
    objects: int = 64
    points: int = 256
    mask_pixels: int = 1 << 28
    waiting_images: int = 16
    waiting_clicks: int = 256
    seconds: float = 30.0
    session_bytes: int = 64 << 20


# Options by the limits that they set, and the bits that separate their units.
_OPTIONS = (
    ("--max-image-mb", "image_bytes", 20, "largest image file"),
    ("--max-pixels", "pixels", 0, "largest image"),
    ("--max-objects", "objects", 0, "objects in a request"),
    ("--max-points", "points", 0, "points of an object"),
    ("--max-waiting-images", "waiting_images", 0, "images that may wait for the encoder"),
    ("--max-waiting-clicks", "waiting_clicks", 0, "requests for masks that may wait"),
    ("--deadline", "seconds", 0, "seconds that a request has"),
)


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Declare what one request may ask for, and how many may wait."""
    for option, limit, bits, what in _OPTIONS:
        add_number(parser, option, int(getattr(Limits, limit)) >> bits, what)


def limits_from_options(options: argparse.Namespace) -> Limits:
    """What :func:`add_limit_options` declared."""
    given = {
        limit: getattr(options, option[2:].replace("-", "_")) << bits
        for option, limit, bits, _ in _OPTIONS
    }
    return Limits(**given)


def add_number(parser: argparse.ArgumentParser, name: str, default: int, what: str) -> None:
    """Declare an option that takes a positive whole number."""
    parser.add_argument(
        name, type=positive_int, default=default, metavar="N", help=f"{what} ({default})"
    )
