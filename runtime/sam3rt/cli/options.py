"""Options and small parsers that several subcommands share."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..backends import BACKENDS

if TYPE_CHECKING:
    from ..model import SegmentationModel


def add_bundle_argument(parser: argparse.ArgumentParser, name: str = "bundle") -> None:
    """Add the bundle, which may be left out, by its place or as the option ``--bundle``."""
    parser.add_argument(
        name,
        nargs=None if name.startswith("--") else "?",
        type=named_path,
        metavar="BUNDLE",
        help="model's folder or name, see sam3rt models (default: the bundled MobileSAM)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model runs where."""
    parser.add_argument(
        "--backend",
        default="auto",
        help="what runs the graphs: auto (the default), " + ", ".join(sorted(BACKENDS)),
    )
    parser.add_argument(
        "--device",
        default="auto",
        help='"auto", "cpu", "cuda" or "cuda:N" (default: auto: CUDA where it works)',
    )
    parser.add_argument(
        "--precision",
        default="auto",
        help='what to compute in, such as "fp32"; backends differ in what they offer (default: '
        "auto: the fastest that proved itself here)",
    )
    parser.add_argument(
        "--threads", type=positive_int, help="CPU threads per operator (default: all cores)"
    )


def load_from_options(
    options: argparse.Namespace, *, check_files: bool = True
) -> SegmentationModel:
    """Load the model the options ask for."""
    from ..loading import load_model

    return load_model(
        options.bundle,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        precision=options.precision,
        check_files=check_files,
    )


def printable(text: str) -> str:
    """A line with control characters as their escapes, so that no file's name moves a cursor."""
    return "".join(
        character
        if character.isprintable() or "\ud800" <= character <= "\udfff"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def problem_of(error: BaseException) -> str:
    """What went wrong, in one sentence: an error of the system without its number."""
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({error})' if str(error) else ''}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = error.filename  # or a number, of a file that was open already
        return f"{name if isinstance(name, int) else os.fsdecode(name)}: {error.strerror}"
    return str(error) or type(error).__name__


def named_path(text: str) -> Path:
    """A path; not an empty one, which a variable that is not set leaves, and means the folder here.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def number(text: str) -> float:
    """A finite number."""
    (value,) = numbers(text, (1,), "a finite number")
    return value


def positive_int(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def numbers(text: str, counts: tuple[int, ...], form: str) -> list[float]:
    """Comma-separated finite numbers.

    Raises:
        argparse.ArgumentTypeError: saying which form was expected.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return values


def progress_printer() -> Callable[[str], None] | None:
    """Prints lines to standard error if a person is watching it."""
    if not sys.stderr.isatty():
        return None
    return lambda line: print(line, file=sys.stderr, flush=True)
