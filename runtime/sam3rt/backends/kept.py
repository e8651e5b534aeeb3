"""What is made once and kept: a backend's graphs, and what follows from an image alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from ..errors import StateError
from ..features import Features

V = TypeVar("V")

# About 30 MB each for SAM 3, on top of the features' 21, for as long as a caller keeps those. Calls
# on more images in turn compute it anew, which takes an eighth to a third of a click's time.
KEPT_IMAGES = 16

CLOSED = "the model is closed: load it again"


def check_fork(process: int) -> None:
    """Refuse a process that was forked from the one that loaded a model.

    Args:
        process: the one that did.

    Raises:
        StateError: this is another. Threads and locks of the libraries below do not survive a fork.
    """
    if os.getpid() != process:
        raise StateError(
            f"the model was loaded in process {process} and inherited by a fork: load it after the "
            "fork, or start processes by spawn"
        )


class Once(Generic[V]):
    """A value that is made when it is first asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value: V | None = None
        self._is_closed = False

    def get(self, make: Callable[[], V]) -> V:
        """The value; one thread makes it while others wait.

        Raises:
            StateError: it is closed.
        """
        with self._lock:
            # A call may have begun before the model was closed.
            if self._is_closed:
                raise StateError(CLOSED)
            if self._value is None:
                self._value = make()
            return self._value

    @property
    def is_made(self) -> bool:
        """Whether the value is there."""
        return self._value is not None

    def close(self) -> None:
        """Let go of the value, and make none any more; callers keep theirs to their end."""
        with self._lock:
            self._is_closed, self._value = True, None


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
