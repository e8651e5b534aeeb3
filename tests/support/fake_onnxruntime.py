"""ONNX Runtime with a CUDA provider, on the fake GPU: real sessions on the CPU, under CUDA's rules.

What a run is given must be there when it begins, since ONNX Runtime's stream waits for no other. A
recorded graph keeps the sizes and addresses of its first run, which ONNX Runtime does not check but
these sessions do, and only one run may go on at a time. It is kept for the thread that recorded it,
to the session's end: threads that come and go would take memory, and replay nothing. So two threads
may run a session, and no third.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import onnxruntime as ort
import pytest
from tests.support.fake_cuda import CudaMisuse, FakeCuda
from tests.support.tensorrt_helpers import DRIVER, GPU

from sam3rt.backends.tensorrt.driver import Device

_Session = ort.InferenceSession


@dataclass
class FakeProvider:
    """The CUDA provider.

    Attributes:
        cuda: its GPU.
        asked: options of each session that was made or refused.
        records: whether graphs can be recorded.
        breaks: what the next run with this graph number raises.
        runs: the graph number of each run.
        recordings: the graph number of each run that was recorded.
    """

    cuda: FakeCuda = field(default_factory=FakeCuda)
    asked: list[dict[str, Any]] = field(default_factory=list)
    records: bool = True
    breaks: dict[str, Exception] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    recordings: list[str] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put it in the place of the real one, on a machine with one GPU."""
        device = Device(0, GPU, self.cuda.total, DRIVER, (13, 0))
        room = "sam3rt.backends.onnxruntime"
        patch.setattr(f"{room}.recipes._choose_gpu", lambda name: device)
        patch.setattr(f"{room}.lanes.Cuda", lambda index, blocking: self.cuda)
        patch.setattr(ort, "InferenceSession", self.open)

    def open(self, source: Any, options: Any, providers: list[Any]) -> Any:
        """What ``InferenceSession`` returns."""
        if providers[0] == "CPUExecutionProvider":
            return _Session(source, options, providers=providers)
        name, cuda = providers[0]
        assert name == "CUDAExecutionProvider"
        self.asked.append(cuda)
        if cuda.get("enable_cuda_graph") and not self.records:
            raise RuntimeError("This session cannot use the graph capture feature")
        real = _Session(source, options, providers=["CPUExecutionProvider"])
        return FakeSession(self, real, bool(cuda.get("enable_cuda_graph")))


class FakeSession:
    """A session of the fake provider."""

    def __init__(self, provider: FakeProvider, real: Any, records: bool) -> None:
        self._provider = provider
        self._real = real
        self._records = records
        self._recorded: dict[tuple[int, str], Any] = {}
        self._threads: set[int] = set()
        self._running = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self._real.io_binding(), self._provider.cuda)

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        self._provider.runs.append(number)
        if self._provider.cuda.current != self._provider.cuda.index:
            raise CudaMisuse("another thread's recording would break this run")
        broken = self._provider.breaks.pop(number, None)
        if broken is not None:
            raise broken
        if self._records:
            if not self._running.acquire(blocking=False):
                raise CudaMisuse("two runs at once of a session that records graphs")
            try:
                thread = threading.get_ident()
                self._threads.add(thread)
                if len(self._threads) > 2:
                    raise CudaMisuse("a third thread records everything again")
                time.sleep(0)
                key = thread, number
                if number != "-1" and key not in self._recorded:
                    self._recorded[key] = binding.bound
                    self._provider.recordings.append(number)
                if number != "-1" and self._recorded[key] != binding.bound:
                    raise CudaMisuse("a graph is replayed with other sizes or addresses")
                self._real.run_with_iobinding(binding.real, options)
            finally:
                self._running.release()
            return
        assert number == "-1"
        self._real.run_with_iobinding(binding.real, options)


class FakeBinding:
    """Inputs and outputs on the fake GPU, whose memory is the host's."""

    def __init__(self, real: Any, cuda: FakeCuda) -> None:
        self.real = real
        self.bound: dict[str, Any] = {}
        self._cuda = cuda

    def bind_input(self, name: str, *where: Any) -> None:
        self._bind(self.real.bind_input, name, *where)

    def bind_output(self, name: str, *where: Any) -> None:
        self._bind(self.real.bind_output, name, *where)

    def _bind(
        self, bind: Any, name: str, kind: str, index: int, dtype: Any, shape: Any, address: int
    ) -> None:
        assert (kind, index) == ("cuda", self._cuda.index)
        nbytes = dtype().itemsize
        for side in shape:
            nbytes *= side
        self._cuda.view(address, nbytes)
        self.bound[name] = (dtype, shape, address)
        bind(name, "cpu", 0, dtype, shape, address)
