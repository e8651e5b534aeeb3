"""Machines with a stand-in for a GPU, and engines for them, which compute what graphs do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cpp_driver import Build, Result, Step, as_prompts
from tests.support.helpers import noise
from tests.support.vectors import load

# A build without ONNX Runtime, then one with it and with sanitizers.
EACH_MACHINE = pytest.mark.parametrize("machine", ["tensorrt", "address"], indirect=True)
FOLDER = "nvidia-l4-sm89-tensorrt-10.3.0-fp16"
IMAGE = noise(50, 70)
CLICK: dict[str, Any] = {"point_coords": [[30, 25], [8, 9], [60, 40]], "point_labels": [1, 0, 1]}
BOX: dict[str, Any] = {"box": [[1, 2, 30, 40], [5, 6, 50, 44], [9, 9, 20, 20]]}


@dataclass(frozen=True)
class Machine:
    """A machine with a stand-in for a GPU.

    Attributes:
        build: the C++ runtime.
        environment: what makes programs of the build find it.
        report: where it says at a process's end what is left.
    """

    build: Build
    environment: dict[str, str]
    report: Path

    def run(self, *steps: Step, **environment: str) -> list[Result]:
        """Run steps in a process in which everything must be given back."""
        self.report.unlink(missing_ok=True)
        results = self.build.run(list(steps), env={**self.environment, **environment})
        # Without engines nothing is asked of the GPU.
        if self.report.exists() and "STAND_IN_LOST" not in environment:
            left = json.loads(self.report.read_text())
            names = ("used", "streams", "events", "graphs", "pinned", "contexts", "modules")
            assert not any(left[name] for name in names), left
        return results

    def without_nvrtc(self, folder: Path) -> dict[str, str]:
        """What makes programs find the driver alone, in a folder that is made for it."""
        folder.mkdir()
        driver = self.build.path / "tests" / "stand_in" / "libcuda.so.1"
        (folder / driver.name).symlink_to(driver)
        return {"LD_LIBRARY_PATH": str(folder)}

    def done(self) -> dict[str, int]:
        """What the GPU did in the last process."""
        done: dict[str, int] = json.loads(self.report.read_text())
        return done


def add_engines(
    bundle: Path,
    folder: str = FOLDER,
    *,
    objects: int = 16,
    points: int = 32,
    maps: str = "float",
    factor: float = 1.0,
    images: int = 1,
    joined: int | None = None,
    **changes: Any,
) -> None:
    """Put an encoder and a decoder into a bundle that compute what its graphs do.

    The decoder takes feature maps of ``joined`` images, unless given of one for each object.
    """
    for role in ("encoder", "decoder"):
        where = bundle / "engines" / folder
        where.mkdir(parents=True, exist_ok=True)
        engine = where / f"{role}.engine"
        scale = factor if role == "encoder" else 1.0
        joined = objects if joined is None else joined
        line = f"stand-in {objects} {points} {maps} {scale} {images} {joined}\n"
        engine.write_bytes(line.encode() + (bundle / f"{role}.onnx").read_bytes())
        content = engine.read_bytes()
        sidecar = {
            **load("engines")["sidecar"],
            "role": role,
            "engine": {
                "file": engine.name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
            },
            "bundle_fingerprint": json.loads((bundle / "bundle.json").read_text())["fingerprint"],
            "features_dtype": "float16" if maps == "half" else "float32",
            "state": "unproven",
            **changes,
        }
        engine.with_name(f"{role}.engine.json").write_text(json.dumps(sidecar))


def loaded(bundle: Path, device: str = "tensorrt", **options: Any) -> Step:
    return {"op": "load_model", "model": "m", "path": bundle, "device": device, **options}


def step(op: str, **arguments: Any) -> Step:
    return {"op": op, "model": "m", "predictor": "p", "embedding": "e", **arguments}


def as_step(prompts: dict[str, Any], **options: Any) -> Step:
    return step("predict", prompts=as_prompts(prompts), **options)


def assert_same(found: Result, expected: Any) -> None:
    """Compare with masks, scores and logits of the Python runtime on the CPU."""
    assert found.error is None, found.error
    masks, scores, logits = expected
    np.testing.assert_allclose(found.arrays["iou"], scores, atol=2e-3)
    np.testing.assert_allclose(found.arrays["low_res"], logits, atol=2e-2, rtol=1e-3)
    assert found.arrays["masks"].shape == masks.shape
    assert (found.arrays["masks"] != masks).mean() < 2e-3


def many_objects(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "point_coords": rng.uniform(0, 45, (count, 3, 2)),
        "point_labels": rng.integers(0, 2, (count, 3)),
    }
