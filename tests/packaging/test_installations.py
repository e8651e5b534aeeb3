"""Installations other than the one that the tests run in: other Pythons, other versions, the locks.

Everything here makes a virtual environment of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.conftest import ROOT

# Installing builds a wheel in the source tree, and the tests inside use all cores.
pytestmark = [pytest.mark.slow, pytest.mark.serial]

# The reference's outputs, and what libraries and Pythons differ in: bytes, arrays, sessions.
TESTS = (
    "tests/golden",
    "tests/unit/runtime/backends/test_onnxruntime.py",
    "tests/unit/runtime/bundle/test_default.py",
    "tests/unit/runtime/bundle/test_files.py",
    "tests/unit/runtime/test_embedding.py",
    "tests/unit/runtime/test_prompts.py",
)
TOOLS = ("filelock", "hypothesis", "onnx", "pytest", "pytest-xdist")


def interpreter(version: str) -> Path:
    """A Python of the given version: on the path, or pyenv's.

    Fails where there is none: a version that nobody can test is not supported.
    """
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), reverse=True)
    for candidate in filter(None, candidates):
        command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return Path(candidate)
    pytest.fail(f"this test needs Python {version}, on the path or by pyenv")


def run(*command: str | Path, **environment: str) -> None:
    """Run a command in the source tree; fails with all that it wrote."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout[-10_000:], pytrace=False)


def make_environment(python: Path, folder: Path) -> Path:
    """The Python of a new virtual environment."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def lower_bounds(version: str) -> dict[str, str]:
    """What ``sam3rt[cpu]`` and the tests' ``onnx`` need at least, on a version of Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = {}
    for text in (*project["dependencies"], *extras["cpu"], *extras["build"]):
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"python_version": version}):
            (bound,) = requirement.specifier
            assert bound.operator == ">=", text
            bounds[canonicalize_name(requirement.name)] = bound.version
    return bounds


def constrained_versions() -> dict[str, str]:
    """What ``constraints.txt`` pins."""
    lines = re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return {canonicalize_name(name): version for name, version in lines}


@pytest.mark.parametrize(("version", "libraries"), [("3.10", "oldest"), ("3.13", "tested")])
def test_runtime_and_golden_data(
    version: str, libraries: str, small_export: Path, tmp_path: Path
) -> None:
    """The golden cases and the runtime's own tests, on the libraries as old as is allowed."""
    pinned = lower_bounds(version) if libraries == "oldest" else constrained_versions()
    pins = tmp_path / "pins.txt"
    pins.write_text("".join(f"{name}=={pin}\n" for name, pin in pinned.items()))
    python = make_environment(interpreter(version), tmp_path / "env")
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    run(python, "-m", "pip", "install", "--quiet", "--constraint", pins, f"{ROOT}[cpu]", *TOOLS)
    run(
        python,
        *("-m", "pytest", "-q", "--numprocesses", "auto", "--dist", "loadscope"),
        *("-m", "not slow and not serial", "-p", "no:cacheprovider"),
        *TESTS,
        SAM3RT_SMALL_EXPORT=str(small_export),
    )


@pytest.mark.parametrize("name", ["cpu.lock", "test.lock"])
def test_locks_can_be_installed(name: str, tmp_path: Path) -> None:
    """By hash, and nothing is missing then."""
    python = make_environment(Path(sys.executable), tmp_path / "env")
    lock = ROOT / "requirements" / name
    # Only `sam3rt verify` is run there: compiling all of PyTorch would take most of the time.
    hashed = ("--require-hashes", "--no-compile", "--requirement", lock)
    run(python, "-m", "pip", "install", "--quiet", *hashed)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", ROOT)
    run(python, "-m", "pip", "check")
    run(tmp_path / "env" / "bin" / "sam3rt", "verify")
