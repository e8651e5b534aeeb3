"""The parts of the C++ runtime, one by one, against the Python runtime's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from tests.support.cpp_driver import EACH_BUILD, Build, Step
from tests.support.golden_calls import Golden
from tests.support.helpers import MOBILE_IMAGE, MOBILE_PROMPTS, SAM3_IMAGE, SAM3_PROMPTS, noise

import sam3rt
from sam3rt import PromptError, Prompts
from sam3rt.bundle import ImageSpec, MaskSpec, PromptSpec
from sam3rt.geometry import ImageGeometry, geometry, preprocess
from sam3rt.masks import MaskOptions, finish
from sam3rt.masks.components import small_components
from sam3rt.prompts import pack

SIZES = [(1, 1), (1, 7), (300, 451), (5, 2000), (1008, 1008), (1024, 1024), (1300, 700), (37, 1024)]
PIXEL_LIMIT = 1e-5


# --- hashes and images ----------------------------------------------------------------------------


@EACH_BUILD
def test_hashes(cpp_build: Build, tmp_path: Path) -> None:
    """Every length around a block's, in one piece and in several.

    The sanitized build has the portable code, the other one OpenSSL's where that is installed.
    """
    steps, expected = [], []
    for length in [*range(0, 200), 4096, 100_003]:
        content = np.random.default_rng(length).bytes(length)
        (tmp_path / str(length)).write_bytes(content)
        for piece in (1 << 20, 13):
            steps.append({"op": "hash", "path": tmp_path / str(length), "piece": piece})
            expected.append(hashlib.sha256(content).hexdigest())
    assert [result.value for result in cpp_build.run(steps)] == expected


@EACH_BUILD
@pytest.mark.parametrize("rounded", [True, False])
def test_resize_is_pillows(cpp_build: Build, rounded: bool) -> None:
    rng = np.random.default_rng(7)
    steps, expected = [], []
    sizes = [(*a, *b) for a, b in zip(SIZES, reversed(SIZES), strict=True)]
    sizes += [tuple(rng.integers(1, 300, 4).tolist()) for _ in range(40)]
    for height, width, new_height, new_width in sizes:
        image = noise(height, width, height)
        steps.append(
            {"op": "resize", "image": image, "target": [new_height, new_width], "rounded": rounded}
        )
        size, filter = (new_width, new_height), PIL.Image.Resampling.BILINEAR
        if rounded:
            expected.append(np.asarray(PIL.Image.fromarray(image).resize(size, filter)))
        else:
            planes = [PIL.Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
            expected.append(np.stack([np.asarray(p.resize(size, filter)) for p in planes], axis=-1))
    for result, array in zip(cpp_build.run(steps), expected, strict=True):
        # To the last bit, also without rounding: the same sums in the same order.
        np.testing.assert_array_equal(result.arrays["pixels"], array)


@EACH_BUILD
def test_preprocessing(cpp_build: Build, golden: Golden) -> None:
    spec = sam3rt.open_bundle(golden.bundle).manifest.image
    images = [noise(*size) for size in SIZES] + list(golden.images.values())
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": golden.bundle},
            *({"op": "preprocess", "model": "m", "image": image} for image in images),
        ]
    )[1:]
    for image, result in zip(images, results, strict=True):
        pixels, inside = preprocess(spec, image)
        assert tuple(result.value) == inside.input_size
        np.testing.assert_allclose(result.arrays["pixels"], pixels, atol=PIXEL_LIMIT, rtol=0)


@EACH_BUILD
@pytest.mark.parametrize("form", ["rgb", "bgr", "rgba", "bgra", "grey"])
def test_pixel_formats(cpp_build: Build, form: str) -> None:
    """As of the RGB image with the same colours, whichever axis is resized first, or none; also
    inside a larger image, as video frames often are."""
    order = {"rgb": "012", "bgr": "210", "rgba": "0120", "bgra": "2100", "grey": "0"}[form]
    places = [int(place) for place in order]
    image = noise(90, 31)
    if form == "grey":
        image[..., 1:] = image[..., :1]
    stored = np.ascontiguousarray(image[..., places])
    if form == "grey":
        stored = stored[..., 0]
    padded = np.full((90, 200), 77, np.uint8)
    padded[:, : 31 * len(places)] = stored.reshape(90, -1)
    steps, expected = [], []
    for target in ([20, 30], [90, 31], [200, 7], [90, 40], [45, 31]):
        for rounded in (True, False):
            step = {"op": "resize", "target": target, "rounded": rounded}
            expected.append({**step, "image": image})
            steps.append({**step, "image": stored, "format": form})
            steps.append({**step, "image": padded, "format": form, "width": 31})
    plain = cpp_build.run(expected)
    for index, result in enumerate(cpp_build.run(steps)):
        wanted = plain[index // 2].arrays["pixels"]
        np.testing.assert_array_equal(result.arrays["pixels"], wanted)


@EACH_BUILD
def test_what_is_no_image(cpp_build: Build, tiny_sam3: Path) -> None:
    views: list[Step] = [
        {"height": 1, "width": 1, "null": True},
        {"height": 0, "width": 1},
        {"height": 1, "width": 0},
        {"height": -1, "width": 1},
        {"height": 1, "width": 1 << 40},
        {"height": 2147483647, "width": 2147483647},
        {"height": 1 << 62, "width": 4},
        {"height": 1, "width": 1, "row_stride": 2},
        {"height": 5, "width": 1, "row_stride": 1 << 62},
        {"height": 5, "width": 1, "row_stride": -(1 << 62)},
        {"height": 1, "width": 1, "row_stride": -2},
    ]
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": tiny_sam3},
            *({"op": "encode_view", "model": "m", "embedding": "e", **view} for view in views),
            {"op": "encode_view", "model": "m", "embedding": "e", "height": 1, "width": 1},
        ]
    )
    assert results[-1].error is None
    for result in results[1:-1]:
        assert result.refusal("ImageError", "image").startswith("image: got ")


# --- prompts --------------------------------------------------------------------------------------


def pack_step(spec: PromptSpec, inside: ImageGeometry, prompts: Step) -> Step:
    return {
        "op": "pack",
        "box_position": spec.box_position,
        "padding_point": spec.padding_point,
        "mask_size": spec.mask_size,
        "original_size": inside.original_size,
        "input_size": inside.input_size,
        "prompts": prompts,
    }


def typed(prompts: dict[str, Any]) -> Step:
    """Prompts as arrays of the types that C++ takes."""
    with np.errstate(over="ignore"):
        return {
            name: value
            if isinstance(value, bool)
            else np.asarray(value, np.int64 if name == "point_labels" else np.float32)
            for name, value in prompts.items()
        }


def random_prompts(rng: np.random.Generator, mask_size: tuple[int, int]) -> dict[str, Any]:
    """Prompts of any kind; most fit each other, some do not."""
    objects = int(rng.integers(1, 4))
    count = int(rng.integers(0, 4))
    several = bool(rng.integers(2)) or objects > 1
    prompts: dict[str, Any] = {}
    if rng.random() < 0.6:
        shape = (objects, count) if several else (count,)
        prompts["point_coords"] = rng.uniform(-5, 600, (*shape, 2))
        prompts["point_labels"] = rng.integers(-1, 4, shape)
    if rng.random() < 0.5:
        boxes = rng.uniform(0, 300, (objects, 4))
        boxes[:, 2:] += boxes[:, :2]
        prompts["box"] = boxes if several else boxes[0]
    if rng.random() < 0.4:
        masks = rng.normal(size=(objects if rng.random() < 0.7 else 1, 1, *mask_size))
        prompts["mask_input"] = masks[0] if len(masks) == 1 and rng.random() < 0.5 else masks
    if rng.random() < 0.2:
        prompts["normalize_coords"] = False
    if rng.random() < 0.1:
        prompts["box"] = [10, 10, 5, 20]
    if rng.random() < 0.1:
        prompts.pop("point_labels", None)
    return prompts


@EACH_BUILD
@pytest.mark.filterwarnings("ignore::sam3rt.errors.PromptWarning")
@pytest.mark.parametrize("spec", [SAM3_PROMPTS, MOBILE_PROMPTS], ids=["sam3", "mobile_sam"])
def test_packing_prompts(cpp_build: Build, spec: PromptSpec) -> None:
    rng = np.random.default_rng(11)
    spec = PromptSpec(spec.box_position, spec.padding_point, (6, 4))
    image = SAM3_IMAGE if spec.box_position == "before_points" else MOBILE_IMAGE
    steps, cases = [], []
    for _ in range(300):
        inside = geometry(image, (int(rng.integers(1, 3000)), int(rng.integers(1, 3000))))
        prompts = typed(random_prompts(rng, spec.mask_size))
        steps.append(pack_step(spec, inside, prompts))
        cases.append((prompts, inside))
    refused = 0
    for (prompts, inside), result in zip(cases, cpp_build.run(steps), strict=True):
        try:
            expected = pack(Prompts(**prompts), spec, inside)
        except PromptError as caught:
            argument = caught.argument
            refused += 1
        else:
            argument = ""
        if argument:
            result.refusal("PromptError", argument)
            continue
        assert result.error is None, prompts
        np.testing.assert_array_equal(result.arrays["points"], expected.points)
        np.testing.assert_array_equal(result.arrays["labels"], expected.labels)
        if expected.masks is None:
            assert "masks" not in result.arrays
        else:
            np.testing.assert_array_equal(result.arrays["masks"], expected.masks)
    assert 20 < refused < 200


# --- masks ----------------------------------------------------------------------------------------


def blobs(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Logits with components of many sizes."""
    coarse = rng.normal(size=(max(1, height // 4), max(1, width // 4)))
    field = np.kron(coarse, np.ones((4, 4)))[:height, :width]
    field = np.pad(field, ((0, height - field.shape[0]), (0, width - field.shape[1])), "edge")
    return (4 * field + 2 * rng.normal(size=(height, width))).astype(np.float32)


@EACH_BUILD
def test_small_components(cpp_build: Build) -> None:
    rng = np.random.default_rng(5)
    masks = [
        rng.random((int(rng.integers(1, 40)), int(rng.integers(1, 40)))) < density
        for density in rng.uniform(0, 1, 150)
    ]
    masks += [np.ones((9, 9), bool), np.zeros((3, 3), bool), np.eye(12, dtype=bool)]
    areas = [float(rng.choice([0.5, 1, 2, 5, 30, 1e6])) for _ in masks]
    steps = [
        {"op": "components", "wanted": mask.astype(np.uint8), "max_area": area}
        for mask, area in zip(masks, areas, strict=True)
    ]
    found = 0
    for mask, area, result in zip(masks, areas, cpp_build.run(steps), strict=True):
        expected = small_components(mask, area)
        assert result.value == (expected is not None)
        if expected is not None:
            np.testing.assert_array_equal(result.arrays["small"], expected)
            found += 1
    assert found > 50


def finish_case(rng: np.random.Generator) -> tuple[Step, NDArray[Any]]:
    """Random logits, finished by the Python runtime."""
    sam3 = bool(rng.integers(2))
    spec = SAM3_IMAGE if sam3 else MOBILE_IMAGE
    side = int(rng.integers(4, 300))
    image = ImageSpec((side, side), spec.resize, spec.resize_dtype, spec.mean, spec.std)
    low = (int(rng.integers(1, 80)), int(rng.integers(1, 80)))
    masks = MaskSpec(3, low, None, "direct" if sam3 else "unpad", 0.0)
    inside = geometry(image, (int(rng.integers(1, 400)), int(rng.integers(1, 400))))
    shape = (int(rng.integers(1, 3)), int(rng.integers(1, 4)))
    low_res = np.stack([blobs(rng, *low) for _ in range(shape[0] * shape[1])])
    low_res = low_res.reshape(*shape, *low)
    options: dict[str, Any] = {
        "threshold": float(rng.choice([0.0, 0.0, 1.25, -0.7])),
        "max_hole_area": float(rng.choice([0, 4, 64, 1e9])),
        "max_sprinkle_area": float(rng.choice([0, 3, 50])),
        "return_logits": bool(rng.integers(2)),
    }
    step = {
        "op": "finish",
        "low_res": low_res,
        "padded": image.size,
        "upsampling": masks.upsampling,
        "original_size": inside.original_size,
        "input_size": inside.input_size,
        **options,
    }
    return step, finish(low_res, inside, image, masks, MaskOptions(**options))


@EACH_BUILD
def test_finishing_masks(cpp_build: Build) -> None:
    rng = np.random.default_rng(17)
    cases = [finish_case(rng) for _ in range(80)]
    results = cpp_build.run([step for step, _ in cases])
    differing, pixels = 0, 0
    for (step, expected), result in zip(cases, results, strict=True):
        found = result.arrays["masks"]
        assert found.shape == expected.shape
        if step["return_logits"]:
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
        else:
            differing += int((found != expected).sum())
            pixels += found.size
    # A value next to the threshold may fall either way.
    assert pixels > 1_000_000
    assert differing <= 1e-5 * pixels


# --- devices --------------------------------------------------------------------------------------


@EACH_BUILD
def test_copies_between_devices(cpp_build: Build) -> None:
    """The graph that moves feature maps to and from a GPU, here over the host's memory."""
    array = np.random.default_rng(0).normal(size=(1, 3, 5, 7)).astype(np.float32)
    result = cpp_build.one(op="copy_through_identity", array=array)
    assert result.value is True  # other memory, the same numbers
    np.testing.assert_array_equal(result.arrays["copy"], array)


@EACH_BUILD
def test_devices(cpp_build: Build, tiny_sam3: Path) -> None:
    load: Step = {"op": "load_model", "model": "m", "path": tiny_sam3}
    for device in ("", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:1000", "CUDA", "tensorrt:-1"):
        cpp_build.one(**load, device=device).refusal("InvalidInputError", "device")
    for name in ("threads", "concurrent_encodes", "concurrent_decodes"):
        cpp_build.one(**load, **{name: -1}).refusal("InvalidInputError", name)
    assert cpp_build.one(**load, device="auto", threads=1).value["device"] in ("cpu", "cuda:0")
    for device in ("cuda", "cuda:3", "tensorrt", "tensorrt-rtx:1"):
        result = cpp_build.one(**load, device=device)
        # Where there is such a device, the bundle still has no engines for it.
        if result.error is not None:
            assert device.partition(":")[0] in result.refusal("BackendError")


@EACH_BUILD
def test_values_that_were_moved_from_may_be_copied(cpp_build: Build) -> None:
    assert cpp_build.one(op="moved_from").value == [6, 0, 0, 0, 6, 0, 1.0]


@pytest.mark.parametrize(
    ("size", "target"), [((4000, 1500), (700, 1008)), ((2000, 3000), (1008,) * 2)]
)
def test_resizing_makes_no_whole_image_between(
    cpp_builds: Path, tmp_path: Path, size: tuple[int, int], target: tuple[int, int]
) -> None:
    """Rows first, then columns, and the other way round; it would take 36 or 24 MB."""
    step = {"op": "resize", "image": noise(*size), "target": list(target), "rounded": False}
    memory: Step = {"op": "memory"}
    before, _, after = Build(cpp_builds / "release", tmp_path).run([memory, step, memory])
    image, result = 3 * size[0] * size[1], 12 * target[0] * target[1]
    # The result is copied once by the driver.
    taken = after.value["peak"] - before.value["now"]
    assert taken < image + 2 * result + 8e6, taken
