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


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Declare what one request may ask for, and how many may wait."""
    for name, default, what in (
        ("--max-image-mb", Limits.image_bytes >> 20, "largest image file"),
        ("--max-pixels", Limits.pixels, "largest image"),
        ("--max-objects", Limits.objects, "objects in a request"),
        ("--max-points", Limits.points, "points of an object"),
        ("--max-waiting-images", Limits.waiting_images, "images that may wait for the encoder"),
        ("--max-waiting-clicks", Limits.waiting_clicks, "requests for masks that may wait"),
        ("--deadline", int(Limits.seconds), "seconds that a request has"),
    ):
        add_number(parser, name, default, what)


def limits_from_options(options: argparse.Namespace) -> Limits:
    """What :func:`add_limit_options` declared."""
    return Limits(
        image_bytes=options.max_image_mb << 20,
        pixels=options.max_pixels,
        objects=options.max_objects,
        points=options.max_points,
        waiting_images=options.max_waiting_images,
        waiting_clicks=options.max_waiting_clicks,
        seconds=float(options.deadline),
    )


def add_number(parser: argparse.ArgumentParser, name: str, default: int, what: str) -> None:
    """Declare an option that takes a positive whole number."""
    parser.add_argument(
        name, type=positive_int, default=default, metavar="N", help=f"{what} ({default})"
    )
