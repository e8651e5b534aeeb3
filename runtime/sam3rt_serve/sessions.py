"""What the objects of a session looked like last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Masks = Sequence[NDArray[np.float32] | None]


class Sessions:
    """The low-resolution masks of each session's last request, in bounded memory.

    Args:
        max_bytes: what all masks may take; sessions used longest ago are forgotten.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._masks: OrderedDict[tuple[str, str], list[NDArray[np.float32]]] = OrderedDict()

    def get(self, image_id: str, session: str | None, objects: int) -> Masks:
        """A mask for each object by its position, ``None`` where the last request had no such."""
        with self._lock:
            known = self._masks.get((image_id, session or ""), [])[:objects]
        return [*known, *[None] * (objects - len(known))]

    def put(self, image_id: str, session: str, masks: Sequence[NDArray[np.float32]]) -> None:
        """Keep each object's mask."""
        copies = [mask.copy() for mask in masks]  # a view would keep all masks of its run
        with self._lock:
            self._drop((image_id, session))
            self._masks[image_id, session] = copies
            self._bytes += sum(mask.nbytes for mask in copies)
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._masks)))

    def discard(self, image_id: str | None = None, session: str | None = None) -> None:
        """Forget all sessions on an image, or a session on all images."""
        with self._lock:
            for key in [key for key in self._masks if image_id == key[0] or session == key[1]]:
                self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        self._bytes -= sum(mask.nbytes for mask in self._masks.pop(key, ()))
