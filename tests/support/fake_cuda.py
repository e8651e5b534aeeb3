"""A CUDA that really queues: device memory lies in host buffers, work runs late, misuse raises.

Nothing queued runs before it must, except at random: whatever is queued may run at any moment
from then on, in its stream's order. So code that reads a result before it has synchronized, or
reuses memory that a queued operation still needs, is caught sooner or later; most of it at once,
since every operation says what it reads and writes.
"""

from __future__ import annotations

import bisect
import contextlib
import random
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.support import cpu_kernels

from sam3rt.backends.tensorrt.cuda import Cuda, Kernels, out_of_memory
from sam3rt.backends.tensorrt.imaging import MASK_JOB, RESIZE_JOB, RESIZING
from sam3rt.errors import BackendError

_ALIGNMENT = 256
_POISON = 0xCB


class CudaMisuse(AssertionError):
    """Something a real GPU would answer with garbage, a crash or a hang."""


@dataclass(frozen=True)
class Region:
    """Part of device or host memory that an operation touches."""

    address: int
    nbytes: int
    writes: bool

    def overlaps(self, other: Region) -> bool:
        return (
            self.address < other.address + other.nbytes
            and other.address < self.address + self.nbytes
        )


@dataclass
class Operation:
    """One piece of queued work."""

    what: str
    regions: tuple[Region, ...]
    run: Callable[[], None]
    graph: int | None = None
    # What it reads on the host, and its checksum when it was queued.
    source: NDArray[np.uint8] | None = None
    checksum: int = 0
    # Keeps Python memory alive that the operation reads or writes.
    keep: Any = None


@dataclass
class Stream:
    pending: list[Operation] = field(default_factory=list)
    recording: list[Operation] | None = None
    recorder: int | None = None


def extents(job: np.void) -> Iterator[tuple[int, int]]:
    """Where the memory lies that a kernel's job names, and how much of it."""
    if "planes" in (job.dtype.names or ()):
        planes = int(job["planes"])
        low, high = (planes * int(np.prod(job[name])) for name in ("size", "target"))
        cleans = job["max_hole"] > 0 or job["max_sprinkle"] > 0
        sizes = {"logits": 4 * low, "masks": high}
        if cleans:
            sizes |= dict.fromkeys(("cleaned", "parents", "areas"), 4 * low)
    else:
        filled = job["filled"]
        sizes = {
            "image": 3 * int(np.prod(job["source"])),
            "pixels": 12 * int(np.prod(job["side"])),
            "spans": 8 * int(filled.sum()),
            "weights": 4 * int((filled * job["taps"]).sum()),
        }
    for name, nbytes in sizes.items():
        if nbytes:
            yield int(job[name]), nbytes


# The GPU that every thread of a test has as its current one, before and after each call.
CALLERS_GPU = 7


class FakeCuda(Cuda):
    """GPU 0, in place of the real one.

    Args:
        total: device memory, bytes.
        seed: of the moments at which queued work runs by itself.
    """

    def __init__(self, total: int = 4 << 30, seed: int = 0) -> None:
        self.index = 0
        self.lost = None
        # What a compiler does not take, as NVRTC would not where it is missing.
        self.compiles = True
        # Device memory is host memory, so that NumPy can read what is exported.
        self.dlpack_device = (1, 0)
        self.total = total
        self.used = 0
        self.log: list[tuple[str, int]] = []
        self.forbid_allocation = False
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._current = threading.local()
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._starts: list[int] = []
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self._streams: dict[int, Stream] = {}
        self._graphs: dict[int, list[Operation]] = {}
        self._modules: set[int] = set()
        self._next = 1000

    # What tests look at.

    @property
    def live(self) -> dict[str, int]:
        """How many of each kind of thing have not been given back."""
        return {
            "blocks": len(self._blocks),
            "pinned": len(self._pinned),
            "streams": len(self._streams),
            "graphs": len(self._graphs),
            "modules": len(self._modules),
        }

    def count(self, kind: str) -> int:
        return sum(entry[0] == kind for entry in self.log)

    @contextlib.contextmanager
    def no_allocation(self) -> Iterator[None]:
        self.forbid_allocation = True
        try:
            yield
        finally:
            self.forbid_allocation = False

    def view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Device memory as an array; refuses what was not allocated."""
        with self._lock:
            at = bisect.bisect_right(self._starts, address) - 1
            if at < 0:
                raise CudaMisuse(f"{address:#x} was never allocated")
            start = self._starts[at]
            block = self._blocks[start]
            offset = address - start
            if offset + nbytes > len(block):
                raise CudaMisuse(f"{nbytes} bytes at {offset} of a block of {len(block)}")
            return block[offset : offset + nbytes]

    @property
    def current(self) -> int:
        """The calling thread's current GPU."""
        return getattr(self._current, "gpu", CALLERS_GPU)

    # What the real one offers.

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before, self._current.gpu = self.current, self.index
        try:
            yield
        finally:
            self._current.gpu = before

    def allocate(self, nbytes: int) -> int:
        self._check_active()
        with self._lock:
            self._check_not_capturing("allocation")
            if self.forbid_allocation:
                raise CudaMisuse(f"{nbytes} bytes were allocated in the middle of a prompt")
            if nbytes <= 0:
                raise CudaMisuse(f"an allocation of {nbytes} bytes")
            if self.used + nbytes > self.total:
                raise out_of_memory(nbytes, self.total - self.used, self.total)
            raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
            shift = -raw.ctypes.data % _ALIGNMENT
            block = raw[shift : shift + nbytes]
            block[:] = _POISON
            address = int(block.ctypes.data)
            self._blocks[address] = block
            bisect.insort(self._starts, address)
            self.used += nbytes
            self.log.append(("allocate", nbytes))
            return address

    def free(self, address: int) -> None:
        self._check_active()
        with self._lock:
            self._check_not_capturing("freeing")
            if address not in self._blocks:
                raise CudaMisuse(f"{address:#x} is freed but not allocated")
            block = self._blocks[address]
            self._check_unused(Region(address, len(block), True), "freed")
            del self._blocks[address]
            self._starts.remove(address)
            self.used -= len(block)
            # Whoever still reads it reads nonsense.
            block[:] = _POISON

    def allocate_host(self, nbytes: int) -> NDArray[np.uint8]:
        self._check_active()
        with self._lock:
            self._check_not_capturing("allocation")
            if self.forbid_allocation:
                raise CudaMisuse(f"{nbytes} bytes were pinned in the middle of a prompt")
            array = np.full(nbytes, _POISON, np.uint8)
            self._pinned[array.ctypes.data] = array
            return array

    def free_host(self, address: int) -> None:
        self._check_active()
        with self._lock:
            if address not in self._pinned:
                raise CudaMisuse("host memory is freed but was not pinned")
            self._check_unused(Region(address, self._pinned[address].nbytes, True), "unpinned")
            del self._pinned[address]

    def create_stream(self) -> int:
        self._check_active()
        with self._lock:
            self._streams[self._number()] = Stream()
            return self._next

    def destroy_stream(self, stream: int) -> None:
        self._check_active()
        with self._lock:
            if self._stream(stream).pending:
                raise CudaMisuse("a stream with queued work is destroyed")
            del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        self._check_active()
        with self._lock:
            chosen = self._stream(stream)
            if chosen.recording is not None:
                raise CudaMisuse("a stream is synchronized while it records")
            self._run(chosen, len(chosen.pending))

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        self._check_contiguous(source)
        device = self.view(target, source.nbytes)
        flat = self._bytes(source)

        def run() -> None:
            device[:] = flat

        regions = (
            Region(target, source.nbytes, True),
            Region(source.ctypes.data, source.nbytes, False),
        )
        self.queue(stream, Operation("upload", regions, run, source=flat), source.nbytes)

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        self._check_contiguous(target)
        device = self.view(source, target.nbytes)
        flat = self._bytes(target)
        flat[:] = _POISON

        def run() -> None:
            flat[:] = device

        regions = (
            Region(source, target.nbytes, False),
            Region(target.ctypes.data, target.nbytes, True),
        )
        self.queue(stream, Operation("download", regions, run, keep=flat), target.nbytes)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        to, origin = self.view(target, nbytes), self.view(source, nbytes)

        def run() -> None:
            to[:] = origin

        regions = (Region(target, nbytes, True), Region(source, nbytes, False))
        self.queue(stream, Operation("copy", regions, run), nbytes)

    def begin_capture(self, stream: int) -> None:
        self._check_active()
        with self._lock:
            chosen = self._stream(stream)
            if chosen.recording is not None or chosen.pending:
                raise CudaMisuse("a capture begins on a stream that is busy")
            chosen.recording, chosen.recorder = [], threading.get_ident()

    def end_capture(self, stream: int) -> int:
        self._check_active()
        with self._lock:
            chosen = self._stream(stream)
            if chosen.recording is None:
                raise CudaMisuse("a capture ends that never began")
            recorded, chosen.recording, chosen.recorder = chosen.recording, None, None
            if any(operation.what == "uncapturable" for operation in recorded):
                raise BackendError("cudaStreamEndCapture failed: the capture was invalidated")
            self._graphs[self._number()] = recorded
            return self._next

    def launch(self, graph: int, stream: int) -> None:
        with self._lock:
            if graph not in self._graphs:
                raise CudaMisuse("a graph is launched that does not exist")
            operations = self._graphs[graph]
            for operation in operations:
                self.queue(stream, replace(operation, graph=graph), 0, log=False)
            self.log.append(("launch", len(operations)))

    def destroy_graph(self, graph: int) -> None:
        self._check_active()
        with self._lock:
            if any(o.graph == graph for s in self._streams.values() for o in s.pending):
                raise CudaMisuse("a queued graph is destroyed")
            del self._graphs[graph]

    # For the fake TensorRT.

    def load_kernels(self, source: str, names: Sequence[str], capability: str) -> Kernels:
        """The same source, compiled for the CPU."""
        self._check_active()
        if not self.compiles:
            raise BackendError("cuda-python has no NVRTC: No module named 'nvrtc'")
        library = cpu_kernels.load(source)
        assert all(hasattr(library, name) for name in names)
        with self._lock:
            module = self._number()
            self._modules.add(module)
        return Kernels(module, {name: (name, module) for name in names})

    def unload_kernels(self, module: int) -> None:
        self._check_active()
        with self._lock:
            self._modules.remove(module)

    def launch_kernel(
        self, kernel: tuple[str, int], blocks: int, threads: int, job: int, stream: int
    ) -> None:
        name, module = kernel
        dtype = RESIZE_JOB if name in RESIZING else MASK_JOB
        raw = self.view(job, dtype.itemsize)

        def run() -> None:
            if module not in self._modules:
                raise CudaMisuse(f"{name} runs after its module was unloaded")
            about = raw.view(dtype)[0]
            for address, nbytes in extents(about):
                self.view(address, nbytes)
            cpu_kernels.run(name, job)

        # What else it touches stands in the job, which may not be there yet.
        regions = (Region(job, dtype.itemsize, False),)
        self.queue(stream, Operation("kernel", regions, run), 0)

    def is_capturing(self, stream: int) -> bool:
        return self._stream(stream).recording is not None

    def queue(self, stream: int, operation: Operation, nbytes: int, log: bool = True) -> None:
        """Queue or record an operation, after checking it against what other streams do."""
        self._check_active()
        with self._lock:
            chosen = self._stream(stream)
            if chosen.recording is not None:
                if chosen.recorder != threading.get_ident():
                    raise CudaMisuse("another thread queues on a stream that records")
                chosen.recording.append(operation)
                return
            for other in self._streams.values():
                if other is not chosen:
                    self._check_race(operation, other)
            if operation.source is not None:
                operation = replace(operation, checksum=zlib.crc32(operation.source))
            chosen.pending.append(operation)
            if log:
                self.log.append((operation.what, nbytes))
            for candidate in self._streams.values():
                if candidate.pending and self._random.random() < 0.2:
                    self._run(candidate, self._random.randint(1, len(candidate.pending)))

    def _run(self, stream: Stream, count: int) -> None:
        for _ in range(count):
            operation = stream.pending[0]
            if operation.source is not None and zlib.crc32(operation.source) != operation.checksum:
                raise CudaMisuse("host memory was changed before its upload was done")
            operation.run()
            del stream.pending[0]

    def _check_race(self, operation: Operation, other: Stream) -> None:
        for pending in other.pending:
            for a in operation.regions:
                for b in pending.regions:
                    if a.overlaps(b) and (a.writes or b.writes):
                        raise CudaMisuse(
                            f"{operation.what} and {pending.what} touch the same memory at once"
                        )

    def _check_unused(self, region: Region, how: str) -> None:
        for stream in self._streams.values():
            for operation in (*stream.pending, *(stream.recording or ())):
                if any(region.overlaps(used) for used in operation.regions):
                    raise CudaMisuse(f"memory is {how} while a queued {operation.what} uses it")

    def _check_not_capturing(self, what: str) -> None:
        for stream in self._streams.values():
            if stream.recorder == threading.get_ident():
                raise CudaMisuse(f"{what} while this thread records a graph")

    def _check_active(self) -> None:
        if self.current != self.index:
            raise CudaMisuse("this thread has not made the GPU its current one")

    def _bytes(self, array: NDArray[Any]) -> NDArray[np.uint8]:
        """An array's memory. A graph has addresses of pinned memory: it keeps no owner alive."""
        flat = array.reshape(-1).view(np.uint8)
        for address, pinned in list(self._pinned.items()):
            offset = flat.ctypes.data - address
            if offset >= 0 and offset + flat.nbytes <= pinned.nbytes:
                return pinned[offset : offset + flat.nbytes]
        return flat

    @staticmethod
    def _check_contiguous(array: NDArray[Any]) -> None:
        if not array.flags.c_contiguous:
            raise CudaMisuse("a copy of an array that is not contiguous")

    def _stream(self, stream: int) -> Stream:
        if stream not in self._streams:
            raise CudaMisuse(f"there is no stream {stream}")
        return self._streams[stream]

    def _number(self) -> int:
        self._next += 1
        return self._next
