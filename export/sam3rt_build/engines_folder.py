"""A bundle's folder of engines and typed graphs, into which one build at a time may write."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sam3rt.backends.table import ENGINES
from sam3rt.bundle import Bundle, is_inside
from sam3rt.bundle.files import remove_temporaries
from sam3rt.errors import BundleError

from .errors import BuildError

_LOCK = ".lock"


@contextlib.contextmanager
def exclusive(bundle: Bundle) -> Iterator[Path]:
    """The folder, for one build at a time. The lock ends with its process, however that ends.

    Raises:
        BundleError: the folder lies elsewhere, behind a link, where the runtime would not look.
        BuildError: another build is at work.
        OSError: it cannot be made or written to.
    """
    folder = bundle.path / ENGINES
    try:
        inside = is_inside(folder, bundle.path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
        raise BundleError(f"cannot be read: {error}", ENGINES) from error
    if not inside:
        raise BundleError("is a link that leaves the bundle", ENGINES)
    folder.mkdir(exist_ok=True)
    try:
        held = FileLock(folder / _LOCK).acquire(timeout=0)
    except Timeout as error:
        raise BuildError(f"another build is at work in {folder}") from error
    with held:
        _clear(folder)
        yield folder


def _clear(folder: Path) -> None:
    """Remove what a build left that was killed; the folder of engines is locked."""
    for path in [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()]:
        if path.name.startswith(".build-"):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # somebody else's; nothing reads them
                remove_temporaries(path)
