"""Which images are segmented, from which prompts: files, folders, patterns and ``prompts.jsonl``.

Each line of ``prompts.jsonl`` is one object, a JSON object with these keys:

    image   the image's path, looked for in the folders given, else beside the file, else here
    points  a list of [x, y], pixels of the upright image
    labels  for each point 1 (the object) or 0 (background); 1 for all unless given
    box     [x0, y0, x1, y1]
    name    what the object is, for formats with categories; "object" unless given

``image`` and at least one of ``points`` and ``box`` are there. Empty lines are passed over.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ..errors import InvalidInputError
from .options import problem_of
from .output import RESULT, results_listed_in

STDIN = "-"
DEFAULT_NAME = "object"
# What is taken from a folder; a file that is named is taken whatever it is called.
_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".dib"),
    *(".gif", ".avif", ".jp2", ".ppm", ".pgm", ".pnm"),
}
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)

Prompt = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One image and what is asked of it.

    Attributes:
        image: its path.
        name: its results' relative path, without a suffix.
        calls: for each decoder call ``point_coords``, ``point_labels`` and ``box``, as
            :class:`sam3rt.prompts.Prompts` takes them; none asks for everything in the image.
        names: what the objects are, in order; the last stands for all that follow.
    """

    image: Path
    name: str
    calls: tuple[Prompt, ...]
    names: tuple[str, ...] = (DEFAULT_NAME,)

    def name_of(self, number: int) -> str:
        """What an object is."""
        return self.names[min(number, len(self.names) - 1)]


@dataclass
class Images:
    """The images that were named, and the folders in which they were looked for.

    Attributes:
        files: path and name of each, in order.
        folders: where the names of ``prompts.jsonl`` are looked for.
        single: whether one file was named, as such.
        problems: a sentence for each folder that could not be read.
        passed_over: what else lies in the folders, by suffix or kind.
    """

    files: dict[Path, str] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    single: bool = False
    problems: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def others(self) -> str:
        """What was passed over, for people; empty where nothing was."""
        return ", ".join(f"{what} ({count})" for what, count in sorted(self.passed_over.items()))


def find_images(arguments: Sequence[str], output: Path) -> Images:
    """The images that arguments name: files, folders (with all below them) and patterns.

    Args:
        arguments: as they were typed.
        output: the folder for results, which is passed over.

    Raises:
        InvalidInputError: an argument is a URL or names nothing.
    """
    images = Images()
    output = output.resolve()
    for argument in arguments:
        if not argument:
            raise InvalidInputError("image", "an empty path", "a file, a folder or a pattern")
        path = Path(argument)
        if _URL.match(argument):
            raise InvalidInputError(
                "image",
                argument,
                "a file; nothing is downloaded here: curl -L URL | sam3rt segment - ...",
            )
        if argument == STDIN or not (path.is_dir() or glob.has_magic(argument)) or path.is_file():
            images.files[path] = path.stem if argument != STDIN else "stdin"
            images.folders.append(path.parent)
            continue
        if path.is_dir():
            base = path
            found = list(_images_below(path, output, images))
        else:
            parts = path.parts
            magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            base = Path(*parts[:magic])
            found = [p for p in base.glob("/".join(parts[magic:])) if _is_meant(p, base, output)]
        if not found and not images.problems:
            others = f", with nothing but {images.others()}" if images.passed_over else ""
            raise InvalidInputError(
                "image", f"{argument}{others}", "a folder or pattern with images"
            )
        images.folders.append(base)
        images.files |= {p: p.relative_to(base).with_suffix("").as_posix() for p in sorted(found)}
    images.single = len(arguments) == 1 and [Path(arguments[0])] == list(images.files)
    return images


def _images_below(folder: Path, output: Path, images: Images) -> Iterator[Path]:
    """A folder's images, but for hidden ones and results; ``images`` learns what else is there.

    Links to folders are not followed: they may lead round in circles, or to the whole disk.
    """

    def note(error: OSError) -> None:
        images.problems.append(problem_of(error))

    for root, folders, files in os.walk(folder, onerror=note):
        here = Path(root)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in folders if (here / name).resolve() != output]
        images.passed_over.update("links to folders" for n in folders if (here / n).is_symlink())
        ours = results_listed_in(here / RESULT) if RESULT in files else ()
        for name in files:
            suffix = Path(name).suffix.lower()
            if name.startswith(".") or name in ours:
                continue
            if suffix in _SUFFIXES:  # also a link that leads nowhere, which fails
                yield here / name
            else:
                images.passed_over[suffix or "without a suffix"] += 1


def _is_meant(path: Path, base: Path, output: Path) -> bool:
    """Whether what fits a pattern is no folder, neither hidden nor one of our results."""
    if any(part.startswith(".") for part in path.relative_to(base).parts) or path.is_dir():
        return False
    if base.resolve() in output.parents and path.parent.resolve().is_relative_to(output):
        return False
    return path.name not in results_listed_in(path.parent / RESULT)


class _Line(Struct, frozen=True, forbid_unknown_fields=True):
    image: str
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[Literal[0, 1], ...] | None = None
    box: tuple[float, float, float, float] | None = None
    name: str = DEFAULT_NAME


def read_prompts(path: Path, images: Images) -> tuple[list[Job], list[str], list[str]]:
    """The jobs of a ``prompts.jsonl``, one an image, in the order of their first lines.

    Args:
        path: the file, or ``-`` for standard input.
        images: those that were named; where there are any, others are passed over.

    Returns:
        The jobs, a sentence for each image that is not there, and sentences about images that are
        named or have a line, but not both.

    Raises:
        InvalidInputError: a line is malformed, or the file cannot be read.
    """
    try:
        text = sys.stdin.read() if str(path) == STDIN else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("--prompts", f"{path}: {error}", "a text file") from error
    lines = [
        _parse_line(line, f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), 1)  # JSON may hold other line ends
        if line.strip()
    ]
    if not lines:
        raise InvalidInputError("--prompts", f"{path}, without a line", "one line an object")
    # Last, names as results.jsonl and annotations.json have them.
    folders = [*(images.folders or [Path() if str(path) == STDIN else path.parent]), Path()]
    where = ", ".join(dict.fromkeys(map(str, folders)))
    # By what links lead to. Path.resolve would raise where they lead round in circles.
    named = {os.path.realpath(file): (file, name) for file, name in images.files.items()}
    asked: dict[str, tuple[tuple[Path, str], list[_Line]]] = {}
    missing, not_named = [], set()
    for line in lines:
        found = next((f / line.image for f in folders if (f / line.image).is_file()), None)
        if found is None:
            missing.append(f"{line.image}: not found in {where}")
        elif named and os.path.realpath(found) not in named:
            not_named.add(line.image)
        else:
            real = os.path.realpath(found)
            job = named.get(real, (found, _name_of(line.image)))
            asked.setdefault(real, (job, []))[1].append(line)
    jobs = [
        Job(file, name, tuple(map(_call, objects)), tuple(line.name for line in objects))
        for (file, name), objects in asked.values()
    ]
    without = f"images without a line in {path}: {len(named.keys() - asked)}"
    others = f"images with a line in {path} that are not among those given: {len(not_named)}"
    notes = [without] * (named.keys() > asked.keys()) + [others] * bool(not_named)
    return jobs, list(dict.fromkeys(missing)), notes


def _name_of(image: str) -> str:
    path = PurePath(image).with_suffix("")
    inside = not path.is_absolute() and ".." not in path.parts
    return path.as_posix() if inside else path.name


def _parse_line(text: str, where: str) -> _Line:
    known = _Line.__struct_fields__
    try:
        document = json.loads(text)
        for key in document if isinstance(document, dict) else ():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InvalidInputError(
                    "--prompts", f"{where}: the key {key!r}", f"{', '.join(known)}{hint}"
                )
        line = msgspec.convert(document, _Line)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(
            "--prompts", f"{where}: {error}", "a JSON object, one object of an image"
        ) from error
    if not line.points and line.box is None:
        raise InvalidInputError("--prompts", f"{where}: no prompt", '"points" or "box"')
    if line.labels is not None and len(line.labels) != len(line.points):
        raise InvalidInputError(
            "--prompts",
            f"{where}: {len(line.labels)} labels for {len(line.points)} points",
            "one label a point",
        )
    # In classes.txt a name is a line.
    if line.name.splitlines() != [line.name] or re.search("[\ud800-\udfff]", line.name):
        raise InvalidInputError("--prompts", f"{where}: the name {line.name!r}", "one line of text")
    return line


def _call(line: _Line) -> Prompt:
    call: Prompt = {}
    if line.points:
        call["point_coords"] = line.points
        call["point_labels"] = line.labels or [1] * len(line.points)
    if line.box is not None:
        call["box"] = line.box
    return call


def check_names(jobs: Sequence[Job]) -> None:
    """Refuse two images whose results would lie in one place.

    Raises:
        InvalidInputError: naming both.
    """
    taken: dict[str, Path] = {}
    for job in jobs:
        other = taken.setdefault(job.name, job.image)
        if other != job.image:
            raise InvalidInputError(
                "image", f"{other} and {job.image}", "images whose names differ before the suffix"
            )
