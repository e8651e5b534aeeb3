"""Installations other than the one that the tests run in: other Pythons, other versions, the locks.

Everything here makes a virtual environment of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

# The reference's outputs, and what libraries and Pythons differ in: bytes, arrays, sessions.
TESTS = (
    "tests/golden/test_golden_mobile_sam.py",
    "tests/golden/test_golden_sam3.py",
    "tests/unit/runtime/backends/test_onnxruntime.py",
    "tests/unit/runtime/bundle/test_default.py",
    "tests/unit/runtime/bundle/test_files.py",
    "tests/unit/runtime/test_embedding.py",
    "tests/unit/runtime/test_prompts.py",
)
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
TOOLS = ("filelock", "hypothesis", "onnx", "pytest")
# What a wheel is made of.
SOURCES = ("pyproject.toml", "LICENSE", "README.md", "runtime", "export", "benchmarks")


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that both installations get, built in a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sources").mkdir()
    for name in (*SOURCES, "engines/mobile_sam"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "sources" / name)
    run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, folder / "sources")
    (built,) = folder.glob("sam3rt-*.whl")
    return built


def run_tests(python: Path, exports: Path) -> None:
    """The golden cases and the runtime's own tests, in an environment that has them."""
    run(
        python,
        *("-m", "pytest", "-q", "-m", "not slow and not serial", "-p", "no:cacheprovider"),
        *TESTS,
        SAM3RT_TEST_EXPORTS=str(exports),
    )


def test_the_oldest_python_and_libraries(wheel: Path, exports: Path, tmp_path: Path) -> None:
    """Both as old as is allowed."""
    pins = tmp_path / "pins.txt"
    bounds = lower_bounds("3.10")
    pins.write_text("".join(f"{name}=={bound}\n" for name, bound in bounds.items()))
    python = make_environment(interpreter("3.10"), tmp_path / "env")
    run(python, *PIP, "install", "--no-compile", "--constraint", pins, f"{wheel}[cpu]", *TOOLS)
    run_tests(python, exports)


def test_the_newest_python_and_the_locked_libraries(
    wheel: Path, exports: Path, tmp_path: Path
) -> None:
    """By hash; nothing is missing then, and the bundled model is what it was."""
    python = make_environment(interpreter("3.13"), tmp_path / "env")
    hashed = ("--require-hashes", "--requirement", ROOT / "requirements" / "cpu.lock")
    run(python, *PIP, "install", "--no-compile", *hashed)
    run(python, *PIP, "install", "--no-compile", "--no-deps", wheel)
    run(python, *PIP, "check")
    run(tmp_path / "env" / "bin" / "sam3rt", "verify")
    pins = ROOT / "constraints.txt"
    run(python, *PIP, "install", "--no-compile", "--constraint", pins, *TOOLS)
    run_tests(python, exports)


def test_the_lock_of_the_tests_can_be_installed() -> None:
    """All its files are there, with these hashes, and need nothing that the lock does not name.

    Unpacking PyTorch would take longer than everything else; and what it holds of the runtime is
    what ``cpu.lock`` holds.
    """
    hashed = ("--require-hashes", "--requirement", ROOT / "requirements" / "test.lock")
    run(sys.executable, *PIP, "install", "--dry-run", "--ignore-installed", *hashed)
