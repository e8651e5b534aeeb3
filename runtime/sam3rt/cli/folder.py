"""Many images: one after the other, resumable, and no failure stops the others."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..embedding import ImageEmbedding
from ..errors import InvalidInputError, Sam3rtError
from ..results import Segmentation
from .jobs import Job
from .options import printable, problem_of
from .output import OVERLAY, RESULT, result_folder
from .worker import Worker, read
from .writers import (
    ANNOTATIONS,
    CLASSES,
    FILES,
    as_json,
    coco_annotations,
    coco_document,
    mask_entries,
    write_pictures,
    write_text,
)

JOURNAL = "results.jsonl"
_JOURNAL_FORMAT = "sam3rt-results-1"

Entry = dict[str, Any]


class Journal:
    """The file ``results.jsonl``: a line for each image that is done, added when it is.

    Args:
        folder: where the results lie.
        form: their format, which cannot change.

    Attributes:
        entries: what is known of each image, by its path, once :meth:`compact` has read it.

    Raises:
        InvalidInputError: the folder holds results of another format, or files that are not ours
            under the names of ours.
    """

    def __init__(self, folder: Path, form: str) -> None:
        self._folder = folder
        self._path = folder / JOURNAL
        head = {"format": _JOURNAL_FORMAT, "output": form}
        lines = self._lines()
        if lines and lines[0] != head:
            what = lines[0].get("output") if lines[0].get("format") == _JOURNAL_FORMAT else None
            raise InvalidInputError(
                "--output",
                f"{folder}, whose {JOURNAL} is {f'of --format {what}' if what else 'not ours'}",
                "another folder",
            )
        for name in (ANNOTATIONS, CLASSES):
            if not lines and (folder / name).exists():
                raise InvalidInputError(
                    "--output",
                    f"{folder}, whose {name} is not from an earlier run (there is no {JOURNAL})",
                    "another folder",
                )
        self.entries: dict[str, Entry] = {}
        self._head = head

    def compact(self) -> None:
        """Write the file anew, with one line for each image, also those that others added."""
        added = {entry["image"]: entry for entry in self._lines()[1:]}
        self.entries = added | self.entries
        lines = (self._head, *self.entries.values())
        write_text(self._path, "".join(map(as_json, lines)))

    def _lines(self) -> list[Entry]:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        lines: list[Entry] = []
        for number, line in enumerate(content.splitlines()):
            try:
                entry = json.loads(line)
                whole = isinstance(entry, dict) and (not number or _is_entry(entry))
            except (ValueError, RecursionError):
                whole = False
            if whole:
                lines.append(entry)
            elif not number:
                return [{}]
        return lines

    def find(self, image: Path, key: str) -> Entry | None:
        """What an earlier run did of an image with the same prompts and settings."""
        entry = self.entries.get(str(image))
        if entry is None or entry.get("key") != key:
            return None
        there = all((self._folder / name).is_file() for name in entry["files"])
        return entry if there else None

    def claim(self, image: Path, path: Path) -> None:
        """Note that a file will be written, so that a run that goes on after a crash knows it.

        Raises:
            InvalidInputError: a file lies there that no earlier run wrote.
        """
        name = path.relative_to(self._folder).as_posix()
        if path.exists() and not any(name in entry["files"] for entry in self.entries.values()):
            raise InvalidInputError("--output", f"{path}, not from an earlier run", "a free name")
        self.add({"image": str(image), "key": "", "files": [name]})

    def add(self, entry: Entry) -> None:
        """Note an image that is done."""
        self.entries[entry["image"]] = entry
        with self._path.open("ab") as stream:
            stream.write(as_json(entry).encode())
            stream.flush()
            os.fsync(stream.fileno())


def _is_entry(line: dict[str, Any]) -> bool:
    image, files = line.get("image"), line.get("files")
    has_names = isinstance(files, list) and all(isinstance(name, str) for name in files)
    return isinstance(image, str) and has_names


def _is_of_another(entry: Entry, own: Container[str]) -> bool:
    path = Path(entry["image"])
    return "annotations" in entry and path.is_file() and os.path.realpath(path) not in own


class _Progress:
    """A line on standard error that tells a person how far things are."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._start, self._done = total, time.monotonic(), 0
        self._shown = not quiet and sys.stderr.isatty()

    def step(self, name: str, segmented: int) -> None:
        """One more image is done, of which so many took time."""
        self._done += 1
        if self._shown:
            each = (time.monotonic() - self._start) / max(1, segmented)
            left = each * (self._total - self._done)
            text = f"{self._done}/{self._total}, {each:.2f} s each, {left:.0f} s left: {name}"
            print(f"\r{printable(text)[:100]}\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave an empty line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def run_many(
    jobs: Sequence[Job],
    missing: Sequence[str],
    load: Callable[[argparse.Namespace], Worker],
    options: argparse.Namespace,
) -> int:
    """Segment images, and write what the format asks for.

    While an image is segmented and written, the next one is read and encoded.

    Args:
        jobs: the images.
        missing: sentences about images that are not there.
        load: makes what does the work, once it is known that the folder takes results.
        options: ``output``, ``format``, ``no_overlay``, ``quiet`` and ``json``.

    Returns:
        The exit status: 0, or 1 where an image failed.
    """
    journal = Journal(options.output, options.format)
    worker = load(options)
    options.output.mkdir(parents=True, exist_ok=True)
    journal.compact()  # a run that was killed may have left half a line
    names = list(dict.fromkeys(name for job in jobs for name in job.names))
    writer = _Writer(options, worker, journal, names)
    failures = list(missing)
    done: list[Entry] = []
    progress = _Progress(len(jobs), options.quiet or options.json)
    todo: list[tuple[Job, str]] = []

    def show(entry: Entry) -> None:
        if options.json:
            print(as_json(entry), end="", flush=True)

    for job in jobs:
        try:
            key = writer.key(job)
        except OSError as error:
            failures.append(problem_of(error))
            continue
        entry = journal.find(job.image, key)
        if entry is None:
            todo.append((job, key))
        else:
            done.append(entry)
            show(entry)
            progress.step(job.name, 0)
    before, start = len(done), time.monotonic()

    def prepare(job: Job) -> tuple[NDArray[np.uint8], ImageEmbedding | None]:
        image = read(job)
        worker.check(job, image)
        return image, worker.encode(image)

    with ThreadPoolExecutor(max_workers=1) as pool:
        current: Future[tuple[NDArray[np.uint8], ImageEmbedding | None]] | None = None
        upcoming = current
        try:
            for index, (job, key) in enumerate(todo):
                current = upcoming or pool.submit(prepare, job)
                upcoming = None
                try:
                    image, embedding = current.result()
                    if index + 1 < len(todo):
                        upcoming = pool.submit(prepare, todo[index + 1][0])
                    entry = writer.write(job, key, worker.segment(job, image, embedding))
                except (Sam3rtError, OSError, MemoryError) as error:
                    problem = problem_of(error).removeprefix(f"image {job.image}: ")
                    failures.append(f"{job.image}: {problem}")
                else:
                    done.append(entry)
                    show(entry)
                progress.step(job.name, index + 1)
        except KeyboardInterrupt:
            progress.clear()
            last = upcoming or current
            # What runs cannot be given up.
            waits = last is not None and last.running()
            stopping = "stopping once an image is encoded that was begun; " * waits
            rest = f"{len(done)} images are done: the same command again does the rest"
            print(f"{stopping}{rest}", file=sys.stderr, flush=True)
            raise
        finally:
            progress.clear()
            pool.shutdown(cancel_futures=True)
    writer.finish(done, jobs)
    for line in failures:
        print(f"sam3rt segment: failed: {printable(line)}", file=sys.stderr)
    if not options.quiet and not options.json:
        count = len(done) - before
        parts = [f"{count} image{'s' * (count != 1)} segmented"]
        parts += [f"{(time.monotonic() - start) / max(1, count):.2f} s each"] * bool(count)
        parts += [f"{before} done before"] * bool(before)
        parts += [f"{len(failures)} failed"] * bool(failures)
        print(f"{', '.join(parts)}; results in {printable(str(options.output))}")
    return 1 if failures else 0


class _Writer:
    """Writes one format, image by image, and what belongs to all of them at the end."""

    def __init__(
        self, options: argparse.Namespace, worker: Worker, journal: Journal, names: list[str]
    ) -> None:
        self._output: Path = options.output
        self._format: str = options.format
        self._overlay = not options.no_overlay
        self._worker, self._journal, self._names = worker, journal, names
        if self._format == "yolo":
            # Numbers of classes are in the files of earlier runs: new ones come after them.
            self._names = list(dict.fromkeys([*self._classes(), *names]))
            write_text(self._output / CLASSES, "".join(f"{name}\n" for name in self._names))

    def _classes(self) -> list[str]:
        path = self._output / CLASSES
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def key(self, job: Job) -> str:
        """What stands for an image, its prompts and all settings.

        Raises:
            OSError: the image is not there.
        """
        status = job.image.stat()
        classes = [self._names.index(name) for name in job.names] * (self._format == "yolo")
        parts = [
            *(job.name, job.names, classes, self._overlay and self._format == "png"),
            *(status.st_size, status.st_mtime_ns, self._worker.settings()),
            job.calls,
        ]
        return hashlib.sha256(as_json(parts).encode()).hexdigest()

    def write(self, job: Job, key: str, result: Segmentation) -> Entry:
        """Write an image's results and note them.

        Raises:
            InvalidInputError: a file that is not ours is in the way.
            OSError: a file cannot be written.
        """
        entry: Entry = {"image": str(job.image), "key": key}
        entry |= {"height": result.size[0], "width": result.size[1]}
        if self._format == "png":
            target = self._output / job.name
            with result_folder(target, job.image) as folder:
                entries = write_pictures(folder, result, self._overlay)
                overlay = OVERLAY if self._overlay else None
                document = self._worker.document(job, result, entries, overlay)
                write_text(folder / RESULT, as_json(document, 2))
                names = sorted(path.name for path in folder.iterdir())
            entry |= {"masks": entries, "files": [f"{job.name}/{name}" for name in names]}
        else:
            # These formats have one mask an object.
            best = result.best
            entry |= {"masks": mask_entries(best), "files": []}
            if self._format == "coco":
                entry["annotations"] = coco_annotations(best, job)
            else:
                pattern, encode = FILES[self._format]
                path = self._output / pattern.format(job.name)
                self._journal.claim(job.image, path)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, encode(best, job, path, self._names))
                entry["files"] = [path.relative_to(self._output).as_posix()]
        self._journal.add(entry)
        return entry

    def finish(self, done: Sequence[Entry], jobs: Sequence[Job]) -> None:
        """Write what belongs to all images: those done, and others' that are still there.

        Raises:
            InvalidInputError: the classes are numbered otherwise by now.
        """
        self._journal.compact()
        if self._format == "yolo" and self._classes()[: len(self._names)] != self._names:
            raise InvalidInputError(
                "--output",
                f"{self._output / CLASSES}, which another command changed meanwhile",
                "the same command again, which numbers its classes anew",
            )
        if self._format == "coco":
            own = {os.path.realpath(job.image) for job in jobs}
            others = [e for e in self._journal.entries.values() if _is_of_another(e, own)]
            entries = sorted([*done, *others], key=lambda entry: str(entry["image"]))
            write_text(self._output / ANNOTATIONS, as_json(coco_document(entries, self._names)))
