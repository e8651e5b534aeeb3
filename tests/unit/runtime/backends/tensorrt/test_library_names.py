"""The runtime uses only what every supported TensorRT and cuda-python has.

The names are collected from the source; tools/library_names.py says where the versions' names
come from. TensorRT for RTX is installed here and is asked itself, class by class.
"""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest
import tensorrt_rtx
from tests.conftest import ROOT
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_tensorrt import make_module

from sam3rt.backends.tensorrt import cuda

NAMES: dict[str, list[str]] = json.loads(
    (ROOT / "tests" / "tools" / "library_names.json").read_text()
)
PACKAGE = ROOT / "runtime" / "sam3rt" / "backends" / "tensorrt"
ENGINE = PACKAGE / "trt.py"
# Which of TensorRT's classes each name in the source stands for.
CLASSES = {
    "trt_engine": "ICudaEngine",
    "trt_context": "IExecutionContext",
    "trt_runtime": "Runtime",
}


def name_of(node: ast.expr) -> str:
    """The last part of a dotted name, without a leading underscore."""
    if isinstance(node, ast.Attribute):
        return node.attr.removeprefix("_")
    return node.id.removeprefix("_") if isinstance(node, ast.Name) else ""


def used(path: Path, prefix: str) -> set[tuple[str, str]]:
    """(name, attribute) pairs of everything read from names that begin with the prefix."""
    return {
        (name_of(node.value), node.attr)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and name_of(node.value).startswith(prefix)
    }


TENSORRT_USES = {
    # The Python part of the module says its version.
    (owner, name)
    for owner, name in used(ENGINE, "trt")
    if not name.startswith("__")
}
RTX_USES = used(ENGINE, "rtx")
RTX_CLASSES = {
    "rtx_engine": "ICudaEngine",
    "rtx_context": "IExecutionContext",
    "rtx_config": "IRuntimeConfig",
    "rtx_cache": "IRuntimeCache",
}
# TensorRT goes on using the first logger it was given.
LOGGERS: list[object] = []
ENUMS = {"TensorIOMode": {"INPUT"}, "ExecutionContextAllocationStrategy": {"USER_MANAGED"}}
RTX_ENUMS = {
    "DynamicShapesKernelSpecializationStrategy": {"EAGER"},
    "SeekPosition": {"SET", "CUR", "END"},
}
DATA_TYPES = {"FLOAT", "HALF", "INT32", "INT64", "INT8", "UINT8", "BOOL"}
SEVERITIES = {"INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"}


def test_the_collection_finds_what_is_used() -> None:
    assert ("trt_context", "execute_async_v3") in TENSORRT_USES
    assert ("trt_context", "update_device_memory_size_for_shapes") in TENSORRT_USES
    assert ("trt", "ExecutionContextAllocationStrategy") in TENSORRT_USES
    assert len(TENSORRT_USES) >= 15


def test_other_modules_do_not_touch_tensorrt() -> None:
    for path in PACKAGE.glob("*.py"):
        if path != ENGINE:
            assert used(path, "trt") | used(path, "rtx") == set(), path


@pytest.mark.parametrize("version", [name for name in NAMES if name.startswith("tensorrt")])
def test_every_tensorrt_has_every_name(version: str) -> None:
    names = {name for _, name in TENSORRT_USES} | DATA_TYPES | SEVERITIES
    names |= {member for members in ENUMS.values() for member in members}
    assert names - set(NAMES[version]) == set()


def test_names_that_are_gone_from_some_version_are_noticed() -> None:
    """What TensorRT 11 and TensorRT for RTX no longer have."""
    for gone in ("create_execution_context_without_device_memory", "device_memory_size"):
        assert not all(gone in names for n, names in NAMES.items() if n.startswith("tensorrt"))


def test_tensorrt_for_rtx_has_every_name_in_its_class() -> None:
    for owner, name in TENSORRT_USES:
        if owner in CLASSES:
            assert hasattr(getattr(tensorrt_rtx, CLASSES[owner]), name), (owner, name)
        elif owner == "trt":
            assert hasattr(tensorrt_rtx, name), name
    assert {name for _, name in RTX_USES} >= {"is_stream_capturable", "set_runtime_cache"}
    for owner, name in RTX_USES:
        if owner == "rtx":
            assert hasattr(tensorrt_rtx, name), name
        else:
            assert hasattr(getattr(tensorrt_rtx, RTX_CLASSES[owner]), name), (owner, name)
    for enum, members in (ENUMS | RTX_ENUMS).items():
        assert members <= set(getattr(tensorrt_rtx, enum).__members__)
    assert set(tensorrt_rtx.DataType.__members__) >= DATA_TYPES
    assert set(tensorrt_rtx.ILogger.Severity.__members__) >= SEVERITIES


def test_where_a_stream_can_be_read_from_all_of_its_names_are_known() -> None:
    reading = {"IStreamReaderV2", "SeekPosition", "SET", "CUR", "END"}
    for version, names in NAMES.items():
        if version.startswith("tensorrt") and "IStreamReaderV2" in names:
            assert reading <= set(names), version
    assert {"read", "seek"} <= set(dir(tensorrt_rtx.IStreamReaderV2))


def test_types_are_read_by_their_names() -> None:
    """What the backend takes apart: ``str`` of a data type, in the real and the fake module."""
    from sam3rt.backends.tensorrt import trt as engine

    assert set(engine._DTYPES) == DATA_TYPES
    for name in DATA_TYPES:
        assert str(getattr(tensorrt_rtx.DataType, name)).rpartition(".")[2] == name
    fake = make_module(FakeCuda())
    assert str(fake.DataType.HALF).rpartition(".")[2] == "HALF"


def test_a_logger_in_python_serves_the_real_module() -> None:
    """No driver is needed for a logger, and nothing else of TensorRT is made here."""
    from collections import deque

    from sam3rt.backends.tensorrt.trt import _make_logger

    messages: deque[str] = deque(maxlen=4)
    logger = _make_logger(tensorrt_rtx, messages)
    LOGGERS.append(logger)
    assert isinstance(logger, tensorrt_rtx.ILogger)
    logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "bad")
    logger.log(tensorrt_rtx.ILogger.Severity.INFO, "good")
    assert list(messages) == ["bad"]
    # A builder takes it, and says what is wrong through it.
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, logger)
    assert not parser.parse(b"nonsense")
    assert "Failed to parse" in messages[-1]


@pytest.mark.parametrize("version", [name for name in NAMES if name.startswith("cuda-python")])
def test_every_cuda_python_has_every_name(version: str) -> None:
    source = Path(inspect.getfile(cuda))
    names = {name for owner, name in used(source, "runtime") if name.startswith("cuda")}
    enums = {"cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"}
    members = {name for owner, name in used(source, "cuda") if owner in enums}
    kinds = {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"}
    assert {"cudaMalloc", "cudaGraphLaunch", "cudaMemcpyKind"} <= names
    assert "cudaStreamCaptureModeThreadLocal" in members
    compiling = {name for owner, name in used(source, "nvrtc") | used(source, "driver")}
    assert {"nvrtcCompileProgram", "cuModuleLoadData", "cuLaunchKernel"} <= compiling
    wanted = (names - {"cudaError_t"}) | members | kinds | compiling
    assert wanted - set(NAMES[version]) == set()
