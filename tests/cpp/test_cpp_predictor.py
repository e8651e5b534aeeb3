"""The C++ predictor's state and memory, beyond the vectors of calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.support.cpp_driver import Build, Result, Step, as_prompts
from tests.support.helpers import noise
from tests.support.runnable_bundle import runnable_bundle

import sam3rt
from sam3rt.bundle.default import default_bundle_path

CLICK = as_prompts({"point_coords": [[30, 25]], "point_labels": [1]})
FIRST, SECOND = noise(50, 70), noise(64, 40, 1)


def run(build: Build, bundle: Path, *steps: Step) -> list[Result]:
    """Run steps on a predictor "p" of a model "m"; their results."""
    before: list[Step] = [
        {"op": "load_model", "model": "m", "path": bundle},
        {"op": "predictor", "model": "m", "predictor": "p"},
    ]
    return build.run([*before, *steps])[len(before) :]


def step(op: str, **arguments: Any) -> Step:
    return {"op": op, "predictor": "p", **arguments}


def same(a: Result, b: Result) -> None:
    assert a.arrays.keys() == b.arrays.keys() == {"masks", "iou", "low_res"}
    for name, array in a.arrays.items():
        np.testing.assert_allclose(array, b.arrays[name], atol=1e-5, rtol=0)


def test_what_fails_leaves_everything_as_it_was(cpp_build: Build, tiny_sam3: Path) -> None:
    results = run(
        cpp_build,
        tiny_sam3,
        step("set_image_batch", images=[FIRST, SECOND]),
        step("predict", prompts=CLICK),
        step("set_image_batch", images=[]),
        step("set_image_batch", images=[FIRST, None]),
        step("predict_batch", prompts=[{}]),
        step("predict_batch", prompts=[{}, {"point_coords": np.zeros((1, 2), np.float32)}]),
        step("predict", prompts={"box": np.float32([3, 2, 1, 4])}),
        step("predict", prompts={"mask_input": np.zeros((1, 5, 5), np.float32)}),
        step("predict", prompts=CLICK),
        step("predict_batch", prompts=[CLICK, CLICK]),
    )
    results[2].refusal("ImageError", "images")
    results[3].refusal("ImageError", "images[1]")
    assert "batch (2)" in results[4].refusal("PromptError", "prompts")
    results[5].refusal("PromptError", "prompts[1].point_labels")
    results[6].refusal("PromptError", "box")
    results[7].refusal("PromptError", "mask_input")
    # predict uses the last image of the batch.
    assert results[1].arrays["masks"].shape == (3, *SECOND.shape[:2])
    same(results[8], results[1])
    assert results[9].value == 2
    np.testing.assert_allclose(results[9].arrays["1.iou"], results[1].arrays["iou"], atol=1e-5)
    assert results[9].arrays["0.masks"].shape == (3, *FIRST.shape[:2])


def test_hole_area_is_the_models_own_unless_given(
    cpp_build: Build, model: sam3rt.SegmentationModel
) -> None:
    """256 for SAM 3 and 0 for MobileSAM, as in Python."""
    default = model.manifest.masks.max_hole_area
    assert default == (256 if model.manifest.model_type == "sam3" else 0)
    steps: list[Step] = [
        {"op": "load_model", "model": "m", "path": model.bundle.path},
        {"op": "encode", "model": "m", "embedding": "e", "image": FIRST},
    ]
    options: list[Step] = [{}, {"max_hole_area": 0}, {"max_hole_area": 256}]
    for option in options:
        steps += [
            {"op": "predictor", "model": "m", "predictor": "p", **option},
            step("set_embedding", embedding="e"),
            step("predict", prompts=CLICK),
        ]
    unset, none, filled = (result.arrays["masks"] for result in cpp_build.run(steps)[4::3])
    assert (none != filled).any()
    np.testing.assert_array_equal(unset, filled if default else none)


def test_best_mask_and_value_of_foreground(cpp_build: Build, tmp_path: Path) -> None:
    bundle = runnable_bundle(tmp_path / "bundle").path
    several = {"box": np.float32([[1, 2, 30, 40], [5, 6, 50, 44], [9, 9, 20, 20]])}
    predict = step("predict", prompts=several)
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": bundle},
            {"op": "predictor", "model": "m", "predictor": "p", "max_hole_area": 0},
            step("set_image", image=FIRST),
            predict,
            {**predict, "best_mask_only": True, "foreground": 255},
            {**predict, "best_mask_only": True, "return_logits": True},
            {**predict, "best_mask_only": True, "multimask_output": False},
            {**predict, "foreground": 0},
        ]
    )
    every, best, logits, single = (result.arrays for result in results[3:7])
    chosen = every["iou"].argmax(axis=1)
    for name, array in best.items():
        expected = every[name][np.arange(3), chosen][:, None]
        np.testing.assert_array_equal(array, expected * 255 if name == "masks" else expected)
    np.testing.assert_array_equal(logits["masks"] > 0, best["masks"] > 0)
    assert single["masks"].shape == (3, 1, *FIRST.shape[:2])
    results[7].refusal("InvalidInputError", "foreground")


def test_objects_with_different_numbers_of_points(cpp_build: Build, tiny_sam3: Path) -> None:
    """In one call, each has the result of a call of its own."""
    points = np.random.default_rng(2).uniform(5, 60, (6, 2)).astype(np.float32)
    labels = np.array([1, 0, 1, 1, 0, 1])
    counts = np.array([3, 1, 2])
    decode: Step = {"op": "decode", "model": "m", "embedding": "e"}
    steps: list[Step] = [{"op": "encode", "model": "m", "embedding": "e", "image": FIRST}]
    given = {"point_coords": points, "point_labels": labels, "point_counts": counts}
    steps.append({**decode, "prompts": given})
    for end, count in zip(np.cumsum(counts), counts, strict=True):
        own = slice(end - count, end)
        alone = {"point_coords": points[own], "point_labels": labels[own]}
        steps.append({**decode, "prompts": alone})
    _, together, *alone_results = run(cpp_build, tiny_sam3, *steps)
    for index, result in enumerate(alone_results):
        for name, array in result.arrays.items():
            np.testing.assert_allclose(together.arrays[name][index], array[0], atol=2e-3)


def test_counts_that_do_not_fit(cpp_build: Build, tiny_sam3: Path) -> None:
    two = {"point_coords": np.float32([[1, 2], [3, 4]]), "point_labels": np.array([1, 0])}
    flat = {"point_coords": np.zeros((2, 1, 2), np.float32), "point_labels": np.ones((2, 1), int)}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("point_counts", {**two, "point_counts": np.array([1, 2])}),
        ("point_counts", {**two, "point_counts": np.array([3, -1])}),
        ("point_counts", {**two, "point_counts": np.array([[1, 1]])}),
        ("point_counts", {**two, "point_counts": np.zeros(1025, int)}),
        ("point_counts", {**two, "point_counts": np.array([1 << 62, 1 << 62])}),
        ("point_coords", {**flat, "point_counts": np.array([1, 1])}),
        ("point_coords", {"point_counts": np.array([1, 1])}),
        ("point_labels", {"point_coords": two["point_coords"], "point_counts": np.array([2])}),
        ("box", {**two, "point_counts": np.array([1, 1]), "box": np.float32([1, 2, 3, 4])}),
    ]
    steps = [step("predict", prompts=given) for _, given in cases]
    results = run(cpp_build, tiny_sam3, step("set_image", image=FIRST), *steps)[1:]
    for (argument, _), result in zip(cases, results, strict=True):
        result.refusal("PromptError", argument)


# --- many objects, many threads -------------------------------------------------------------------


def boxes(count: int) -> np.ndarray:
    """Boxes within the first image."""
    corners = np.random.default_rng(4).uniform(0, 30, (count, 4))
    corners[:, 2:] += corners[:, :2] + 1
    return corners.astype(np.float32)


def test_many_objects_are_decoded_a_few_at_a_time(cpp_build: Build, tiny_sam3: Path) -> None:
    """The results are those of calls with few objects, to the last bit."""
    many = boxes(19)
    masks = np.random.default_rng(5).normal(size=(19, 1, 16, 16)).astype(np.float32)
    parts = [slice(0, 8), slice(8, 16), slice(16, 19)]
    decode: Step = {"op": "decode", "model": "m", "embedding": "e"}
    steps: list[Step] = [{"op": "encode", "model": "m", "embedding": "e", "image": FIRST}]
    for given in (
        {"box": many},
        {"box": many, "mask_input": masks},
        {"box": many, "mask_input": masks[0]},
    ):
        steps.append({**decode, "prompts": given})
        for part in parts:
            few = {k: v[part] if len(v) == len(many) else v for k, v in given.items()}
            steps.append({**decode, "prompts": few})
    results = run(cpp_build, tiny_sam3, *steps)[1:]
    assert not [result.error for result in results if result.error]
    for start in (0, 4, 8):
        whole, *pieces = results[start : start + 4]
        assert whole.arrays["low_res"].shape == (19, 3, 16, 16)
        for name, array in whole.arrays.items():
            expected = np.concatenate([piece.arrays[name] for piece in pieces])
            np.testing.assert_array_equal(array, expected)


def test_models_share_threads_that_rest_between_runs(cpp_builds: Path, tmp_path: Path) -> None:
    """Unless a model asks for threads of its own."""
    path = runnable_bundle(tmp_path / "bundle").path
    steps: list[Step] = []
    for name, threads in (("a", 0), ("b", 0), ("c", 2)):
        decode = {"model": name, "embedding": "e", "prompts": CLICK}
        steps += [
            {"op": "load_model", "model": name, "path": path, "threads": threads},
            {"op": "prepare", "model": name},
            {"op": "threads"},
            {"op": "encode", "model": name, "embedding": "e", "image": FIRST},
            {"op": "rest_after_decode", **decode},
        ]
    results = Build(cpp_builds / "release", tmp_path).run(steps)
    first, second, third = (result.value for result in results[2::5])
    # Beside the calling thread one for the encoder, and for each of the decoder's two parts.
    assert (first, second, third) == (first, first, first + 3)
    assert max(result.value for result in results[4::5]) < 0.01


def test_environment_of_the_host(cpp_build: Build, tmp_path: Path) -> None:
    """Its logger gets ONNX Runtime's lines, and it has no threads that sessions could share."""
    bundle = runnable_bundle(tmp_path / "bundle").path
    steps: list[Step] = [
        {"op": "load_model", "model": "m", "path": bundle},
        {"op": "encode", "model": "m", "embedding": "e", "image": FIRST},
        {"op": "decode", "model": "m", "embedding": "e", "prompts": CLICK},
    ]
    host = [{"op": "set_environment"}]
    ours = cpp_build.run([*steps, *host])
    assert "before anything else" in ours[-1].refusal("StateError")
    hosts = cpp_build.run([*host, *steps, {"op": "host_lines"}, *host])
    assert hosts[4].value > 0
    hosts[5].refusal("StateError")
    for name, array in ours[2].arrays.items():
        np.testing.assert_array_equal(hosts[3].arrays[name], array)


def test_results_are_the_only_large_memory_of_a_click(cpp_builds: Path, tmp_path: Path) -> None:
    """At 12 megapixels; the tables for resizing are kept from the click before."""
    bundle = runnable_bundle(tmp_path / "bundle").path
    done = Build(cpp_builds / "release", tmp_path).program("tests/allocations", bundle, 3000, 4000)
    assert done.returncode == 0, done.stderr
    count, taken, results = map(int, done.stdout.split())
    assert results > 3 * 3000 * 4000
    assert taken < 1.01 * results
    assert count <= 45


def test_memory_does_not_grow_with_objects(cpp_builds: Path, tmp_path: Path) -> None:
    steps: list[Step] = [
        {"op": "encode", "model": "m", "embedding": "e", "image": FIRST},
        {"op": "decode", "model": "m", "embedding": "e", "prompts": CLICK},
        {"op": "memory"},
        {"op": "decode", "model": "m", "embedding": "e", "prompts": {"box": boxes(64)}},
        {"op": "memory"},
        {"op": "decode", "model": "m", "embedding": "e", "prompts": CLICK},
        {"op": "memory"},
    ]
    results = run(Build(cpp_builds / "release", tmp_path), default_bundle_path(), *steps)
    before, after, clicked = (results[index].value for index in (2, 4, 6))
    # At once they would take more than 2 GB. 64 objects' results take 50 MB.
    assert after["peak"] - before["now"] < 700e6
    # Kept for more of them, until there is a click.
    assert clicked["now"] - before["now"] < 200e6


def test_encodes_at_once_are_bounded(cpp_builds: Path, tmp_path: Path) -> None:
    build = Build(cpp_builds / "release", tmp_path)
    peaks = []
    for allowed in (1, 4):
        load = {"op": "load_model", "model": "m", "path": default_bundle_path(), "threads": 1}
        results = build.run(
            [
                {**load, "concurrent_encodes": allowed},
                {"op": "prepare", "model": "m"},
                {"op": "memory"},
                {"op": "encode_at_once", "model": "m", "image": FIRST, "threads": 4},
                {"op": "memory"},
            ]
        )
        assert not [result.error for result in results if result.error]
        peaks.append(results[4].value["peak"] - results[2].value["now"])
    assert peaks[0] < 0.6 * peaks[1], peaks
