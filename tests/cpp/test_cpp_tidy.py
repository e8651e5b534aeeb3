"""clang-tidy over every source of the C++ runtime, with the checks of runtime/cpp/.clang-tidy."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.cpp_driver import ROOT

CPP = ROOT / "runtime" / "cpp"
LEFT_OUT = {
    # It is mostly stb_image, which others wrote.
    CPP / "examples" / "segment" / "image_files.cpp",
    # The GPU's kernels: their indices are 32 bits wide on purpose, as sizes are limited before.
    CPP / "tests" / "stand_in" / "kernels.cpp",
}
SOURCES = sorted(
    path
    for folder in ("src", "examples", "tests")
    for path in (CPP / folder).rglob("*.cpp")
    if path not in LEFT_OUT
)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(CPP)))
def test_nothing_is_found(cpp_builds: Path, source: Path) -> None:
    if shutil.which("clang-tidy") is None or not (cpp_builds / "clang").exists():
        pytest.skip("needs clang-tidy, and the builds of runtime/cpp/tools/build_fuzzers.sh")
    for build in (cpp_builds / "clang", cpp_builds / "fuzz"):
        commands = json.loads((build / "compile_commands.json").read_text())
        if any(Path(entry["file"]) == source for entry in commands):
            break
    else:
        pytest.skip("not compiled in those builds")
    done = subprocess.run(
        ["clang-tidy", "-p", build, "--quiet", source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
