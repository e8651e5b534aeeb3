"""Feature maps that stay on the GPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...features import DeviceArray, Features
from ..kept import check_fork
from .memory import Block, Layout

if TYPE_CHECKING:
    from .pool import LanePool


class DeviceFeatures(Features):
    """One image's feature maps in a device block of their own.

    Args:
        block: where they lie.
        layout: how, finest map first.
        pool: whose lanes can copy them.
        device: DLPack's name of the device.
    """

    def __init__(
        self,
        block: Block,
        layout: Layout,
        pool: LanePool,
        device: tuple[int, int],
    ) -> None:
        self.block = block
        self.layout = layout
        self.pool = pool
        self._device = device
        self._process = os.getpid()

    @property
    def nbytes(self) -> int:
        """Memory they take, bytes."""
        return self.layout.nbytes

    @property
    def device(self) -> str:
        """Such as ``"cuda:0"``."""
        return f"cuda:{self._device[1]}"

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies in host memory, float32 [1, C, h, w] each, finest map first.

        Raises:
            StateError: the process was forked after they were made.
        """
        check_fork(self._process)
        host = np.empty(self.layout.nbytes, np.uint8)
        self.pool.run(lambda lane: lane.download(host, self.block))
        return tuple(slot.view(host).astype(np.float32) for slot in self.layout.slots.values())

    def arrays(self) -> tuple[DeviceArray, ...]:
        """The maps where they lie, in the type they have between the engines.

        Raises:
            StateError: the process was forked after they were made.
        """
        check_fork(self._process)
        self.block.mark_exported()
        return tuple(
            DeviceArray(
                self.block.address + slot.offset, slot.shape, slot.dtype, self._device, self.block
            )
            for slot in self.layout.slots.values()
        )
