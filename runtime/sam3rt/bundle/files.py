"""Files: checks against what is on record, and writing that succeeds whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ..errors import BundleError

# The file that makes a folder a bundle.
MANIFEST = "bundle.json"
_BLOCK = 1 << 20
# Linux's names for a process's open files.
_HANDLES = Path("/proc/self/fd")
# The names of temporary files, and of nothing else.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """What is on record about a file.

    Attributes:
        file: its name inside its folder.
        sha256: hash of its content.
        bytes: its length.
    """

    file: str
    sha256: str
    bytes: int


def file_entry(path: Path) -> FileEntry:
    """Describe a file that is about to become part of a bundle.

    Raises:
        OSError: the file cannot be read.
    """
    return FileEntry(path.name, sha256_file(path), path.stat().st_size)


def check_file(folder: Path, entry: FileEntry) -> None:
    """Compare one file with what is on record about it.

    Args:
        folder: where it lies.
        entry: what it must be.

    Raises:
        BundleError: it is missing, not a plain file, or has another length or hash.
    """
    check_length(folder, entry)
    try:
        digest = sha256_file(folder / entry.file)
    except OSError as error:
        raise BundleError(f"cannot be read: {error}", entry.file) from error
    check_digest(digest, entry)


def read_file(folder: Path, entry: FileEntry) -> NDArray[np.uint8]:
    """Read a file into this process's own memory and compare what was read with the record.

    Unlike a mapped file, the content does not change when the file is exchanged or cut afterwards.

    Raises:
        BundleError: as :func:`check_file`, or there is not enough memory.
    """
    check_length(folder, entry)
    digest = hashlib.sha256()
    filled = 0
    try:
        content = np.empty(entry.bytes, np.uint8)
        view = content.data
        with (folder / entry.file).open("rb", buffering=0) as stream:
            while count := stream.readinto(view[filled : filled + _BLOCK]):
                digest.update(view[filled : filled + count])
                filled += count
            is_longer = bool(stream.read(1))
    except (OSError, MemoryError) as error:
        raise BundleError(f"cannot be read: {error}", entry.file) from error
    if filled != entry.bytes or is_longer:
        raise BundleError("changed its length while it was read", entry.file)
    check_digest(digest.hexdigest(), entry)
    return content


def check_digest(digest: str, entry: FileEntry) -> None:
    """Compare a file's hash with the one on record.

    Raises:
        BundleError: it is another one.
    """
    if digest != entry.sha256:
        raise BundleError(
            f"has SHA-256 {digest[:16]}..., the manifest says {entry.sha256[:16]}...: "
            "the file was changed or is from another export",
            entry.file,
        )


def check_length(folder: Path, entry: FileEntry) -> None:
    """The part of :func:`check_file` that opens nothing.

    Raises:
        BundleError: the file is missing, not a plain file, a link that leaves the folder, or has
            another length. A link of a hub's snapshot into that cache's own blobs is allowed.
    """
    path = folder / entry.file
    try:
        if path.is_symlink() and not (is_inside(path, folder) or _is_blob(path, folder)):
            raise BundleError(
                "is a link that leaves the bundle; copy the bundle with the files in place of "
                f"their links: cp -rL {folder} COPY",
                entry.file,
            )
        if not path.is_file():
            raise BundleError(f"is missing from the bundle {folder}", entry.file)
        length = path.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
        raise BundleError(f"cannot be read: {error}", entry.file) from error
    if length != entry.bytes:
        raise BundleError(
            f"has {length} bytes, the manifest says {entry.bytes}: "
            "the file is cut or from another export",
            entry.file,
        )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder when all links are followed.

    Raises:
        OSError, RuntimeError: links form a loop, or a folder may not be read.
    """
    return path.resolve().is_relative_to(folder.resolve())


def _is_blob(path: Path, folder: Path) -> bool:
    """Whether a file of a hub's snapshot lies among the blobs of the same repository.

    ``huggingface_hub`` keeps ``models--X/snapshots/REVISION/FILE`` as links to
    ``models--X/blobs/HASH``.
    """
    for parent in folder.resolve().parents:
        if parent.name == "snapshots":
            return path.resolve().parent == parent.parent / "blobs"
    return False


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
    try:
        handle = _open_unnamed(path.parent)
        named = handle is None
        if handle is None:
            # Unlike tempfile, which makes files that only their owner may read.
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if not named:
                # Given any folder, Python follows the link, which alone names such a file.
                os.link(f"{_HANDLES}/{handle}", temporary, src_dir_fd=handle)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # what went wrong first is said
            temporary.unlink(missing_ok=True)
        name_file(error, path)
        raise


def name_file(error: BaseException, path: Path) -> None:
    """Let an error of the system name what was written, not a temporary file or none at all."""
    if isinstance(error, OSError) and error.errno is not None:
        said = f"{error.filename}\n{error.filename2}"
        if error.filename is None or re.search(rf"{_TEMPORARY.pattern}$", said, re.MULTILINE):
            error.filename = str(path)
            del error.filename2


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
