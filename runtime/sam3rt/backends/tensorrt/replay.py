"""Work of fixed shapes and addresses, recorded as a CUDA graph once it has run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from ...errors import BackendError
from .cuda import Cuda
from .memory import Memory
from .network import Context

_LOG = logging.getLogger(__name__)


class Replay:
    """Queues the same work again and again.

    TensorRT wants a run before the recording, and a context of its own for each recording.

    Args:
        work: queues it; it runs the context and whatever stands around it.
        context: the context, with shapes and addresses set for good.
        cuda: the GPU.
        memory: gives the graph back.
        stream: the lane's stream.
        generation: of the lane's workspace that the addresses belong to.

    Attributes:
        generation: the same.
    """

    def __init__(
        self,
        work: Callable[[], None],
        context: Context,
        cuda: Cuda,
        memory: Memory,
        stream: int,
        generation: int,
    ) -> None:
        self._work = work
        self._context = context
        self._cuda = cuda
        self._memory = memory
        self._stream = stream
        self.generation = generation
        self._graph: int | None = None
        self._tried = False

    def queue(self) -> None:
        """Queue one run."""
        if self._graph is None:
            self._work()
        else:
            self._cuda.launch(self._graph, self._stream)

    def record(self) -> bool:
        """Make the graph, once. The stream must be idle and a run behind it.

        Returns:
            Whether this was the first run.
        """
        if self._tried:
            return False
        self._tried = True
        try:
            self._graph = self._capture()
        except BackendError as error:
            if self._cuda.lost is not None:
                raise
            _LOG.info("runs without a CUDA graph: %s", str(error))
            return True
        self._memory.give_back_after(self, self._cuda.destroy_graph, self._graph)
        return True

    def _capture(self) -> int:
        self._context.check_capturable(self._stream)
        self._cuda.begin_capture(self._stream)
        try:
            self._work()
        except BaseException:
            with contextlib.suppress(BackendError):
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        return self._cuda.end_capture(self._stream)
