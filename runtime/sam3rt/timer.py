"""Timing hooks: how long each stage of a call takes, told to whoever listens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType

StageListener = Callable[[str, float], None]

_UNTIMED = contextlib.nullcontext()


class _Timed:
    """Tells a listener how long a block took, unless it raises."""

    def __init__(self, name: str, listener: StageListener) -> None:
        self._name = name
        self._listener = listener

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._listener(self._name, time.perf_counter() - self._start)


def timed(name: str, listener: StageListener | None) -> contextlib.AbstractContextManager[None]:
    """A block that is timed if somebody listens.

    Args:
        name: of the stage.
        listener: called with the name and the seconds, on the thread of the block.
    """
    return _UNTIMED if listener is None else _Timed(name, listener)
