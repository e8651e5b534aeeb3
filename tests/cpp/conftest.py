"""Fixtures of the tests of the C++ runtime's own TensorRT backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.cpp_driver import Build
from tests.support.cpp_machine import Machine
from tests.support.tensorrt_helpers import copy_bundle


@pytest.fixture
def machine(
    request: pytest.FixtureRequest,
    cpp_builds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machine:
    """The build with sanitizers, or the one that a test names: see ``EACH_MACHINE``. It knows no
    verdicts yet."""
    name = getattr(request, "param", "address")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "exchange").mkdir()
    build = Build(cpp_builds / name, tmp_path / "exchange")
    report = tmp_path / "report.json"
    environment = {
        "LD_LIBRARY_PATH": str(build.path / "tests" / "stand_in"),
        "STAND_IN_ONNXRUNTIME": str(cpp_builds / "dependencies" / "lib" / "libonnxruntime.so.1"),
        "STAND_IN_REPORT": str(report),
    }
    return Machine(build, environment, report)


@pytest.fixture
def bundle(tiny_sam3: Path, tmp_path: Path) -> Path:
    """A copy of the SAM 3 of 8x8 pixels, to put engines into."""
    return copy_bundle(tiny_sam3, tmp_path / "bundle")
