"""What the sections of the evidence share: settings, a file of figures as they come, and times."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam3rt.backends.tensorrt.cuda import Cuda
from sam3rt.backends.tensorrt.driver import Device, Gpu, probe
from sam3rt.bundle.files import atomic_write
from sam3rt_bench.document import Times
from sam3rt_bench.timing import Effort, alternate, summarize


@dataclass(frozen=True)
class Settings:
    """What a section is told.

    Attributes:
        work: a folder with the model, as ``bundle`` and ``checkpoint.pt``.
        device: ``"cuda"`` or ``"cpu"``.
        small: whether everything is cut down to what a CPU does in seconds.
        until: end of its time, as :func:`time.monotonic` counts.
    """

    work: Path
    device: str
    small: bool
    until: float

    @property
    def bundle(self) -> Path:
        """The model's bundle."""
        return self.work / "bundle"

    @property
    def checkpoint(self) -> Path:
        """The model's checkpoint."""
        return self.work / "checkpoint.pt"

    @property
    def seconds_left(self) -> float:
        """Until its time is over."""
        return self.until - time.monotonic()

    def gpu(self) -> tuple[Cuda, Device]:
        """The GPU, or on the CPU a fake one."""
        if self.device == "cpu":
            from tests.support.fake_cuda import FakeCuda

            fake = FakeCuda()
            return fake, Device(0, Gpu("fake", "8.9"), fake.total, "0", (13, 0))
        return Cuda(0), probe(0)


class Record:
    """Figures of one section, in a file that is whole at any moment.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures: dict[str, Any] = {}
        self._write()

    def put(self, name: str, value: Any) -> None:
        """Keep a figure: a number, a text, or a dict or list of such."""
        self._figures[name] = plain(value)
        self._write()

    def attempt(self, name: str, call: Any, *arguments: Any, **options: Any) -> Any:
        """Keep what a call returns, or how it failed.

        Returns:
            What it returned, or ``None``.
        """
        try:
            found = call(*arguments, **options)
        except Exception as error:  # whatever is wrong is a result; the next ones are tried
            self.put(name, {"failed": f"{type(error).__name__}: {error}"[:2000]})
            return None
        self.put(name, "passed" if found is None else found)
        return found

    def _write(self) -> None:
        with atomic_write(self._path) as stream:
            stream.write(json.dumps(self._figures, indent=1).encode())


def plain(value: Any) -> Any:
    """A value as JSON has it; numbers with five significant digits."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.5g}") if np.isfinite(value) else str(float(value))
    return str(value)


def times(call: Callable[[], Any], seconds: float, *, most: int = 200) -> dict[str, float]:
    """Median, 95th percentile and count of a call that waits for its own end, in milliseconds.

    Args:
        call: what is timed, after two calls that are not.
        seconds: after which no further call is made, once there are three.
        most: calls at most.
    """
    return _in_short(alternate({"call": call}, Effort(most, seconds, 2))["call"])


def device_times(call: Callable[[], Any], device: str, count: int = 20) -> dict[str, float]:
    """The same of work that a call queues, by the GPU's own clock; on the CPU by the host's."""
    if device == "cpu":
        return times(call, 0.2, most=count)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return _in_short(summarize(seconds))


def _in_short(found: Times) -> dict[str, float]:
    return {"median_ms": found.median_ms, "p95_ms": found.p95_ms, "count": found.count}
