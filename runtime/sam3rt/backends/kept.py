"""What follows from an image alone, kept for the images that were used last."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from ..features import Features

V = TypeVar("V")

# About 30 MB each for SAM 3, on top of the features' 21, for as long as a caller keeps those. Calls
# on more images in turn compute it anew, which takes an eighth to a third of a click's time.
KEPT_IMAGES = 16


class Kept(Generic[V]):
    """A value for each of the images used last, for as long as their features live."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The one used last comes last. Features are compared by identity.
        self._values: WeakKeyDictionary[Features, V] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, features: Features, make: Callable[[], V]) -> V:
        """The value for an image's features; two threads may make it at once."""
        with self._lock:
            value = self._values.pop(features, None)
        if value is None:
            value = make()
        with self._lock:
            self._values[features] = value
            while len(self._values) > KEPT_IMAGES:
                self._values.pop(next(iter(self._values)), None)
        return value
