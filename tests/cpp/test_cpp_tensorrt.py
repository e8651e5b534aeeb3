"""The C++ runtime's own TensorRT backend, over stand-ins for the GPU, NVRTC and TensorRT.

The engines are the bundle's graphs, which the stand-in for TensorRT computes in ONNX Runtime. Their
memory, streams, recorded graphs and kernels are those of the stand-in for the driver, whose work is
not done before somebody waits for it, and which says at the end what was not given back. Both
libraries are there under their real names, and are found as the real ones are.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from tests.support.cpp_driver import Build, Step, as_prompts, prove_engines, shown_symbols
from tests.support.cpp_machine import (
    BOX,
    CLICK,
    EACH_MACHINE,
    FOLDER,
    IMAGE,
    Machine,
    add_engines,
    as_step,
    assert_same,
    loaded,
    many_objects,
    step,
)
from tests.support.helpers import noise
from tests.support.tensorrt_helpers import copy_bundle
from tests.support.vectors import load

import sam3rt


def mask_prompts(model: sam3rt.SegmentationModel, count: int) -> NDArray[np.float32]:
    size = model.manifest.prompts.mask_size
    rng = np.random.default_rng(4)
    return rng.normal(0, 5, (count, 1, *size)).astype(np.float32)


@EACH_MACHINE
@pytest.mark.parametrize("maps", ["float", "half"])
def test_predictions_are_those_of_the_graphs(
    machine: Machine, model: sam3rt.SegmentationModel, tmp_path: Path, maps: str
) -> None:
    """Calls of every class of shapes, before and after they are recorded."""
    bundle = copy_bundle(model.bundle.path, tmp_path / "bundle")
    add_engines(bundle, maps=maps)
    # The toy has no record that could prove it.
    prove_engines(bundle, {**load("engines")["machine"], "driver_version": "CUDA 12.4"})
    calls: list[dict[str, Any]] = [
        CLICK,
        CLICK,
        many_objects(4),
        {**many_objects(40), "multimask_output": False},
        {**CLICK, "mask_input": mask_prompts(model, 1)[0]},
    ]
    if model.manifest.model_type == "sam3":
        # The toy looks at the mean of all points, padding too, and of all objects' masks.
        calls += [BOX, {**many_objects(20), "mask_input": mask_prompts(model, 20)}]
    predictor = sam3rt.SAM3InteractiveImagePredictor(model, max_hole_area=3, max_sprinkle_area=2)
    predictor.set_image(IMAGE)
    expected = [predictor.predict(**call) for call in calls]
    results = machine.run(
        loaded(bundle),
        step("predictor", max_hole_area=3, max_sprinkle_area=2),
        step("set_image", image=IMAGE),
        *(as_step(call, multimask_output=call.get("multimask_output", True)) for call in calls),
    )
    assert results[0].value["device"] == "tensorrt:0"
    for found, prediction in zip(results[3:], expected, strict=True):
        assert_same(found, prediction)
    # Masks were made on the GPU, and by recorded graphs.
    assert machine.done()["launches"] >= 3
    assert machine.done()["kernels"] > 20


def test_forms_of_results(machine: Machine, bundle: Path, tiny_model: Any) -> None:
    """What becomes of masks that the GPU made: the same as of those that the host makes."""
    add_engines(bundle)
    forms: list[Step] = [
        {},
        {"foreground": 255},
        {"form": "bits"},
        {"form": "rle"},
        {"best_mask_only": True},
        {"best_mask_only": True, "form": "bits"},
        {"return_logits": True},
    ]
    results = machine.run(
        loaded(bundle),
        step("predictor"),
        step("set_image", image=IMAGE),
        *(as_step(many_objects(3), **form) for form in forms),
    )
    plain, bright, bits, rle, best, best_bits, logits = results[3:]
    masks = plain.arrays["masks"]
    np.testing.assert_array_equal(bright.arrays["masks"], masks * 255)
    np.testing.assert_array_equal(bits.arrays["masks"], np.packbits(masks, axis=-1))
    assert len(rle.value["rle"]) == 9
    chosen = plain.arrays["iou"].argmax(axis=1)
    expected = masks[np.arange(3), chosen][:, None]
    np.testing.assert_array_equal(best.arrays["masks"], expected)
    np.testing.assert_array_equal(best_bits.arrays["masks"], np.packbits(expected, axis=-1))
    assert ((logits.arrays["masks"] > 0) == masks).mean() > 0.998
    predictor = sam3rt.SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image(IMAGE)
    assert_same(plain, predictor.predict(**many_objects(3)))


@EACH_MACHINE
def test_embeddings_travel(machine: Machine, bundle: Path, tiny_model: Any, tmp_path: Path) -> None:
    """Files of embeddings are the same whatever made them, in either direction."""
    add_engines(bundle)
    expected = tiny_model.encode(IMAGE)
    expected.save(tmp_path / "cpu.embedding")
    results = machine.run(
        loaded(bundle),
        step("encode", image=IMAGE),
        step("maps"),
        step("load_embedding", path=tmp_path / "cpu.embedding"),
        step("maps"),
        step("decode", prompts=as_prompts(CLICK)),
        step("save_embedding", path=tmp_path / "gpu.embedding"),
    )
    assert results[1].value["nbytes"] == expected.nbytes
    for i, array in enumerate(expected.features.numpy()):
        np.testing.assert_allclose(results[2].arrays[str(i)], array, atol=1e-3)
        np.testing.assert_array_equal(results[4].arrays[str(i)], array)
    assert (tmp_path / "gpu.embedding").read_bytes() == (tmp_path / "cpu.embedding").read_bytes()


@EACH_MACHINE
def test_engines_are_proved_at_the_first_load(
    machine: Machine, bundle: Path, tmp_path: Path
) -> None:
    """By the bundle's record, once; what is wrong is refused, and the next one tried."""
    wrong = FOLDER.replace("fp16", "aaaa")
    add_engines(bundle, wrong, factor=1.2, recipe="fp16")
    add_engines(bundle, recipe="tf32")
    log = {"op": "log", "level": 1}
    lines = {"op": "log_lines"}
    first = machine.run(log, loaded(bundle), lines, step("health"))
    assert first[1].error is None
    text = str(first[2].value)
    assert f"not {wrong}: fails the gate on this machine" in text
    assert "compared with the parity record" in text
    assert first[3].value["healthy"], first[3].value
    # The decoder beside the wrong encoder is a right one.
    assert [first[3].value[name] for name in ("backend", "precision")] == ["tensorrt", "tf32+fp16"]
    verdicts = sorted((tmp_path / "cache" / "sam3rt" / "verdicts").iterdir())
    passed = [json.loads(path.read_text())["passed"] for path in verdicts]
    assert sorted(passed) == [False, True]
    second = machine.run(log, loaded(bundle), lines)
    assert "compared with the parity record" not in str(second[2].value)
    shutil.rmtree(bundle / "engines" / FOLDER)
    message = machine.run(loaded(bundle))[0].refusal("BackendError")
    assert "sam3rt build" in message


@EACH_MACHINE
def test_damaged_engines(machine: Machine, bundle: Path) -> None:
    add_engines(bundle)
    engine = bundle / "engines" / FOLDER / "decoder.engine"
    content = engine.read_bytes()
    engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    machine.run(loaded(bundle))[0].refusal("BundleError", "decoder.engine")
    add_engines(bundle, "another", recipe="fp32")
    assert machine.run(loaded(bundle))[0].error is None
    # What TensorRT refuses is no reason to stop, either.
    add_engines(bundle, maps="float", objects=0)
    assert machine.run(loaded(bundle))[0].error is None


@EACH_MACHINE
def test_versions_of_tensorrt(machine: Machine, bundle: Path) -> None:
    add_engines(bundle)
    message = machine.run(loaded(bundle), STAND_IN_TENSORRT="10.4.0.11")[0].refusal("BackendError")
    assert "version 10.4.0.11" in message
    message = machine.run(loaded(bundle), STAND_IN_TENSORRT="none")[0].refusal("BackendError")
    assert "cannot be loaded" in message
    # With the number of the build or without, as releases for Python differ.
    add_engines(bundle, tensorrt_version="10.3.0.26")
    assert machine.run(loaded(bundle))[0].error is None


@EACH_MACHINE
def test_without_a_driver(machine: Machine, bundle: Path) -> None:
    add_engines(bundle)
    environment = {"LD_LIBRARY_PATH": ""}
    (found,) = machine.build.run([loaded(bundle)], env=environment)
    assert "driver" in found.refusal("BackendError")
    (found,) = machine.build.run([loaded(bundle, "tensorrt:7")], env=machine.environment)
    assert "GPU 7" in found.refusal("BackendError")


@EACH_MACHINE
def test_auto(machine: Machine, bundle: Path) -> None:
    """TensorRT, then what ONNX Runtime has, if it is there; the log says why."""
    has_onnxruntime = machine.build.path.name == "address"
    log = {"op": "log", "level": 1}
    lines = {"op": "log_lines"}
    results = machine.run(log, loaded(bundle, "auto"), lines)
    if has_onnxruntime:
        assert results[1].value["device"] == "cpu"
        assert "has no tensorrt engines" in str(results[2].value)
        assert "CUDA cannot be used" in str(results[2].value)
    else:
        assert "has no tensorrt engines" in results[1].refusal("BackendError")
        message = machine.run(loaded(bundle, "cpu"))[0].refusal("BackendError")
        assert "built without ONNX Runtime" in message
    add_engines(bundle)
    assert machine.run(loaded(bundle, "auto"))[0].value["device"] == "tensorrt:0"


def test_the_example_says_what_computed(machine: Machine, bundle: Path, tmp_path: Path) -> None:
    add_engines(bundle)
    PIL.Image.fromarray(IMAGE).save(tmp_path / "image.png")
    output = tmp_path / "output"
    done = machine.build.program(
        "examples/sam3rt_segment",
        tmp_path / "image.png",
        *("--bundle", bundle, "--output", output, "--point=30,25", "--backend", "tensorrt"),
        env=machine.environment,
    )
    assert done.returncode == 0, done.stderr
    model = json.loads((output / "result.json").read_text())["model"]
    assert (model["backend"], model["device"]) == ("tensorrt", "tensorrt:0")


def test_without_graphs_and_kernels(machine: Machine, bundle: Path, tiny_model: Any) -> None:
    """Where nothing can be recorded, or there is no NVRTC, calls take longer and do the same."""
    add_engines(bundle)
    alone = machine.without_nvrtc(bundle.parent / "alone")
    predictor = sam3rt.SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image(IMAGE)
    expected = predictor.predict(**CLICK)
    calls = [
        {"op": "log", "level": 1},
        loaded(bundle),
        step("predictor"),
        step("set_image", image=IMAGE),
        as_step(CLICK),
        as_step(CLICK),
        {"op": "log_lines"},
    ]
    results = machine.run(*calls, STAND_IN_CAPTURE="0")
    assert_same(results[5], expected)
    assert machine.done()["launches"] == 0
    assert "runs without a CUDA graph" in str(results[6].value)
    results = machine.run(*calls, **alone)
    assert_same(results[5], expected)
    assert machine.done()["kernels"] == 0 < machine.done()["launches"]
    assert "images and masks are resized on the host" in str(results[6].value)


def test_short_memory(machine: Machine, bundle: Path) -> None:
    """Lanes are given up before calls fail, and a call that fails leaves the rest as it was."""
    add_engines(bundle)
    calls = [
        {"op": "log", "level": 2},
        loaded(bundle, concurrent_decodes=4),
        step("prepare"),
        step("predictor"),
        step("set_image", image=IMAGE),
        as_step(CLICK),
        {"op": "log_lines"},
    ]
    plenty = machine.run(*calls)
    peak = machine.done()["peak"]
    scarce = machine.run(*calls, STAND_IN_MEMORY=str(peak * 6 // 10))
    assert "calls at a time" in str(scarce[6].value)
    for name, array in plenty[5].arrays.items():
        np.testing.assert_array_equal(scarce[5].arrays[name], array)
    message = machine.run(loaded(bundle), STAND_IN_MEMORY="1000")[0].refusal("BackendError")
    assert "out of device memory" in message
    # A picture whose masks do not fit; then one whose masks do.
    large, small = noise(3000, 2000), noise(30, 40)
    results = machine.run(
        loaded(bundle),
        step("predictor"),
        step("set_image", image=small),
        as_step(CLICK),
        step("set_image", image=large),
        as_step(CLICK),
        step("set_image", image=small),
        as_step(CLICK),
        STAND_IN_MEMORY=str(12 << 20),
    )
    assert "out of device memory" in results[4].refusal("BackendError")
    np.testing.assert_array_equal(results[7].arrays["masks"], results[3].arrays["masks"])


def test_a_gpu_that_is_lost(machine: Machine, bundle: Path) -> None:
    add_engines(bundle)
    machine.run(loaded(bundle))
    results = machine.run(
        loaded(bundle),
        *(step("encode", image=IMAGE) for _ in range(60)),
        STAND_IN_LOST="50",
    )
    failed = [result for result in results if result.error is not None]
    assert failed
    assert results[0].error is None
    assert "cannot be used in this process any more" in failed[0].refusal("BackendError")
    assert results[-1].error is not None


def test_limits_of_engines(machine: Machine, bundle: Path) -> None:
    add_engines(bundle, objects=2, points=8)
    many = {"point_coords": np.zeros((9, 2)), "point_labels": np.ones(9)}
    results = machine.run(
        loaded(bundle),
        step("predictor"),
        step("set_image", image=IMAGE),
        as_step(many_objects(5)),
        as_step(many),
    )
    assert results[3].arrays["masks"].shape == (5, 3, *IMAGE.shape[:2])
    assert "--max-points" in results[4].refusal("BackendError")


def test_threads_share_lanes(cpp_builds: Path, bundle: Path, tmp_path: Path) -> None:
    """Under ThreadSanitizer: the program that has its own test on the CPU."""
    add_engines(bundle)
    build = Build(cpp_builds / "thread", tmp_path)
    environment = {
        "LD_LIBRARY_PATH": str(build.path / "tests" / "stand_in"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    done = build.program("tests/threads", bundle, tmp_path, "tensorrt", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert done.stdout == "4 threads, 0 failures\n"


def test_a_library_without_onnxruntime(cpp_builds: Path) -> None:
    """It needs nothing of ONNX Runtime's, and has the same interfaces."""
    library = cpp_builds / "tensorrt" / "libsam3rt.so"
    needed = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    assert "onnxruntime" not in needed
    assert set((Path(__file__).with_name("symbols.txt")).read_text().splitlines()) <= shown_symbols(
        library
    )
