"""The folder of a run's results: they appear together, and nothing of the user's is overwritten."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..bundle.files import name_file
from ..errors import InvalidInputError

RESULT = "result.json"
OVERLAY = "overlay.png"
_MASK = re.compile(r"mask_\d+\.png")


@contextmanager
def result_folder(target: Path, source: Path) -> Iterator[Path]:
    """A temporary folder whose files become those of ``target`` when the block succeeds.

    Where ``target`` holds the results of an earlier run, all of them are replaced, and everything
    else in it is left alone. ``result.json`` comes last: where it is, all results are.

    Args:
        target: folder for the results, which need not exist.
        source: the image, which is never overwritten.

    Raises:
        InvalidInputError: ``target`` is no folder, or holds a file that would be overwritten and
            is not from an earlier run.
        OSError: the folder cannot be made or written to; found before the block runs.
    """
    earlier = _earlier_results(target, source)
    exists = target.is_dir()
    made = [] if exists else _make_folders(target.parent)
    temporary = (target if exists else target.parent) / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        if exists:
            _replace(target, temporary, earlier)
        else:
            temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        name_file(error, target)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _earlier_results(target: Path, source: Path) -> set[str]:
    """The names of an earlier run's results in a folder."""
    if not target.is_dir():
        if target.exists() or target.is_symlink():
            raise InvalidInputError("--output", f"{target}, which is no folder", "a folder")
        return set()
    present = {
        path.name
        for path in target.iterdir()
        if path.name in (RESULT, OVERLAY) or _MASK.fullmatch(path.name)
    }
    ours = results_listed_in(target / RESULT)
    for name in sorted(present):
        if source.exists() and (target / name).exists() and source.samefile(target / name):
            raise InvalidInputError(
                "--output", f"{target}, whose {name} is the image itself", "another folder"
            )
    if foreign := sorted(present - ours):
        why = f" (no {RESULT} there lists it)" * (foreign[0] != RESULT)
        raise InvalidInputError(
            "--output",
            f"{target}, whose {foreign[0]} is not from an earlier run{why}",
            f"another folder, or this one without {', '.join(foreign)}",
        )
    return present


def results_listed_in(path: Path) -> set[str]:
    """The names that an earlier run's result.json accounts for, itself included."""
    try:
        document = json.loads(path.read_bytes())
        masks = {str(entry["file"]) for entry in document["masks"]}
        assert isinstance(document["model"]["fingerprint"], str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return set()
    return {RESULT, OVERLAY, *masks}


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the new ones, the deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
    return missing


def _replace(target: Path, temporary: Path, earlier: set[str]) -> None:
    new = {path.name for path in temporary.iterdir()}
    for name in sorted(earlier - (new - {RESULT})):
        (target / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: (name == RESULT, name)):
        (temporary / name).replace(target / name)
    temporary.rmdir()
