"""The C++ library on the GPU, built here with what this machine has.

``ONNXRUNTIME_ROOT`` names an unpacked release of ONNX Runtime for CUDA, and ``TENSORRT_ROOT`` one
of TensorRT, if there is one: its headers are compiled, and Python's TensorRT builds the engines.
Without it the lanes run all the same, over a stand-in for TensorRT that computes in ONNX Runtime on
copies which it queues as TensorRT queues its kernels: memory, streams, graphs, kernels and events
are the GPU's.

With ``SAM3RT_FAKE_GPU=1``, the builds of ``make test-cpp`` run a model of 8x8 pixels on the CPU and
on the stand-in for the driver.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.gpu.conftest import FAKE, Card
from tests.support import golden_calls
from tests.support.cpp_driver import ROOT, Build, Result, Step, as_prompts
from tests.support.cpp_machine import CLICK, add_engines, as_step, loaded, step
from tests.support.helpers import noise

import sam3rt

# Share of mask pixels that may differ from those of the CPU in FP32: what the gate's mask IoU comes
# to.
PIXELS = 2e-2
# Between two ways to the same kernels on one GPU.
SAME = 1e-4
# Copies of 64 MB that an image in device memory waits for.
DELAY = 0 if FAKE else 200


class Way(NamedTuple):
    """One way in which the library runs a bundle on the GPU.

    Attributes:
        name: what runs the graphs.
        build: the library's build.
        device: as its callers name it.
        bundle: a SAM 3, with engines where it takes any.
        environment: what its programs need.
    """

    name: str
    build: Build
    device: str
    bundle: Path
    environment: dict[str, str]

    def run(self, *steps: Step) -> list[Result]:
        """Run steps on the loaded model, in one process; none may fail."""
        results = self.results(*steps)
        errors = [result.error for result in results if result.error]
        assert not errors, "\n".join(map(str, errors))
        return results

    def results(self, *steps: Step) -> list[Result]:
        """The same, but any may fail, except that the model is loaded; the log is printed."""
        log: Step = {"op": "log", "level": 1}
        model, *results, lines = self.build.run(
            [log, loaded(self.bundle, self.device), *steps, {"op": "log_lines"}],
            env=self.environment,
        )[1:]
        for level, line in lines.value:
            if level > 1 or not line.startswith("onnxruntime:"):
                print(line)
        assert model.error is None, model.error["message"]
        return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cpp")


@pytest.fixture(scope="module")
def model_bundle(request: pytest.FixtureRequest) -> Path:
    """The golden data's small SAM 3; on the fake GPU one that runs in no time."""
    path: Path = request.getfixturevalue("tiny_sam3" if FAKE else "small_bundle")
    return path


@pytest.fixture(scope="module", params=["onnxruntime", "stand-in", "tensorrt"])
def way(request: pytest.FixtureRequest, model_bundle: Path, card: Card, folder: Path) -> Way:
    """What is not installed is skipped."""
    name: str = request.param
    device = {"onnxruntime": "cuda"}.get(name, "tensorrt")
    bundle = folder / name / "sam3_small"
    exchange = folder / name / "exchange"
    exchange.mkdir(parents=True)
    shutil.copytree(model_bundle, bundle)
    if FAKE:
        builds = _given_builds()
        if name == "tensorrt":
            pytest.skip("TensorRT cannot be faked: the stand-in takes its place")
        if name == "onnxruntime":
            return Way(name, Build(builds / "release", exchange), "cpu", bundle, {})
        add_engines(bundle, images=2)
        environment = {
            "LD_LIBRARY_PATH": str(builds / "tensorrt" / "tests" / "stand_in"),
            "STAND_IN_ONNXRUNTIME": str(builds / "dependencies" / "lib" / "libonnxruntime.so.1"),
        }
        return Way(name, Build(builds / "tensorrt", exchange), device, bundle, environment)
    build = Build(_built(folder, "tensorrt" if name == "tensorrt" else "stand-in"), exchange)
    if name == "stand-in":
        gpu = card.device.gpu
        kind = {"name": gpu.name, "compute_capability": gpu.compute_capability}
        add_engines(bundle, images=2, gpu=kind)
    elif name == "tensorrt":
        _build_engines(bundle)
    return Way(name, build, device, bundle, {"LD_LIBRARY_PATH": _library_path()})


def _given_builds() -> Path:
    builds = os.environ.get("SAM3RT_CPP_BUILDS")
    if not builds:
        pytest.skip("SAM3RT_CPP_BUILDS names no builds: see `make test-cpp`")
    return Path(builds).resolve()


def _built(folder: Path, name: str) -> Path:
    """A build of the test programs: with TensorRT's headers, or the stand-in in their place."""
    root = os.environ.get("ONNXRUNTIME_ROOT")
    if not root:
        pytest.skip("ONNXRUNTIME_ROOT names no release of ONNX Runtime to build with")
    if name == "tensorrt" and not os.environ.get("TENSORRT_ROOT"):
        pytest.skip("TENSORRT_ROOT names no release of TensorRT to build with")
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} to build with")
    build = folder / f"build-{name}"
    if not build.exists():
        source = ROOT / "runtime" / "cpp"
        options = [f"-DONNXRUNTIME_ROOT={root}", "-DSAM3RT_TENSORRT=ON", "-DSAM3RT_TESTS=ON"]
        options.append(f"-DCMAKE_PREFIX_PATH={root}")
        if name != "tensorrt":
            stand_in = source / "tests" / "stand_in" / "nvinfer.cpp"
            options.append(f"-DSAM3RT_NVINFER_SOURCE={stand_in}")
        if shutil.which("ninja"):
            options += ["-G", "Ninja"]
        _call("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)
        _call("cmake", "--build", build, "--parallel", "--target", "driver", "threads")
    return build


def _call(*command: Any) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def _library_path() -> str:
    """Where programs look for libraries: also where Python's packages of NVIDIA's libraries lie."""
    packages = Path(np.__file__).parents[1]
    places = [
        *(
            Path(os.environ[name]) / "lib"
            for name in ("ONNXRUNTIME_ROOT", "TENSORRT_ROOT")
            if os.environ.get(name)
        ),
        *sorted(packages.glob("nvidia/*/lib")),
        packages / "tensorrt_libs",
    ]
    known = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return ":".join([*known, *map(str, places)]).strip(":")


def _build_engines(bundle: Path) -> None:
    pytest.importorskip("tensorrt", reason="Python's TensorRT builds the engines")
    from sam3rt_build.build import BuildOptions, build_bundle
    from sam3rt_build.errors import BuildError

    try:
        build_bundle(sam3rt.open_bundle(bundle), BuildOptions(backend="tensorrt", max_batch=2))
    except BuildError as error:
        if "no precision passes" in str(error):
            raise
        pytest.skip(f"TensorRT cannot build here: {error}")


@pytest.fixture(scope="module")
def golden(
    model_bundle: Path, golden_images: dict[int, NDArray[np.uint8]]
) -> Iterator[golden_calls.Golden]:
    """SAM 3's golden cases as calls, with the Python runtime's results on the CPU."""
    model = sam3rt.load_model(model_bundle, backend="onnxruntime", device="cpu")
    yield golden_calls.sam3_golden(model, golden_images)
    model.close()


def assert_masks(found: NDArray[Any], expected: NDArray[Any], limit: float) -> None:
    assert found.shape == expected.shape
    assert ((found > 0) != (expected > 0)).mean() <= limit


def test_golden_cases(way: Way, golden: golden_calls.Golden) -> None:
    steps: list[Step] = [
        step("encode", image=image, embedding=name) for name, image in golden.images.items()
    ]
    for call in golden.calls:
        options = ("multimask_output", "return_logits")
        chosen = {k: v for k, v in call.arguments.items() if k in options}
        steps += [
            step("predictor", **call.options),
            step("set_embedding", embedding=call.image),
            as_step(call.arguments, **chosen),
        ]
    results = way.run(*steps)
    for call, found in zip(golden.calls, results[len(golden.images) + 2 :: 3], strict=True):
        print(call.name)
        masks, iou, low_res = golden.expected[call.name]
        assert_masks(found.arrays["masks"], masks, PIXELS)
        assert found.arrays["low_res"].shape == low_res.shape
        np.testing.assert_allclose(found.arrays["iou"], iou, atol=0.05)


def test_the_gate(way: Way) -> None:
    verified, healthy, *_ = way.run(step("verify"), step("health"))
    assert verified.value["passed"], verified.value["explanation"]
    assert healthy.value["healthy"], healthy.value


def test_a_batch(way: Way, golden: golden_calls.Golden) -> None:
    images = list(golden.images.values())[:3]
    prompts = [as_prompts(CLICK)] * len(images)
    results = way.run(
        step("predictor"),
        step("set_image_batch", images=images),
        step("predict_batch", prompts=prompts),
        *(one for image in images for one in (step("set_image", image=image), as_step(CLICK))),
    )
    for index, single in enumerate(results[4::2]):
        assert_masks(results[2].arrays[f"{index}.masks"], single.arrays["masks"], PIXELS)


def test_device_memory(way: Way) -> None:
    """What the GPU has been told to write, but not written yet, is waited for by its streams."""
    if way.name == "onnxruntime":
        pytest.skip("device memory takes TensorRT without ONNX Runtime")
    image = noise(240, 320)
    frame = noise(360, 320)[..., 0]
    for layout in (
        {"image": image},
        {"image": image[..., ::-1], "format": "bgr"},
        {"image": frame, "format": "nv12", "height": 240},
    ):
        for kind in ("own", "default"):
            there = {"device": kind, "delay": DELAY}
            results = way.run(
                step("predictor"),
                step("set_image", **layout),
                as_step(CLICK),
                as_step(CLICK, best_mask_only=True),
                step("set_image", **layout, **there),
                as_step(CLICK, output=1 << 20, **there),
                as_step(CLICK, best_mask_only=True, output=1 << 20, **there),
            )
            for expected, found in ((results[2], results[5]), (results[3], results[6])):
                assert_masks(found.arrays["masks"], expected.arrays["masks"], SAME)
                np.testing.assert_allclose(
                    found.arrays["low_res"], expected.arrays["low_res"], atol=1e-2
                )


def test_bad_device_memory(way: Way) -> None:
    given = [
        step("encode", image=noise(24, 32), device="host"),
        step("predictor"),
        step("set_image", image=noise(24, 32)),
        as_step(CLICK, output=1 << 20, device="host"),
        as_step(CLICK),
    ]
    results = way.results(*given)
    assert "expected" in results[0].refusal("ImageError", "image")
    results[3].refusal("InvalidInputError", "output")
    assert results[4].error is None, results[4].error["message"]


def test_threads(way: Way, tmp_path: Path) -> None:
    """Four threads on one model, each with memory and streams of its own."""
    way.run()
    done = way.build.program("tests/threads", way.bundle, tmp_path, way.device, env=way.environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout == "4 threads, 0 failures\n"
