"""The GPU's kernels compiled by a C++ compiler, each a function of a job in host memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from tests.conftest import ROOT

SOURCE = ROOT / "runtime" / "sam3rt" / "backends" / "tensorrt" / "kernels.cu"


@cache
def load(source: str) -> ctypes.CDLL:
    """The library of a source text; skips the test where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        code, library = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        code.write_text(source)
        # As NVRTC is told: no contraction, so that both compute the same.
        flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing"]
        warnings = ["-Wall", "-Wextra", "-Werror"]
        command = [compiler, "-shared", "-fPIC", *flags, *warnings]
        subprocess.run([*command, "-o", str(library), str(code)], check=True)
        return ctypes.CDLL(str(library))


def run(name: str, job: int, library: ctypes.CDLL | None = None) -> None:
    """Run one kernel for the job at an address."""
    function = getattr(library or load(SOURCE.read_text()), name)
    function(ctypes.c_void_p(job))
