"""Files that appear whole or not at all, and hashes of files."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20
# Linux's names for a process's open files.
_HANDLES = Path("/proc/self/fd")
# The names of temporary files, and of nothing else.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, lower-case hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its place when the block succeeds.

    The content is flushed to disk before the rename, so that a crash leaves the old file or the
    new one. When the block raises, the temporary file is removed and ``path`` is untouched. On
    Linux the file has no name until it is whole, so that a process killed meanwhile leaves nothing.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    handle = _open_unnamed(path.parent)
    named = handle is None
    if handle is None:
        # Unlike tempfile, which makes files that only their owner may read.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if not named:
                # Given any folder, Python follows the link, which alone names such a file.
                os.link(f"{_HANDLES}/{handle}", temporary, src_dir_fd=handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files in a folder, of processes that were killed while they wrote.

    One that is writing there at this moment gets a FileNotFoundError, so this is for those who have
    locked the folder, or where the others can do without their file.

    Raises:
        OSError: the folder cannot be read or written to.
    """
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _open_unnamed(folder: Path) -> int | None:
    """A file that has no name yet, or ``None`` where the system has no such files.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None or not _HANDLES.is_dir():
        return None
    try:
        return os.open(folder, os.O_WRONLY | flag, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return None
        raise
