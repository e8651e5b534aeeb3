"""Folders that take long to make, kept between runs and shared by all workers of one run."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import filelock

ROOT = Path(__file__).resolve().parents[2]
# `pytest --cache-clear` empties it.
FOLDER = ROOT / ".pytest_cache" / "d" / "folders"
KEPT = 3


def python_files(*folders: str) -> list[Path]:
    """All Python sources under folders of the repository."""
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def key_of(files: Iterable[Path], libraries: Iterable[str]) -> str:
    """A hash of files' names and contents, and of the versions of Python and libraries."""
    digest = hashlib.sha256(sys.version.encode())
    for name in sorted(libraries):
        # A package's own word: ONNX Runtime is installed by several names.
        version = importlib.import_module(name).__version__
        digest.update(f"{name}=={version}\n".encode())
    for path in sorted(set(files)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(ROOT)} {content}\n".encode())
    return digest.hexdigest()[:16]


def cached_folder(
    name: str,
    key: str,
    make: Callable[[Path], object],
    meanwhile: Callable[[], object] = lambda: None,
) -> Path:
    """The folder that ``make`` fills, made only where no earlier call with the key has.

    Callers must not write into it. Folders of older keys are removed, except the latest few.

    Args:
        name: what the folder holds.
        key: :func:`key_of` everything that decides about the content.
        make: fills the empty folder that it is given.
        meanwhile: what to do while another process is making it.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = FOLDER / f"{name}-{key}"
    lock = filelock.FileLock(FOLDER / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        meanwhile()
        lock.acquire()
    try:
        if not folder.is_dir():
            unfinished = FOLDER / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
            found = sorted(FOLDER.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
            for old in found[:-KEPT]:
                shutil.rmtree(old)
    finally:
        lock.release()
    return folder
