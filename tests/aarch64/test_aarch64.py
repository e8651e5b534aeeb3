"""The Python and the C++ runtime on 64-bit ARM, under QEMU; `make test-aarch64` prepares it.

QEMU has the instructions and the ABI of such a machine, so bytes, signs, alignment and rounding are
tested. It has neither its timing nor its memory order, and pages are the host's, of 4 KiB.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tests.conftest import PHOTOS, ROOT
from tests.support.helpers import noise

from sam3rt.bundle.default import default_bundle_path

FOLDER = Path(os.environ.get("SAM3RT_AARCH64", ROOT / "build-aarch64")).resolve()
PYTHON = FOLDER / "python" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "SAM3RT_AARCH64" not in os.environ, reason="`make test-aarch64` runs it under QEMU"
    ),
    pytest.mark.skipif(
        not (FOLDER / "cpp" / "install").is_dir(),
        reason=f"{FOLDER} lacks QEMU or packages for arm64; tests/aarch64/fetch.sh says why",
    ),
]
# Between two processors, in FP32.
LOGIT_LIMIT, IOU_LIMIT, PIXEL_LIMIT = 1e-3, 1e-4, 2e-4
CLICK = "225,150"

# What of the unit tests depends on bytes, arrays, the C library or the processor.
UNIT_TESTS = (
    "tests/conformance",
    "tests/unit/runtime/accuracy/test_gate.py",
    "tests/unit/runtime/accuracy/test_npz.py",
    "tests/unit/runtime/accuracy/test_record.py",
    "tests/unit/runtime/accuracy/test_verdicts.py",
    "tests/unit/runtime/bundle",
    "tests/unit/runtime/masks",
    "tests/unit/runtime/test_embedding.py",
    "tests/unit/runtime/test_geometry.py",
    "tests/unit/runtime/test_image_files.py",
    "tests/unit/runtime/test_machine.py",
    "tests/unit/runtime/test_predictor.py",
    "tests/unit/runtime/test_prompts.py",
)
# Those that compare with PyTorch, or with the exporter, which needs it.
WITHOUT_TORCH = "not torch and not steps_in_order and not exactly_at and not of_every_export"


def run(*command: str | Path, **environment: str) -> str:
    """Run a command in the source tree and return what it printed; fails with all it wrote."""
    paths = [ROOT / name for name in ("runtime", "export", "benchmarks")]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout[-10_000:] + done.stderr[-5_000:], pytrace=False)
    return done.stdout


def run_tests(*arguments: str | Path, exports: Path) -> None:
    """Run tests of the repository in the Python for arm64."""
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow and not serial")
    run(PYTHON, "-m", "pytest", *options, *arguments, SAM3RT_TEST_EXPORTS=str(exports))


# --- Python ---------------------------------------------------------------------------------------


def test_info() -> None:
    report = json.loads(run(PYTHON, "-m", "sam3rt", "info", "--json"))
    assert report["machine"]["architecture"] == "aarch64"
    assert "part 0xd42" in report["machine"]["processor"]
    assert report["bundle"]["files"] == "match their hashes"


def test_units(exports: Path) -> None:
    run_tests(*UNIT_TESTS, "-k", WITHOUT_TORCH, exports=exports)


@pytest.mark.parametrize("family", ["sam3", "sam2", "mobile_sam"])
def test_golden_cases(family: str, exports: Path) -> None:
    run_tests(f"tests/golden/test_golden_{family}.py", exports=exports)


def test_verify() -> None:
    """The bundle's own record, made on x86."""
    run(PYTHON, "-m", "sam3rt", "verify", "--backend", "onnxruntime", "--threads", "1")


def check_equal(first: Path, second: Path) -> None:
    """Compare two results of exchange.py."""
    a, b = np.load(first), np.load(second)
    np.testing.assert_allclose(a["low_res"], b["low_res"], atol=LOGIT_LIMIT, rtol=LOGIT_LIMIT)
    np.testing.assert_allclose(a["iou"], b["iou"], atol=IOU_LIMIT, rtol=0)
    assert (a["masks"] != b["masks"]).mean(axis=(-2, -1)).max() <= PIXEL_LIMIT


@pytest.mark.parametrize(("first", "second"), [(sys.executable, PYTHON), (PYTHON, sys.executable)])
def test_embeddings_travel(
    first: str | Path, second: str | Path, tiny_sam3: Path, tmp_path: Path
) -> None:
    """What one processor encoded and wrote, the other reads and segments, with the same masks."""
    image, program = tmp_path / "image.png", ROOT / "tests" / "aarch64" / "exchange.py"
    PIL.Image.fromarray(noise(30, 40)).save(image)
    run(first, program, "encode", tiny_sam3, image, tmp_path / "embedding")
    for number, python in enumerate((first, second)):
        result = tmp_path / f"{number}.npz"
        run(python, program, "segment", tiny_sam3, tmp_path / "embedding", "20,15", result)
    check_equal(tmp_path / "0.npz", tmp_path / "1.npz")


def test_openvino_decodes(tmp_path: Path, tiny_sam3: Path) -> None:
    """OpenVINO's kernels for ARM, on the SAM 3 of 8x8 pixels and in FP32."""
    bundle = ("verify", tiny_sam3, "--backend", "openvino", "--precision", "fp32")
    run(PYTHON, "-m", "sam3rt", *bundle, "--threads", "1")


# --- C++ ------------------------------------------------------------------------------------------


def segment_with(*program: str | Path, output: Path) -> np.ndarray:
    """The masks that a command writes for a click on the demo image, [N, H, W]."""
    run(*program, PHOTOS / "chelsea.png", "--point", CLICK, "--output", output)
    return np.stack([np.asarray(PIL.Image.open(path)) for path in sorted(output.glob("mask*.png"))])


def test_demo_image_in_cpp(tmp_path: Path) -> None:
    """The installed example, linked to the shared library, against Python on this machine."""
    example = FOLDER / "cpp" / "install" / "bin" / "sam3rt_segment"
    bundle = default_bundle_path()
    found = segment_with(FOLDER / "run", example, "--bundle", bundle, output=tmp_path / "cpp")
    options = ("segment", "--backend", "onnxruntime", "--threads", "1")
    expected = segment_with(sys.executable, "-m", "sam3rt", *options, output=tmp_path / "python")
    assert found.shape == expected.shape
    assert (found != expected).mean(axis=(-2, -1)).max() <= PIXEL_LIMIT


@pytest.mark.parametrize("module", ["conformance", "parts", "embedding", "bundle", "golden"])
def test_cpp(module: str, exports: Path) -> None:
    """Tests of `make test-cpp` with programs of arm64, against the Python runtime on x86."""
    run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not address"),
        f"tests/cpp/test_cpp_{module}.py",
        SAM3RT_TEST_EXPORTS=str(exports),
        SAM3RT_CPP_BUILDS=str(FOLDER / "cpp"),
        SAM3RT_CPP_EMULATOR=str(FOLDER / "run"),
    )


def test_needs_no_newer_c_library_than_jetpack_6() -> None:
    """JetPack 6 is Ubuntu 22.04, with glibc 2.35."""
    readelf = shutil.which("readelf") or pytest.skip("needs readelf")
    text = run(readelf, "--version-info", FOLDER / "cpp" / "install" / "lib" / "libsam3rt.so")
    versions = {part for part in text.split() if part.startswith("GLIBC_2.")}
    assert versions
    assert max(int(name.removeprefix("GLIBC_2.").split(".")[0]) for name in versions) <= 35
