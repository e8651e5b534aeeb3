"""What a user installs: the wheel with its ``cpu`` extra, and nothing of PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from tests.conftest import PHOTOS, ROOT

LIMIT_MB = 350

# Refuses every import of a torch library, then uses the whole runtime.
PROGRAM = """
import importlib, json, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "transformers", "sam3", "onnx"}:
            raise AssertionError(f"the runtime imports {name}")

sys.meta_path.insert(0, Refuse())
import sam3rt
for module in pkgutil.walk_packages(sam3rt.__path__, "sam3rt."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # what only an extra brings, or PyInstaller itself
            assert error.name.split(".")[0] in {"openvino", "PyInstaller"}, module.name
import numpy as np
from PIL import Image
predictor = sam3rt.SAM3InteractiveImagePredictor(sam3rt.load_model())
predictor.set_image(np.asarray(Image.open(sys.argv[1])))
masks, scores, low_res = predictor.predict(
    point_coords=np.array([[225, 150]]), point_labels=np.array([1])
)
print(json.dumps({"file": sam3rt.__file__, "score": float(scores.max()),
                  "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


@pytest.fixture(scope="module")
def runtime_env(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with ``sam3rt[cpu]``: the one of ``make demo``, or a new one."""
    given = os.environ.get("SAM3RT_RUNTIME_ENV")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("runtime") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    options = ["--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([str(folder / "bin" / "pip"), "install", *options, f"{ROOT}[cpu]"], check=True)
    return folder


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python3*/site-packages")
    return folder


@pytest.mark.slow
def test_runtime_needs_no_torch(runtime_env: Path) -> None:
    result = subprocess.run(
        [str(runtime_env / "bin" / "python"), "-I", "-c", PROGRAM, str(PHOTOS / "chelsea.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["score"] == pytest.approx(0.994, abs=1e-3)
    assert str(runtime_env.resolve()) in str(Path(report["file"]).resolve())
    assert "torch" not in report["modules"]


@pytest.mark.slow
def test_runtime_environment_is_small(runtime_env: Path) -> None:
    files = [p for p in site_packages(runtime_env).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) / 1e6 < LIMIT_MB


@pytest.mark.slow
def test_environment_holds_only_the_runtime(runtime_env: Path) -> None:
    names = {p.name.split("-")[0].lower() for p in site_packages(runtime_env).glob("*.dist-info")}
    assert "sam3rt" in names
    assert not names & {"torch", "transformers", "onnx", "opencv_python", "opencv_python_headless"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["verify"], 0, "52 of 52 comparisons pass"),
        (["export", "x.pt", "--output", "y"], 1, "pip install 'sam3rt[export,cpu]'"),
    ],
)
def test_command_line_of_the_wheel(
    command: list[str], status: int, said: str, runtime_env: Path
) -> None:
    program = str(runtime_env / "bin" / "sam3rt")
    result = subprocess.run([program, *command], capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    assert said in result.stdout + result.stderr


def test_runtime_sources_never_import_torch() -> None:
    for path in (ROOT / "runtime").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in {"torch", "transformers", "sam3"}, path


def test_every_package_is_listed() -> None:
    found = {"sam3rt.default_bundle"}
    for root in (ROOT / "runtime", ROOT / "export", ROOT / "benchmarks"):
        for module in root.glob("sam3rt*/**/*.py"):
            found.add(".".join(module.parent.relative_to(root).parts))
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(document["tool"]["setuptools"]["packages"]) == found
