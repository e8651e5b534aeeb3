"""One engine build in a process of its own, with TensorRT for RTX ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.support.build_helpers import toy_graph

from sam3rt_build import builder_process
from sam3rt_build.builder_process import EngineRequest, build_engine
from sam3rt_build.errors import BuildError
from sam3rt_build.graph_files import save_graph


def toy(folder: Path, operator: str = "MatMul") -> Path:
    given = ["x", "w"] if operator == "MatMul" else ["x"]
    weights = {"w": np.eye(8, dtype=np.float32)} if operator == "MatMul" else {}
    shape = ("n", 8) if operator == "MatMul" else (8, 8)
    model = toy_graph([(operator, given, "blocks.0")], {"x": shape}, weights)
    save_graph(model, folder / "toy.onnx")
    return folder / "toy.onnx"


def request(graph: Path, **changes: object) -> EngineRequest:
    fields: dict[str, object] = {
        "graph": str(graph),
        "engine": str(graph.parent / "toy.engine"),
        "backend": "tensorrt-rtx",
        "profile": {"x": ((1, 8), (2, 8), (4, 8))},
        "targets": ("8.9",),
    }
    return EngineRequest(**(fields | changes))  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_engine_is_built_for_two_targets(tmp_path: Path) -> None:
    build_engine(request(toy(tmp_path), targets=("8.9", "12.0"), workspace=64 << 20))
    assert names(tmp_path) == ["toy.engine", "toy.onnx"]
    assert (tmp_path / "toy.engine").stat().st_size > 1000


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    message = r"tensorrt-rtx: the build of nowhere\.onnx failed:\n"
    with pytest.raises(BuildError, match=message) as caught:
        build_engine(request(tmp_path / "nowhere.onnx"))
    log = str(caught.value).partition("\n")[2]
    assert "nowhere.onnx" in log
    assert len(log.splitlines()) <= 12
    assert names(tmp_path) == []


def test_a_graph_that_is_damaged(tmp_path: Path) -> None:
    graph = toy(tmp_path)
    graph.write_bytes(graph.read_bytes()[:40] + b"\xff" * 40)
    with pytest.raises(BuildError, match=r"(?s)the build of toy\.onnx failed:\n.*[Pp]arse"):
        build_engine(request(graph))
    assert names(tmp_path) == ["toy.onnx"]


@pytest.mark.parametrize(
    ("what", "script", "message"),
    [
        ("a crash", "import os; os.abort()", r"was killed by signal 6:\n"),
        ("the kernel, for memory", "import os; os.kill(os.getpid(), 9)", "was killed by signal 9"),
        (
            "an error",
            "import sys; print('\\n'.join(map(str, range(99))), file=sys.stderr); sys.exit(3)",
            r"failed:\n87\n(\d\d\n)+98$",
        ),
        ("a word on standard output", "print('only here'); raise SystemExit(1)", "only here"),
    ],
)
def test_whatever_ends_the_builder_is_told(
    what: str, script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "{script}"\n'.replace("\\n", "\\\\n")
    )
    interpreter.chmod(0o755)
    monkeypatch.setattr(builder_process.sys, "executable", str(interpreter))
    with pytest.raises(BuildError, match=message):
        build_engine(request(tmp_path / "toy.onnx"))
    assert names(tmp_path) == ["python"]


def test_the_process_gets_the_whole_request_and_the_right_flavour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(
        "#!/bin/sh\n"
        f'cp "$3" {tmp_path}/seen.json\n'
        f'echo "$1 $2 $POLYGRAPHY_USE_TENSORRT_RTX" > {tmp_path}/seen.txt\n'
        f'echo "$PYTHONPATH" > {tmp_path}/path.txt\n'
    )
    interpreter.chmod(0o755)
    monkeypatch.setattr(builder_process.sys, "executable", str(interpreter))
    for backend, flag in (("tensorrt", "0"), ("tensorrt-rtx", "1")):
        build_engine(request(tmp_path / "toy.onnx", backend=backend, tf32=True))
        seen = (tmp_path / "seen.txt").read_text().split()
        assert seen == ["-m", "sam3rt_build.builder_process", flag]
    document = json.loads((tmp_path / "seen.json").read_text())
    assert document == {
        "graph": str(tmp_path / "toy.onnx"),
        "engine": str(tmp_path / "toy.engine"),
        "backend": "tensorrt-rtx",
        "profile": {"x": [[1, 8], [2, 8], [4, 8]]},
        "targets": ["8.9"],
        "tf32": True,
        "workspace": None,
        "timing_cache": None,
        "device": None,
    }
    # Where sam3rt is not installed, the process finds it all the same.
    places = (tmp_path / "path.txt").read_text().strip().split(os.pathsep)
    assert places == [path for path in sys.path if path]


# Polygraphy decides between the two flavours once a process.
_TOLD = """
import tensorrt_rtx as trt
from sam3rt_build import builder_process
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(0)
network.add_identity(network.add_input("x", trt.float32, (-1, 8)))
for tf32 in (False, True):
    profile = {"x": ((1, 8), (2, 8), (4, 8))}
    request = builder_process.EngineRequest(
        "toy.onnx", "toy.engine", "tensorrt-rtx", profile, targets=("8.9",), tf32=tf32
    )
    config = builder_process._config(request)(builder, network)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.get_flag(trt.BuilderFlag.TF32) == tf32
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.num_compute_capabilities == 1
"""


def test_what_the_builder_is_told() -> None:
    """Memory is the runtime's, as a recording needs; the engine says what it computes with."""
    environment = {
        **os.environ,
        "POLYGRAPHY_USE_TENSORRT_RTX": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    subprocess.run([sys.executable, "-c", _TOLD], env=environment, check=True, timeout=120)


def test_what_tensorrt_cannot_do_is_named(tmp_path: Path) -> None:
    graph = toy(tmp_path, "Det")
    onnx.checker.check_model(str(graph))
    with pytest.raises(BuildError, match="Det"):
        build_engine(request(graph, profile={}))
    assert names(tmp_path) == ["toy.onnx"]


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        (None, None, None),
        (None, "2,3", "2,3"),
        (0, None, "0"),
        (1, None, "1"),
        (1, "2,3", "3"),
        (0, "GPU-8932f937, GPU-25a2", "GPU-8932f937"),
        (1, "GPU-8932f937, GPU-25a2", "GPU-25a2"),
    ],
)
def test_a_build_sees_the_gpu_that_it_is_for_and_no_other(
    device: int | None,
    visible: str | None,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str | None] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(builder_process.subprocess, "run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    build_engine(request(tmp_path / "toy.onnx", targets=(), device=device))
    assert seen == [expected]
