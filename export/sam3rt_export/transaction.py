"""A folder that appears whole or not at all, even if processes die or two write the same one.

Files are written to a hidden folder beside the target, which takes the target's place when it is
finished. The writing process holds a lock on the hidden folder. The system releases that lock when
the process ends, even if it is killed. So the next export can tell folders in use from leftovers,
and removes the leftovers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where leftovers stay
    fcntl = None

_SUFFIX = ".tmp"
_OLD = ".old"
# renameat2 of Linux: exchange two names in one step.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, which is removed when the block ends.

    Parents are made, and removed again where nothing came of it. What earlier exports to the same
    target left when they were killed is removed.

    Raises:
        OSError: the parent cannot be made or written to.
    """
    made = _make_parents(target.parent)
    try:
        _remove_left_over(target)
        with _locked_folder(target) as folder:
            try:
                folder.chmod(0o755)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        raise


def commit(folder: Path, target: Path, *, replace: bool) -> None:
    """Put a finished folder in the target's place.

    Where there is one to replace, the two are exchanged in one step if the system can do that, so
    that the target is never absent.

    Args:
        folder: from :func:`new_folder`.
        target: its place.
        replace: whether to replace a folder that is there. An empty one is always replaced.

    Raises:
        OSError: it cannot be moved there, or something is there; that stays as it was.
    """
    if not (replace and target.exists()):
        try:
            _rename(folder, target)
            return
        except OSError:  # another process may have been faster
            if not (replace and target.exists()):
                raise
    if _exchange(folder, target):
        return  # what was there goes with the hidden folder
    # Between the two renames the target is absent, never half written.
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):  # another process may stand there by now
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Bring back what a process that died between two renames had moved away."""
    if not target.exists() and _old(target).is_dir():
        with contextlib.suppress(OSError):  # another process was faster
            _old(target).rename(target)


def _rename(folder: Path, target: Path) -> None:
    """Rename a folder, also onto an empty one."""
    try:
        folder.rename(target)
    except FileExistsError:  # Windows renames onto nothing that exists
        target.rmdir()
        folder.rename(target)


def _make_parents(parent: Path) -> list[Path]:
    """Make a folder and those above it; the new ones, outermost first."""
    missing = []
    while not parent.exists() and parent != parent.parent:
        missing.append(parent)
        parent = parent.parent
    made = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.append(folder)
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return made


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}{_OLD}")


def _remove_left_over(target: Path) -> None:
    """Remove the hidden folders of this target that no living process holds."""
    if fcntl is None:
        return
    for folder in _hidden_folders(target):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # somebody is at work in it
        finally:
            os.close(handle)
    if target.exists():
        shutil.rmtree(_old(target), ignore_errors=True)


def _hidden_folders(target: Path) -> list[Path]:
    prefix = f".{target.name}."
    return [
        entry
        for entry in target.parent.iterdir()
        if entry.name.startswith(prefix) and entry.name.endswith(_SUFFIX) and entry.is_dir()
    ]


@contextlib.contextmanager
def _locked_folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, locked by this process."""
    while True:
        folder = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent)
        )
        if fcntl is None:
            yield folder
            return
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for a leftover before it was locked
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not folder.exists():
                continue
            yield folder
            return
        finally:
            os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; ``False`` where the system or the file system cannot.

    Raises:
        OSError: it can, and failed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # an old C library
        return False
    ctypes.set_errno(0)
    status = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if status == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))
