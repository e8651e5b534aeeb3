"""Buffers of a lane: grown when more is needed, or at addresses that recorded runs keep."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .memory import Block, Memory, PinnedBuffer

# Calls after which a buffer is replaced by a smaller one, if none of them needed half of it.
_CALLS_BEFORE_SHRINKING = 64


class _Sized:
    """How large a buffer should be: as large as it has lately had to be.

    Attributes:
        nbytes: its size.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._peak = 0
        self._calls = 0

    def change(self, nbytes: int) -> bool:
        """Note what is needed; whether the buffer's size has changed."""
        self._peak = max(self._peak, nbytes)
        self._calls += 1
        wanted = max(self.nbytes, nbytes)
        if self._calls == _CALLS_BEFORE_SHRINKING:
            if self._peak <= self.nbytes // 2:
                wanted = self._peak
            self._peak = self._calls = 0
        changed = wanted != self.nbytes
        self.nbytes = wanted
        return changed


class GrowingBuffer:
    """Device and pinned memory that is replaced when more is needed, or lately much less was.

    Args:
        memory: gives it.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._block: Block | None = None
        self._block_size = _Sized()
        self._pinned: PinnedBuffer | None = None
        self._pinned_size = _Sized()

    def block(self, nbytes: int) -> Block:
        """Device memory of at least that size. Nothing may be queued that uses the last one."""
        if self._block_size.change(nbytes) or self._block is None:
            self._block = None
            self._block = self._memory.allocate(self._block_size.nbytes)
        return self._block

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory of that size."""
        if self._pinned_size.change(nbytes) or self._pinned is None:
            self._pinned = None
            self._pinned = self._memory.allocate_pinned(self._pinned_size.nbytes)
        return self._pinned.array[:nbytes]


class Workspace:
    """Device memory by name, whose addresses recorded runs keep.

    Args:
        memory: gives it.

    Attributes:
        generation: rises whenever something moves, which makes runs recorded before worthless.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._blocks: dict[str, Block] = {}
        self.generation = 0

    def fit(self, **sizes: int) -> None:
        """Have room for so many bytes under each name. The stream must be idle.

        Raises:
            BackendError: there is not enough device memory.
        """
        for name, nbytes in sizes.items():
            block = self._blocks.get(name)
            if block is None or block.nbytes < nbytes:
                self.generation += 1
                self._blocks.pop(name, None)
                del block
                self._blocks[name] = self._memory.allocate(max(1, nbytes))

    def __getitem__(self, name: str) -> Block:
        return self._blocks[name]
