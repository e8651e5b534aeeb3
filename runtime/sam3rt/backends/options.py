"""Where and how a bundle is to run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..arguments import flag, instance, whole
from ..errors import InvalidInputError

_DEVICE = re.compile(r"auto|cpu|cuda(?::\d{1,3})?")


@dataclass(frozen=True)
class GpuOptions:
    """How the backends use a GPU.

    Attributes:
        lanes: calls at a time, at most; each takes memory of its own.
        memory: bytes of device memory for embeddings and calls, at most; ``None`` for what there
            is. The engines' weights come on top.
        blocking: let threads sleep while they wait for the GPU, instead of keeping a core busy
            each; it holds for the whole process. For boards with few cores.

    Raises:
        InvalidInputError: an option makes no sense.
    """

    lanes: int = 4
    memory: int | None = None
    blocking: bool = False

    def __post_init__(self) -> None:
        whole("gpu.lanes", self.lanes, 1)
        if self.memory is not None:
            whole("gpu.memory", self.memory, 1)
        flag("gpu.blocking", self.blocking)


@dataclass(frozen=True)
class BackendOptions:
    """Where and how a bundle is to run. A backend pays no heed to what does not concern it.

    Attributes:
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        threads: CPU threads per operator; ``None`` leaves it to the backend.
        precision: ``"auto"``, or what the backend must compute in; see the backends.
        map_weights: see :func:`sam3rt.load_model`.
        gpu: how to use a GPU.

    Raises:
        InvalidInputError: an option makes no sense.
    """

    device: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    map_weights: bool = False
    gpu: GpuOptions = GpuOptions()

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise InvalidInputError(
                "device", repr(self.device), '"auto", "cpu", "cuda" or "cuda:N"'
            )
        if self.threads is not None:
            whole("threads", self.threads, 1)
        flag("map_weights", self.map_weights)
        instance("gpu", self.gpu, GpuOptions, "a GpuOptions or None")
        if not isinstance(self.precision, str):
            raise InvalidInputError(
                "precision", repr(self.precision), 'a name such as "auto" or "fp32"'
            )
