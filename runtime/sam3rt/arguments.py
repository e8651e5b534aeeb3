"""Checks of single arguments, which name the argument, what came and what was expected."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from .errors import InvalidInputError


def number(argument: str, value: Any, least: float = -math.inf) -> float:
    """A finite number.

    Raises:
        InvalidInputError: it is none, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidInputError(argument, repr(value), "a number")
    expected = "a finite number" + (f" of at least {least:g}" if math.isfinite(least) else "")
    try:
        found = float(value)
    except OverflowError as error:
        raise InvalidInputError(argument, "a huge number", expected) from error
    if not math.isfinite(found) or found < least:
        raise InvalidInputError(argument, repr(value), expected)
    return found


def whole(argument: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from ``least`` to ``most``, or of at least ``least``.

    Raises:
        InvalidInputError: it is none, or not within them.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidInputError(argument, repr(value), "a whole number")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise InvalidInputError(argument, repr(value), expected)
    return int(value)


def flag(argument: str, value: Any) -> bool:
    """True or False: a text such as "no" would count as true, and an array is neither.

    Raises:
        InvalidInputError: it is neither, nor 1 or 0.
    """
    if isinstance(value, bool | np.bool_ | int | np.integer) and value in (0, 1):
        return bool(value)
    raise InvalidInputError(argument, repr(value), "True or False")


def instance(argument: str, value: Any, kind: type | UnionType, expected: str) -> None:
    """An object of a class, or of one of several.

    Raises:
        InvalidInputError: it is of another.
    """
    if not isinstance(value, kind):
        raise InvalidInputError(argument, type(value).__qualname__, expected)


@contextlib.contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Let errors of the block name arguments as the caller wrote them, by their names in it."""
    try:
        yield
    except InvalidInputError as error:
        error.rename(names.get(error.argument, error.argument))
        raise


def file_path(argument: str, value: Any) -> Path:
    """A path that can be one of a file.

    Raises:
        InvalidInputError: it is no text, empty, or holds a zero byte.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise InvalidInputError(argument, type(text).__qualname__, "a path, as text or a Path")
    # `Path("")` is the working folder.
    if text in ("", ".") or "\0" in text:
        raise InvalidInputError(argument, repr(text), "the path of a file")
    return Path(text)
