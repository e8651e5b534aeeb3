"""Images in device memory, masks left there, and batches: the C++ TensorRT backend over stand-ins.

On the stand-in for the GPU, what a stream was given is done when somebody waits for that stream,
and not before. So an image is not there yet when it is given to the library, and is only ever
there if the library's stream waits for the caller's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.support.cpp_driver import Build, Result, Step, as_prompts, prove_engines
from tests.support.cpp_machine import (
    CLICK,
    IMAGE,
    Machine,
    add_engines,
    as_step,
    loaded,
    many_objects,
    step,
)
from tests.support.helpers import noise
from tests.support.tensorrt_helpers import copy_bundle
from tests.support.vectors import load

import sam3rt

MEGABYTE = 1 << 20


def layouts(image: NDArray[np.uint8]) -> dict[str, Step]:
    """Layouts of images of one even size, by name; NV12 has its own pixels."""
    height, width = image.shape[:2]
    padded = np.zeros((height, 3 * width + 6), np.uint8)
    padded[:, : 3 * width] = image[::-1].reshape(height, -1)
    planes = np.moveaxis(image, 2, 0)
    spaced = np.zeros((3, height + 2, width + 10), np.uint8)
    spaced[:, :height, :width] = planes
    frame = noise(height * 3 // 2, width)[..., 0]
    far = np.zeros((height * 3 // 2 + 3, width + 8), np.uint8)
    far[:height, :width], far[height + 3 :, :width] = frame[:height], frame[height:]
    return {
        "rgb": {"image": image},
        "padded bottom up": {
            "image": padded,
            "width": width,
            "row_stride": -padded.shape[1],
            "first_row": height - 1,
        },
        "bgr": {"image": image[..., ::-1], "format": "bgr"},
        "rgba": {"image": np.dstack([image, image[..., :1]]), "format": "rgba"},
        "bgra": {"image": np.dstack([image[..., ::-1], image[..., :1]]), "format": "bgra"},
        "grey": {"image": image[..., 0], "format": "grey"},
        "planar": {"image": planes.reshape(-1, width), "format": "planar", "height": height},
        "planes apart": {
            "image": spaced.reshape(-1, width + 10),
            "format": "planar",
            "height": height,
            "width": width,
            "row_stride": width + 10,
            "plane_stride": (height + 2) * (width + 10),
        },
        "nv12": {"image": frame, "format": "nv12", "height": height},
        "nv12 apart": {
            "image": far,
            "format": "nv12_bt709",
            "height": height,
            "width": width,
            "row_stride": width + 8,
            "plane_stride": (height + 3) * (width + 8),
        },
    }


def assert_equal(found: Result, expected: Result) -> None:
    assert found.error is None, found.error
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)


def without(done: dict[str, int], *names: str) -> dict[str, int]:
    return {name: number for name, number in done.items() if name not in names}


def test_images_in_device_memory(machine: Machine, bundle: Path) -> None:
    """The same features as of the host's image, in every layout, from either kind of stream."""
    add_engines(bundle)
    steps: list[Step] = [loaded(bundle)]
    for number, layout in enumerate(layouts(IMAGE).values()):
        kind = "own" if number % 2 else "default"
        steps += [step("encode", **layout), step("maps")]
        steps += [step("encode", **layout, device=kind), step("maps")]
    results = machine.run(*steps)[1:]
    assert all(result.error is None for result in results)
    for expected, found in zip(results[1::4], results[3::4], strict=True):
        assert_equal(found, expected)
    # The library's stream waited for each, and nobody for a stream of the caller's.
    assert machine.done()["waits"] == len(layouts(IMAGE))
    assert machine.done()["others"] == 0


def test_nothing_crosses_the_bus(machine: Machine, bundle: Path) -> None:
    """Neither image nor masks: but for them, as much goes up and down as with the host's memory."""
    add_engines(bundle)
    # The first load runs the gate.
    machine.run(loaded(bundle))
    size = 3 * IMAGE.shape[0] * IMAGE.shape[1]
    output = {"output": size}
    before = [loaded(bundle), step("predictor"), step("set_image", image=IMAGE), as_step(CLICK)]
    machine.run(*before, step("set_image", image=IMAGE), as_step(CLICK, **output))
    host = machine.done()
    machine.run(*before, step("set_image", image=IMAGE, device="own"), as_step(CLICK, **output))
    done = machine.done()
    # The caller's upload has taken the library's place.
    assert (done["uploaded"], done["downloaded"]) == (host["uploaded"], host["downloaded"])
    results = machine.run(
        *before, step("set_image", image=IMAGE), as_step(CLICK, **output, device="own")
    )
    # The caller's download likewise; before, it filled that memory.
    assert machine.done()["uploaded"] == host["uploaded"] + size
    assert machine.done()["downloaded"] == host["downloaded"]
    assert results[-1].arrays["masks"].sum() == results[3].arrays["masks"].sum() > 0


def test_masks_in_device_memory(machine: Machine, bundle: Path) -> None:
    """Those that the host gets, and not before the caller is done with the memory."""
    add_engines(bundle, objects=8)
    calls: list[tuple[dict[str, Any], Step]] = [
        (CLICK, {}),
        (CLICK, {"multimask_output": False}),
        (CLICK, {"best_mask_only": True}),
        (CLICK, {"best_mask_only": True, "multimask_output": False}),
        # Several runs of the engine.
        (many_objects(19), {}),
        (many_objects(19), {"best_mask_only": True}),
    ]
    steps: list[Step] = [
        loaded(bundle),
        step("predictor", max_hole_area=3, max_sprinkle_area=2),
        step("set_image", image=IMAGE),
    ]
    for number, (prompts, options) in enumerate(calls):
        kind = "own" if number % 2 else "default"
        steps += [
            as_step(prompts, **options),
            as_step(prompts, **options, output=MEGABYTE, device=kind),
        ]
    results = machine.run(*steps)[3:]
    for expected, found in zip(results[::2], results[1::2], strict=True):
        assert_equal(found, expected)
        assert found.value["shape"] == list(expected.arrays["masks"].shape)
    assert len({result.arrays["masks"].shape for result in results}) == 4
    assert machine.done()["waits"] == len(calls)
    # It is the test that waits before it looks.
    assert machine.done()["others"] == len(calls)
    nothing = {"point_coords": np.zeros((0, 1, 2)), "point_labels": np.zeros((0, 1))}
    found = machine.run(*steps[:3], as_step(nothing, output=1, device="own"))[-1]
    assert found.value["shape"] == [0, 3, *IMAGE.shape[:2]]


def test_what_the_host_must_resize(
    machine: Machine, model: sam3rt.SegmentationModel, tmp_path: Path
) -> None:
    """An image that the kernels do not resize as the host does comes to the host for that."""
    bundle = copy_bundle(model.bundle.path, tmp_path / "bundle")
    add_engines(bundle, images=3)
    prove_engines(bundle, {**load("engines")["machine"], "driver_version": "CUDA 12.4"})
    tall = noise(90, 12)
    frames = layouts(tall)
    for layout in (frames["rgb"], frames["nv12"]):
        results = machine.run(
            loaded(bundle),
            step("encode", **layout),
            step("maps"),
            step("encode", **layout, device="own"),
            step("maps"),
        )
        assert_equal(results[4], results[2])
    batch = [tall, IMAGE, tall]
    prompts = [as_prompts(CLICK)] * 3
    results = machine.run(
        loaded(bundle),
        step("predictor"),
        step("set_image_batch", images=batch, device="own"),
        step("predict_batch", prompts=prompts),
        step("set_image_batch", images=batch),
        step("predict_batch", prompts=prompts),
    )
    assert_equal(results[3], results[5])


def test_batches_run_together(machine: Machine, bundle: Path, tiny_model: Any) -> None:
    """As many images at a time as the engine takes, of any sizes, with the results of one each."""
    images = [noise(40 + 9 * i, 90 - 11 * i) for i in range(6)]
    prompts = [as_prompts(CLICK)] * 6
    batch: list[Step] = [
        step("predictor"),
        step("set_image_batch", images=images),
        step("predict_batch", prompts=prompts),
        # Again, recorded, and one alone; then another number.
        step("set_image_batch", images=images),
        step("predict_batch", prompts=prompts),
        step("set_image", image=images[2]),
        as_step(CLICK),
        step("set_image_batch", images=images[:3]),
        step("predict_batch", prompts=prompts[:3]),
    ]
    runs = {}
    for most in (1, 4):
        add_engines(bundle, images=most)
        # The first load runs the gate.
        machine.run(loaded(bundle))
        results = machine.run(loaded(bundle), *batch)
        assert not [result.error for result in results if result.error]
        runs[most] = machine.done()["runs"]
        for index, image in enumerate(images):
            predictor = sam3rt.SAM3InteractiveImagePredictor(tiny_model)
            predictor.set_image(image)
            masks, iou, low_res = predictor.predict(**CLICK)
            for found in (results[3], results[5], results[9])[: 3 if index < 3 else 2]:
                differing = found.arrays[f"{index}.masks"] != masks
                assert differing.mean() < 2e-3
                np.testing.assert_allclose(found.arrays[f"{index}.iou"], iou, atol=2e-3)
                np.testing.assert_allclose(
                    found.arrays[f"{index}.low_res"], low_res, atol=2e-2, rtol=1e-3
                )
            if index == 2:
                np.testing.assert_allclose(results[7].arrays["iou"], iou, atol=2e-3)
    # Six, six and three images in two runs, two and one.
    assert runs[1] - runs[4] == 15 - 5


def test_batches_with_little_memory(machine: Machine, bundle: Path) -> None:
    """Images that do not fit into one run are encoded in more of them."""
    add_engines(bundle, images=4)
    machine.run(loaded(bundle))
    images = [noise(600 + i, 500) for i in range(4)]
    calls = [
        loaded(bundle),
        step("predictor"),
        step("set_image_batch", images=images),
        step("set_image", image=images[3]),
        as_step(CLICK, form="rle"),
    ]
    plenty = machine.run(*calls)
    runs, peak = machine.done()["runs"], machine.done()["peak"]
    scarce = machine.run(*calls, STAND_IN_MEMORY=str(peak * 2 // 3))
    assert not [result.error for result in scarce if result.error]
    assert machine.done()["runs"] == runs + 1
    assert scarce[4].value == plenty[4].value
    few = machine.run(*calls, STAND_IN_MEMORY="800000")
    assert "out of device memory" in few[2].refusal("BackendError")


def test_bad_images_in_device_memory(machine: Machine, bundle: Path) -> None:
    add_engines(bundle)
    given = step("encode", image=IMAGE, device="own")
    stray = {**given, "stream": "another's"}
    recorded = {**given, "stream": "recorded"}
    batch = step("set_image_batch", images=[IMAGE, IMAGE], device="host")
    results = machine.run(
        loaded(bundle),
        step("predictor"),
        {**given, "device": "host"},
        stray,
        recorded,
        batch,
        given,
    )
    message = results[2].refusal("ImageError", "image")
    assert "got an image in host memory, expected memory of cuda:0" in message
    assert "primary context" in results[3].refusal("InvalidInputError", "stream")
    assert "recorded" in results[4].refusal("InvalidInputError", "stream")
    results[5].refusal("ImageError", "images[0]")
    assert results[6].error is None
    (_, found) = machine.run(loaded(bundle), given, STAND_IN_OWNER="1")
    assert "memory of cuda:1" in found.refusal("ImageError", "image")


def test_bad_outputs_in_device_memory(machine: Machine, bundle: Path) -> None:
    add_engines(bundle)
    size = 3 * IMAGE.shape[0] * IMAGE.shape[1]
    cases: list[tuple[str, str, Step]] = [
        ("output", "host memory", {"device": "host"}),
        ("output", f"{size} for shape", {"output": size - 1}),
        ("output", "no memory", {"output": 0}),
        ("output_on_device", "bytes of 0 and 1", {"form": "bits"}),
        ("output_on_device", "bytes of 0 and 1", {"form": "rle"}),
        ("output_on_device", "bytes of 0 and 1", {"return_logits": True}),
        ("output_on_device", "bytes of 0 and 1", {"foreground": 255}),
        ("stream", "primary context", {"stream": "another's"}),
    ]
    results = machine.run(
        loaded(bundle),
        step("predictor"),
        step("set_image", image=IMAGE),
        *(
            as_step(CLICK, **{"output": size, "device": "own", **options})
            for _, _, options in cases
        ),
        as_step(CLICK, output=size // 3, device="own", best_mask_only=True),
    )
    for (subject, words, _), found in zip(cases, results[3:-1], strict=True):
        assert words in found.refusal("InvalidInputError", subject)
    assert results[-1].error is None


def test_without_kernels(machine: Machine, bundle: Path) -> None:
    """No NVRTC: what takes kernels is refused, and says so."""
    add_engines(bundle)
    alone = machine.without_nvrtc(bundle.parent / "alone")
    results = machine.run(
        loaded(bundle),
        step("predictor"),
        step("set_image", image=IMAGE),
        step("encode", image=IMAGE, device="own"),
        as_step(CLICK, output=MEGABYTE, device="own"),
        as_step(CLICK),
        **alone,
    )
    assert "NVRTC" in results[3].refusal("BackendError")
    assert "cannot be made on this GPU" in results[4].refusal("BackendError")
    assert results[5].error is None


def test_models_that_take_no_device_memory(cpp_build: Build, tiny_sam3: Path) -> None:
    """ONNX Runtime on the CPU: what is accepted is said, and nothing is read."""
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": tiny_sam3},
            step("predictor"),
            step("encode", image=IMAGE, device="host"),
            step("set_image", image=IMAGE),
            as_step(CLICK, output=MEGABYTE, device="host"),
            as_step(CLICK),
        ]
    )
    message = results[2].refusal("ImageError", "image")
    assert "expected host memory: this model runs in ONNX Runtime on cpu" in message
    assert "host memory" in results[4].refusal("InvalidInputError", "output")
    assert results[5].error is None


IN_C = """
import ctypes, sys
from ctypes import byref, c_size_t, c_uint64, c_void_p
from pathlib import Path
import numpy as np
from tests.support.c_library import Library, PredictOptions, Sam3rtError, image, prompts
from tests.support.cpp_machine import CLICK, IMAGE

cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    assert getattr(cuda, name)(*arguments) == 0, name
context, stream, there = c_void_p(), c_void_p(), [c_uint64(), c_uint64()]
call("cuDevicePrimaryCtxRetain", byref(context), 0)
call("cuCtxPushCurrent_v2", context)
call("cuStreamCreate", byref(stream), 0)
for address in there:
    call("cuMemAlloc_v2", byref(address), c_size_t(IMAGE.nbytes))

library = Library(Path(sys.argv[1]))
model = library.load(Path(sys.argv[2]), device=b"tensorrt")
predictor = library.predictor(model)
library.call("predictor_set_image", predictor, byref(image(IMAGE)))
expected = library.predict(predictor, CLICK)[0]

given = image(IMAGE)
call("cuMemcpyHtoDAsync_v2", there[0], c_void_p(given.pixels), c_size_t(IMAGE.nbytes), stream)
given.pixels, given.on_device, given.stream = there[0].value, 1, stream
library.call("predictor_set_image", predictor, byref(given))
options = PredictOptions(ctypes.sizeof(PredictOptions))
options.output, options.output_size = there[1].value, IMAGE.nbytes
options.output_on_device, options.stream = 1, stream
made = library.make("predictor_predict", predictor, byref(prompts(CLICK)), byref(options))
view = library.c.sam3rt_prediction_masks(made)
assert (view.values, list(view.shape)[:view.axes]) == (there[1].value, list(expected.shape))
found = np.empty_like(expected)
call("cuMemcpyDtoHAsync_v2", c_void_p(found.ctypes.data), there[1], c_size_t(found.nbytes), stream)
call("cuStreamSynchronize", stream)
assert found.any() and (found == expected).all()
library.c.sam3rt_prediction_free(made)

given = image(IMAGE)
given.on_device = 1
try:
    library.call("predictor_set_image", predictor, byref(given))
except Sam3rtError as error:
    assert (error.status, error.subject) == ("IMAGE_ERROR", "image"), error
    print("done")
"""


def test_in_c(cpp_builds: Path, bundle: Path, tmp_path: Path) -> None:
    """The C structures' fields, in a process whose driver is the stand-in."""
    add_engines(bundle)
    builds = tmp_path / "builds"
    for place, target in (
        ("install/lib/libsam3rt.so", cpp_builds / "tensorrt" / "libsam3rt.so"),
        ("dependencies", cpp_builds / "dependencies"),
    ):
        (builds / place).parent.mkdir(parents=True, exist_ok=True)
        (builds / place).symlink_to(target)
    done = subprocess.run(
        [sys.executable, "-c", IN_C, builds, bundle],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(cpp_builds / "tensorrt" / "tests" / "stand_in"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "STAND_IN_ONNXRUNTIME": str(
                cpp_builds / "dependencies" / "lib" / "libonnxruntime.so.1"
            ),
        },
    )
    assert done.stdout == "done\n", done.stdout + done.stderr
