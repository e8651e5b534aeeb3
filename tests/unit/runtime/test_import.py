"""What ``import sam3rt`` costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIMIT = 0.15  # seconds
PROGRAM = """
import json, sys, time
import numpy, PIL.Image
before, start = set(sys.modules), time.process_time()
import sam3rt
took = time.process_time() - start
print(json.dumps([took, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""


def import_once() -> tuple[float, list[str]]:
    """Processor seconds in a new process, NumPy and Pillow not counted, and the new modules."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, modules


@pytest.mark.serial
def test_the_package_is_imported_in_no_time() -> None:
    import_once()  # writes bytecode
    assert min(import_once()[0] for _ in range(5)) < LIMIT


def test_the_package_loads_no_backend() -> None:
    _, modules = import_once()
    assert "sam3rt" in modules
    assert not set(modules) & {"cuda", "onnx", "onnxruntime", "openvino", "tensorrt", "torch"}
