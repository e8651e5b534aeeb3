"""Many images' embeddings where the decoder runs, bounded by bytes, with an optional folder below.

On a CPU they lie in memory, on a GPU in the device's: a click moves no feature map. Whatever has
to leave for lack of room is what was used longest ago and is not in use. With a folder, every
embedding is also kept as a file, so that one that had to leave, or that another process made, is
loaded instead of encoded again. Processes on several machines may share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .arguments import whole
from .embedding import ImageEmbedding
from .errors import EmbeddingError, StateError
from .model import SegmentationModel

_LOG = logging.getLogger(__name__)
_SUFFIX = ".safetensors"


class CacheFullError(StateError):
    """Everything in a cache is in use, so that nothing can make room. Trying again later helps."""


@dataclass
class _Entry:
    embedding: ImageEmbedding
    pins: int = 0


@dataclass(frozen=True)
class CacheStatistics:
    """What a cache holds, and what became of its calls so far.

    Attributes:
        entries: embeddings held.
        bytes: memory that they take.
        hits: uses that were answered from memory.
        loads: uses that were answered from the folder.
        misses: uses that found nothing.
        evictions: embeddings that had to make room.
        folder_errors: files that could not be read or written.
    """

    entries: int = 0
    bytes: int = 0
    hits: int = 0
    loads: int = 0
    misses: int = 0
    evictions: int = 0
    folder_errors: int = 0


class EmbeddingCache:
    """Embeddings of one model by key. Every method is safe to call from threads.

    A key stands for one image for good: an embedding under a key that is taken is not stored again.

    Args:
        model: whose embeddings these are.
        max_bytes: memory that the embeddings may take.
        folder: where to keep them as files too, or ``None``. It is made where it is missing.
            Whoever can write to it decides what the masks are.
        max_folder_bytes: what the files may take; those used longest ago are removed.

    Raises:
        InvalidInputError: a bound is no positive whole number.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        model: SegmentationModel,
        max_bytes: int,
        folder: str | Path | None = None,
        max_folder_bytes: int = 1 << 36,
    ) -> None:
        self.max_bytes = whole("max_bytes", max_bytes, 1)
        self.max_folder_bytes = whole("max_folder_bytes", max_folder_bytes, 1)
        self._model = model
        self._folder: Path | None = None
        if folder is not None:
            # Other models' embeddings may lie beside them.
            self._folder = Path(folder) / model.manifest.fingerprint[:32]
            self._folder.mkdir(parents=True, exist_ok=True)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        # One load at a time, so that several uses of one key load it once.
        self._loading = threading.Lock()
        self._statistics = CacheStatistics()

    @contextlib.contextmanager
    def use(self, key: str) -> Iterator[ImageEmbedding | None]:
        """The embedding under a key, pinned for the length of the block.

        ``None`` where there is none. What is pinned does not leave the cache for lack of room, so
        that ``max_bytes`` bounds what is really in memory.

        Raises:
            CacheFullError: it lies in the folder, and all that is in memory is in use.
        """
        entry = self._pinned(key)
        try:
            yield None if entry is None else entry.embedding
        finally:
            if entry is not None:
                with self._lock:
                    entry.pins -= 1

    def add(self, key: str, embedding: ImageEmbedding) -> None:
        """Store an embedding, and make room for it.

        Raises:
            EmbeddingError: another bundle made it.
            StateError: it is larger than the cache.
            CacheFullError: all that is there is in use.
        """
        embedding = self._model.upload(embedding)
        with self._lock:
            self._insert(key, embedding)
        if self._folder is not None:
            self._save(self._file(key), embedding)

    def discard(self, key: str) -> bool:
        """Forget an embedding, here and in the folder; say whether there was one.

        Other processes that share the folder keep what they have in memory.
        """
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._count(entries=-1, bytes=-entry.embedding.nbytes)
        found = entry is not None
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._file(key).unlink()
                found = True
        return found

    def statistics(self) -> CacheStatistics:
        """What is held now, and what happened so far."""
        return self._statistics

    def _count(self, **changes: int) -> None:
        """Add to the statistics; the lock is held."""
        old = self._statistics
        self._statistics = replace(old, **{n: getattr(old, n) + v for n, v in changes.items()})

    def _pinned(self, key: str) -> _Entry | None:
        if (entry := self._held(key)) is not None:
            return entry
        if self._folder is None:
            with self._lock:
                self._count(misses=1)
            return None
        with self._loading:
            if (entry := self._held(key)) is not None:
                return entry
            embedding = self._load(self._file(key))
            with self._lock:
                if embedding is None:
                    self._count(misses=1)
                    return None
                entry = self._insert(key, embedding)
                entry.pins += 1
                self._count(loads=1)
                return entry

    def _held(self, key: str) -> _Entry | None:
        """What is in memory under a key, pinned."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                entry.pins += 1
                self._count(hits=1)
            return entry

    def _insert(self, key: str, embedding: ImageEmbedding) -> _Entry:
        """Store in memory; the lock is held."""
        if (entry := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
            return entry
        if embedding.nbytes > self.max_bytes:
            raise StateError(
                f"an embedding of {embedding.nbytes} bytes in a cache of {self.max_bytes} bytes"
            )
        excess = self._statistics.bytes + embedding.nbytes - self.max_bytes
        leaving = []
        for old, candidate in self._entries.items():
            if excess <= 0:
                break
            if not candidate.pins:
                leaving.append(old)
                excess -= candidate.embedding.nbytes
        if excess > 0:
            raise CacheFullError(
                f"no room for an embedding: all in the cache of {self.max_bytes} bytes are in use"
            )
        for old in leaving:
            freed = self._entries.pop(old).embedding.nbytes
            self._count(entries=-1, bytes=-freed, evictions=1)
        entry = self._entries[key] = _Entry(embedding)
        self._count(entries=1, bytes=embedding.nbytes)
        return entry

    # --- the folder -------------------------------------------------------------------------------

    def _file(self, key: str) -> Path:
        """A file's name says nothing of the key but its hash, so that any key makes a safe one."""
        assert self._folder is not None
        return self._folder / (hashlib.sha256(key.encode()).hexdigest() + _SUFFIX)

    def _load(self, path: Path) -> ImageEmbedding | None:
        if not path.is_file():
            return None
        try:
            embedding = self._model.load_embedding(path)
        except EmbeddingError as error:
            self._folder_error(error)
            # What cannot be read now, for lack of handles or of a right, may be whole.
            if not isinstance(error.__cause__, OSError):
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
        # It was used now; only its owner may say so.
        with contextlib.suppress(OSError):
            os.utime(path)
        return embedding

    def _save(self, path: Path, embedding: ImageEmbedding) -> None:
        """Write a file, and remove the oldest ones. A full disk loses nothing but this copy."""
        try:
            if not path.is_file():
                embedding.save(path)
            self._prune(path.parent)
        except OSError as error:
            self._folder_error(error)

    def _folder_error(self, error: Exception) -> None:
        _LOG.warning("an embedding's file: %s", error)
        with self._lock:
            self._count(folder_errors=1)

    def _prune(self, folder: Path) -> None:
        files = []
        for path in folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process removed it
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self.max_folder_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
