"""A module like ``tensorrt`` whose engines are ONNX graphs run by ONNX Runtime on fake memory.

An engine file is a JSON text: the path of the graph, the greatest size of each dynamic axis and
which types the engine has. Everything that TensorRT is strict about is checked: shapes within the
profile, addresses, working memory, a run before a recording, and recordings that die with a
changed context.

TensorRT for RTX has rules of its own: a runtime configuration, kernels that are compiled late
unless it says EAGER, memory that only an engine built for it leaves to the user, and a question to
ask before a recording.
"""

from __future__ import annotations

import enum
import hashlib
import json
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tests.support.fake_cuda import CudaMisuse, FakeCuda, Operation, Region

Perturbation = Callable[[dict[str, NDArray[Any]]], None]

_ORT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


def scratch_for(shapes: Iterable[tuple[int, ...]]) -> int:
    """Working memory of a run: some, and more for larger inputs."""
    return 4096 + 256 * max(max(shape, default=1) for shape in shapes)


class DataType(enum.Enum):
    FLOAT = np.float32
    HALF = np.float16
    INT32 = np.int32
    INT64 = np.int64
    UINT8 = np.uint8
    BF16 = None


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class SeekPosition(enum.Enum):
    SET = 0
    CUR = 1
    END = 2


class IStreamReaderV2:
    pass


def read_through(reader: Any) -> bytes:
    """An engine as TensorRT reads it: not from the beginning to the end."""
    assert reader.seek(0, SeekPosition.END)
    assert reader.read(1, 0) == b""
    assert reader.seek(0, SeekPosition.SET)
    head = bytes(reader.read(3, 0))
    assert reader.seek(-len(head), SeekPosition.CUR)
    content = b""
    while piece := reader.read(1 << 30, 0):
        content += piece
    return content


class RuntimeCache:
    """Kernels by their names; only those of this environment are taken."""

    ENVIRONMENT = "driver 580"

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps([self.ENVIRONMENT, sorted(self.kernels)]).encode()

    def deserialize(self, content: bytes) -> bool:
        environment, kernels = json.loads(content)
        if environment != self.ENVIRONMENT:
            return False
        self.kernels |= set(kernels)
        return True


class RuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = (
            DynamicShapesKernelSpecializationStrategy.LAZY
        )
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cache = RuntimeCache()

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


def engine_content(
    graph: Path,
    axes: dict[str, int],
    *,
    features: str = "float32",
    labels: str = "int64",
    perturbation: str = "",
    user_memory: bool = True,
) -> bytes:
    """What to write into an engine file."""
    return json.dumps(
        {
            "graph": str(graph),
            "axes": axes,
            "features": features,
            "labels": labels,
            "perturbation": perturbation,
            "user_memory": user_memory,
        }
    ).encode()


@lru_cache(maxsize=16)
def _session(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


_results: OrderedDict[bytes, dict[str, NDArray[Any]]] = OrderedDict()
_results_lock = threading.Lock()


def _infer(session: ort.InferenceSession, feed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Outputs by name. Many tests run the parity record: equal inputs are run once."""
    digest = hashlib.blake2b(str(id(session)).encode())
    for name, array in feed.items():
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    key = digest.digest()
    with _results_lock:
        found = _results.get(key)
    if found is None:
        names = [argument.name for argument in session.get_outputs()]
        found = dict(zip(names, session.run(names, feed), strict=True))
        with _results_lock:
            _results[key] = found
            while len(_results) > 128:
                _results.popitem(last=False)
    return {name: array.copy() for name, array in found.items()}


def make_module(
    cuda: FakeCuda,
    version: str = "10.16.0",
    perturbations: dict[str, Perturbation] | None = None,
    capturable: bool = True,
    rtx: bool = False,
) -> types.ModuleType:
    """The module, over one fake GPU; ``compiled`` lists what TensorRT for RTX had to compile."""
    compiled: list[str] = []

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, source: Any) -> Engine | None:
            if not isinstance(source, bytes):
                assert isinstance(source, IStreamReaderV2)
                source = read_through(source)
            return self._deserialize(source)

        def _deserialize(self, content: bytes) -> Engine | None:
            try:
                description = json.loads(content)
            except ValueError:
                self._logger.log(Severity.ERROR, "the engine has a wrong magic number")
                return None
            return Engine(description, self._logger)

    class Engine:
        def __init__(self, description: dict[str, Any], logger: ILogger) -> None:
            self.logger = logger
            self.session = _session(description["graph"])
            self.perturbation = (perturbations or {}).get(description["perturbation"])
            self.tensors: dict[str, tuple[TensorIOMode, DataType, tuple[Any, ...]]] = {}
            for mode, arguments in (
                (TensorIOMode.INPUT, self.session.get_inputs()),
                (TensorIOMode.OUTPUT, self.session.get_outputs()),
            ):
                for argument in arguments:
                    dtype = DataType(_ORT_TYPES[argument.type])
                    if argument.name.startswith("image_embeddings"):
                        dtype = DataType(np.dtype(description["features"]).type)
                    if argument.name == "input_labels":
                        dtype = DataType(np.dtype(description["labels"]).type)
                    self.tensors[argument.name] = (mode, dtype, tuple(argument.shape))
            self.axes = {"batch": 1} | description["axes"]
            self.graph = Path(description["graph"]).stem
            self.user_memory = description["user_memory"]

        @property
        def device_memory_size_v2(self) -> int:
            shapes = (self.get_tensor_profile_shape(name, 0)[2] for name in self.tensors)
            return scratch_for(shapes)

        @property
        def num_io_tensors(self) -> int:
            return len(self.tensors)

        def get_tensor_name(self, index: int) -> str:
            return list(self.tensors)[index]

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return self.tensors[name][0]

        def get_tensor_dtype(self, name: str) -> DataType:
            return self.tensors[name][1]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(s if isinstance(s, int) else -1 for s in self.tensors[name][2])

        def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
            assert profile == 0
            shape = self.tensors[name][2]
            least = tuple(s if isinstance(s, int) else 1 for s in shape)
            most = tuple(s if isinstance(s, int) else self.axes[s] for s in shape)
            return [least, least, most]

        def create_runtime_config(self) -> RuntimeConfig:
            assert rtx
            return RuntimeConfig()

        def create_execution_context(self, how: Any) -> Context:
            assert isinstance(how, RuntimeConfig) == rtx
            strategy = how.strategy if rtx else how
            if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
                raise CudaMisuse("a context that allocates working memory of its own")
            return Context(self, how if rtx else None)

    class Context:
        def __init__(self, engine: Engine, config: RuntimeConfig | None) -> None:
            self._engine = engine
            self._config = config
            self._asked = False
            self._shapes: dict[str, tuple[int, ...]] = {
                name: shape
                for name, (mode, _, shape) in engine.tensors.items()
                if mode is TensorIOMode.INPUT and all(isinstance(s, int) for s in shape)
            }
            self._addresses: dict[str, int] = {}
            self._scratch = (0, 0)
            self._version = 0
            self._has_run = -1

        def set_device_memory(self, address: int, nbytes: int) -> None:
            cuda.view(address, nbytes)
            self._scratch = (address, nbytes)
            self._version += 1

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            least, _, most = self._engine.get_tensor_profile_shape(name, 0)
            fits = len(shape) == len(least) and all(
                low <= side <= high for low, side, high in zip(least, shape, most, strict=True)
            )
            if not fits:
                self._engine.logger.log(Severity.ERROR, f"{name} {shape} is not within {most}")
                return False
            if self._shapes.get(name) != tuple(shape):
                self._shapes[name] = tuple(shape)
                self._version += 1
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            if name not in self._engine.tensors:
                return False
            if self._addresses.get(name) != address:
                self._addresses[name] = address
                self._version += 1
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            mode, _, shape = self._engine.tensors[name]
            if mode is TensorIOMode.INPUT:
                return self._shapes[name]
            sizes = {}
            for known, actual in self._shapes.items():
                for symbol, side in zip(self._engine.tensors[known][2], actual, strict=True):
                    if isinstance(symbol, str) and sizes.setdefault(symbol, side) != side:
                        raise CudaMisuse(f"{symbol} is {sizes[symbol]} and {side}")
            return tuple(s if isinstance(s, int) else sizes.get(s, 1) for s in shape)

        def update_device_memory_size_for_shapes(self) -> int:
            return scratch_for(self._shapes.values())

        def is_stream_capturable(self, stream: int) -> bool:
            assert rtx
            self._asked = True
            return capturable and self._engine.user_memory

        def _compile(self, recorded: bool) -> None:
            """What TensorRT for RTX does before it runs shapes that are new to it."""
            if self._config is None:
                return
            if recorded and not self._asked:
                raise CudaMisuse("a recording of which nobody asked whether it can be made")
            kind = DynamicShapesKernelSpecializationStrategy
            if self._config.dynamic_shapes_kernel_specialization_strategy is not kind.EAGER:
                raise CudaMisuse("fallback kernels may be recorded for good")
            kernel = f"{self._engine.graph} {sorted(self._shapes.items())}"
            if kernel not in self._config.cache.kernels:
                self._config.cache.kernels.add(kernel)
                compiled.append(kernel)

        def execute_async_v3(self, stream: int) -> bool:
            engine = self._engine
            missing = [name for name in engine.tensors if name not in self._addresses]
            if missing or self._scratch[1] < scratch_for(self._shapes.values()):
                engine.logger.log(Severity.ERROR, f"no address for {missing}, or no memory")
                return False
            if cuda.is_capturing(stream) and self._has_run != self._version:
                engine.logger.log(Severity.ERROR, "captured before a run with these shapes")
                return False
            views: dict[str, NDArray[Any]] = {}
            regions = [Region(*self._scratch, True)]
            for name, (mode, dtype, _) in engine.tensors.items():
                shape = self.get_tensor_shape(name)
                nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype.value).itemsize
                address = self._addresses[name]
                raw = cuda.view(address, nbytes)
                views[name] = raw.view(dtype.value).reshape(shape)
                regions.append(Region(address, nbytes, mode is TensorIOMode.OUTPUT))
            version = self._version
            recorded = cuda.is_capturing(stream)
            self._compile(recorded)

            def run() -> None:
                # What is queued directly has read the context by then; a graph depends on it.
                if recorded and self._version != version:
                    raise CudaMisuse("a context was changed under its graph")
                feed = {}
                for argument in engine.session.get_inputs():
                    array = views[argument.name]
                    feed[argument.name] = array.astype(_ORT_TYPES[argument.type])
                results = _infer(engine.session, feed)
                if engine.perturbation is not None:
                    engine.perturbation(results)
                for name, array in results.items():
                    views[name][...] = array

            what = "enqueue"
            if recorded and not capturable:
                what = "uncapturable"
            cuda.queue(stream, Operation(what, tuple(regions), run, keep=views), 0)
            self._has_run = version
            return True

    module = types.ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    for name, value in {
        "__version__": version,
        "ILogger": ILogger,
        "Runtime": Runtime,
        "DataType": DataType,
        "TensorIOMode": TensorIOMode,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
        "IStreamReaderV2": IStreamReaderV2,
        "compiled": compiled,
    }.items():
        setattr(module, name, value)
    return module
