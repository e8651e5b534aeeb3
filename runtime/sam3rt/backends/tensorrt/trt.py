"""TensorRT's runtime API: the only module that touches its objects.

Only what exists in TensorRT 10.3, 10.16 and 11.4 and in TensorRT for RTX 1.7 is used; a test holds
this file to the names of each. Names that hold TensorRT's own objects begin with ``trt``, or with
``rtx`` where they are used with TensorRT for RTX alone.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...bundle.files import atomic_write
from ...errors import BackendError
from ..table import entry
from .sidecar import BackendName

_LOG = logging.getLogger(__name__)

# What TensorRT is given of an engine file at a time, bytes.
_CHUNK = 64 << 20

_DTYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Tensor:
    """One input or output of an engine.

    Attributes:
        name: its name.
        dtype: its type.
        is_input: whether it is read.
        shape: sizes; -1 for a dynamic axis.
        most: for an input, the greatest sizes that the engine takes.
    """

    name: str
    dtype: np.dtype[Any]
    is_input: bool
    shape: tuple[int, ...]
    most: tuple[int, ...]

    @classmethod
    def of_axes(
        cls,
        name: str,
        dtype: np.dtype[Any],
        is_input: bool,
        axes: tuple[int | str, ...],
        most: Mapping[str, int],
    ) -> Tensor:
        """A tensor of a graph that takes any size, held to the greatest of each named axis."""
        return cls(
            name,
            dtype,
            is_input,
            tuple(axis if isinstance(axis, int) else -1 for axis in axes),
            tuple(axis if isinstance(axis, int) else most.get(axis, 1) for axis in axes),
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this type and the given shape."""
        return int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize


class Library:
    """One flavour of TensorRT, imported. Ask the driver first: see :func:`.cuda.probe`.

    Args:
        flavour: which.

    Raises:
        BackendError: it is not installed, or its libraries cannot be loaded.
    """

    def __init__(self, flavour: BackendName) -> None:
        self.flavour = flavour
        known = entry(flavour)
        module = known.modules[0]
        try:
            self._trt = importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            raise BackendError(
                f"the {flavour} backend needs the Python module {module} ({error}): {known.hint}"
            ) from error
        self.version = str(self._trt.__version__)
        self._trt_logger, self._messages = _logger_of(self._trt)
        self._trt_runtime = self._trt.Runtime(self._trt_logger)
        if self._trt_runtime is None:
            raise BackendError(f"{flavour} {self.version} cannot start{self.said()}")

    def said(self) -> str:
        """What TensorRT last complained about, to end an error message with."""
        said = "; ".join(self._messages)
        self._messages.clear()
        return f": {said}" if said else ""

    def load(self, file: BinaryIO, name: str, kernels: KernelCache | None = None) -> Engine:
        """Load an engine.

        Args:
            file: the engine, open at its beginning. TensorRT 10.7 and newer read it in pieces;
                older versions get its whole content.
            name: what to call it in error messages.
            kernels: for TensorRT for RTX, where to keep what it compiles.

        Raises:
            BackendError: TensorRT refuses it.
        """
        reader = getattr(self._trt, "IStreamReaderV2", None)
        source = file.read() if reader is None else _make_reader(reader, file)
        trt_engine = self._trt_runtime.deserialize_cuda_engine(source)
        if trt_engine is None:
            raise BackendError(
                f"{self.flavour} {self.version} cannot load {name}{self.said()}; build it again "
                "on this machine"
            )
        if self.flavour == "tensorrt-rtx":
            return Engine(trt_engine, self, self._rtx_config(trt_engine, kernels))
        trt = self._trt
        return Engine(trt_engine, self, trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def _rtx_config(self, rtx_engine: Any, kernels: KernelCache | None) -> Any:
        """How contexts of an engine run in TensorRT for RTX."""
        rtx = self._trt
        rtx_config = rtx_engine.create_runtime_config()
        rtx_config.set_execution_context_allocation_strategy(
            rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # The default, LAZY, begins with kernels for any shape, which a CUDA graph would keep.
        rtx_config.dynamic_shapes_kernel_specialization_strategy = (
            rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if kernels is not None:
            kernels.attach(rtx_config)
        return rtx_config

    def tensors(self, trt_engine: Any) -> dict[str, Tensor]:
        """What an engine reads and writes, by name."""
        tensors = {}
        for index in range(trt_engine.num_io_tensors):
            name = str(trt_engine.get_tensor_name(index))
            kind = str(trt_engine.get_tensor_dtype(name)).rpartition(".")[2]
            if kind not in _DTYPES:
                raise BackendError(f"tensor {name} of an engine has type {kind}: build it again")
            is_input = trt_engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            shape = tuple(int(side) for side in trt_engine.get_tensor_shape(name))
            most = shape
            if is_input and -1 in shape:
                *_, greatest = trt_engine.get_tensor_profile_shape(name, 0)
                most = tuple(int(side) for side in greatest)
            tensors[name] = Tensor(name, np.dtype(_DTYPES[kind]), is_input, shape, most)
        return tensors


class Engine:
    """A loaded engine: weights on the device, shared by all its contexts.

    Args:
        trt_engine: TensorRT's own object.
        library: what loaded it.
        trt_configuration: what contexts are made with: a runtime configuration in TensorRT for
            RTX, an allocation strategy elsewhere.

    Attributes:
        tensors: what it reads and writes, by name.
    """

    def __init__(self, trt_engine: Any, library: Library, trt_configuration: Any) -> None:
        self._trt_engine = trt_engine
        self._library = library
        self._trt_configuration = trt_configuration
        self._lock = threading.Lock()
        self.tensors: Mapping[str, Tensor] = library.tensors(trt_engine)

    def context(self) -> Context:
        """A context for one shape at a time, without working memory of its own.

        Raises:
            BackendError: TensorRT cannot make one, for example for lack of memory.
        """
        with self._lock:
            trt_context = self._trt_engine.create_execution_context(self._trt_configuration)
        if trt_context is None:
            raise BackendError(
                f"{self._library.flavour} cannot create an execution context"
                f"{self._library.said()}; free device memory, or build engines with fewer "
                "objects at once (--max-objects)"
            )
        return Context(trt_context, self, self._library)


class Context:
    """One way of running an engine: shapes and addresses. Serves one stream at a time."""

    def __init__(self, trt_context: Any, engine: Engine, library: Library) -> None:
        self._trt_context = trt_context
        self._rtx_context = trt_context if library.flavour == "tensorrt-rtx" else None
        self._library = library
        # TensorRT needs the engine for as long as the context lives.
        self.engine = engine

    def set_scratch(self, address: int, nbytes: int) -> None:
        """Lend working memory, :meth:`scratch_bytes` or more, once the shapes are set.

        What runs at the same time must not share it.
        """
        self._trt_context.set_device_memory(address, nbytes)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Say how large an input is."""
        tensor = self.engine.tensors[name]
        if -1 in tensor.shape:
            self._require(self._trt_context.set_input_shape(name, shape), f"{name} of {shape}")

    def set_address(self, name: str, address: int) -> None:
        """Say where a tensor lies on the device."""
        if address % 256:
            raise BackendError(f"the address of {name} is not a multiple of 256")
        self._require(self._trt_context.set_tensor_address(name, address), f"the address of {name}")

    def shape(self, name: str) -> tuple[int, ...]:
        """The size of a tensor, once all inputs have theirs."""
        return tuple(int(side) for side in self._trt_context.get_tensor_shape(name))

    def scratch_bytes(self) -> int:
        """Working memory for the shapes that are set: less than the engine's greatest need."""
        return int(self._trt_context.update_device_memory_size_for_shapes())

    def check_capturable(self, stream: int) -> None:
        """Ask TensorRT for RTX whether a run may be recorded.

        Raises:
            BackendError: it may not.
        """
        if self._rtx_context is not None:
            self._require(self._rtx_context.is_stream_capturable(stream), "to be recorded")

    def enqueue(self, stream: int) -> None:
        """Queue one run.

        Raises:
            BackendError: TensorRT cannot.
        """
        self._require(self._trt_context.execute_async_v3(stream), "to run")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"{self._library.flavour} refuses {what}{self._library.said()}")


class KernelCache:
    """Kernels that TensorRT for RTX compiled for this GPU: shared by engines, kept in a file.

    The file begins with the SHA-256 of the rest. One that is damaged, or that TensorRT rejects as
    made for another GPU, driver or version, is ignored and replaced by the next :meth:`save`.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._rtx_cache: Any = None
        self._saved = b""

    def attach(self, rtx_config: Any) -> None:
        """Let contexts of a runtime configuration use the cache; the first one reads the file."""
        with self._lock:
            if self._rtx_cache is None:
                self._rtx_cache = rtx_config.create_runtime_cache()
                self._read()
            rtx_config.set_runtime_cache(self._rtx_cache)

    def save(self) -> None:
        """Write what was compiled, whole or not at all. A folder that is read-only does no harm."""
        with self._lock:
            if self._rtx_cache is None:
                return
            serialized = self._rtx_cache.serialize()
            if serialized is None:
                return
            content = bytes(serialized)
            digest = hashlib.sha256(content).digest()
            if digest == self._saved:
                return
            try:
                with atomic_write(self._path) as stream:
                    stream.write(digest + content)
            except OSError as error:
                _LOG.info("compiled kernels are not kept: %s", error)
            self._saved = digest

    def _read(self) -> None:
        try:
            raw = self._path.read_bytes()
        except OSError:
            return
        digest, content = raw[:32], raw[32:]
        if hashlib.sha256(content).digest() != digest:
            _LOG.warning("%s is damaged and is ignored", self._path)
        elif not self._rtx_cache.deserialize(content):
            _LOG.info("%s is of another GPU, driver or version and is ignored", self._path)
        else:
            self._saved = digest


def _make_reader(base: Any, file: BinaryIO) -> Any:
    """What TensorRT reads a file through, a chunk at a time."""

    class Reader(base):  # type: ignore[misc]
        """An error while reading looks like the file's end, which TensorRT reports."""

        def __init__(self) -> None:
            base.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            try:
                return file.read(min(num_bytes, _CHUNK))
            except OSError:
                return b""

        def seek(self, offset: int, where: Any) -> bool:
            origins = {"SET": io.SEEK_SET, "CUR": io.SEEK_CUR, "END": io.SEEK_END}
            origin = origins[str(where).rpartition(".")[2]]
            try:
                # An offset from the end counts backwards.
                file.seek(-offset if origin == io.SEEK_END else offset, origin)
            except OSError:
                return False
            return True

    return Reader()


# By module: a process has one logger, the first that TensorRT is given, which must never go away.
_loggers: dict[Any, tuple[Any, deque[str]]] = {}


def _logger_of(trt: Any) -> tuple[Any, deque[str]]:
    """The logger of a TensorRT module, and the last errors it was told."""
    if trt not in _loggers:
        messages: deque[str] = deque(maxlen=4)
        _loggers[trt] = (_make_logger(trt, messages), messages)
    return _loggers[trt]


def _make_logger(trt: Any, messages: deque[str]) -> Any:
    """A logger that hands TensorRT's messages to Python's and keeps the last errors."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG,
    }

    class PythonLogger(trt.ILogger):  # type: ignore[misc]
        """TensorRT calls ``log`` from its own threads."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            python_level = levels.get(level, logging.DEBUG)
            if python_level >= logging.ERROR:
                messages.append(message)
            _LOG.log(python_level, "%s", message)

    return PythonLogger()
