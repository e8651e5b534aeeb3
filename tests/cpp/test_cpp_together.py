"""Objects of several images in common runs of the decoder, over the stand-ins for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.cpp_driver import Build, Result, Step, as_prompts, prove_engines
from tests.support.cpp_machine import (
    BOX,
    CLICK,
    Machine,
    add_engines,
    loaded,
    many_objects,
    step,
)
from tests.support.golden_calls import Call, Golden, sam3_golden
from tests.support.helpers import noise, one_image_form
from tests.support.vectors import load

import sam3rt

IMAGES = [noise(60, 90), noise(300, 151, 1), noise(45, 8, 2), noise(8, 8, 3), noise(50, 70, 4)]
PARTS = ("masks", "iou", "low_res")
GROUPED = ("multimask_output", "return_logits")


@pytest.fixture
def proved(bundle: Path) -> Path:
    """A bundle with engines for four objects that have passed the gate."""
    return with_engines(bundle)


def with_engines(bundle: Path, **options: Any) -> Path:
    add_engines(bundle, **{"objects": 4, "points": 64, **options})
    prove_engines(bundle, {**load("engines")["machine"], "driver_version": "CUDA 12.4"})
    return bundle


def encoded(images: list[NDArray[np.uint8]]) -> list[Step]:
    return [step("encode", image=image, embedding=str(i)) for i, image in enumerate(images)]


def asked(prompts: list[dict[str, Any]], images: list[int] | None = None, **options: Any) -> Any:
    """Steps that put prompts on images together."""
    names = [str(i) for i in (range(len(prompts)) if images is None else images)]
    return [
        step("set_embedding_batch", embeddings=names),
        step("predict_batch", prompts=[as_prompts(p) for p in prompts], **options),
    ]


def one_by_one(
    prompts: list[dict[str, Any]], images: list[int] | None = None, **options: Any
) -> Iterator[Step]:
    for i, given in enumerate(prompts):
        yield step("set_embedding", embedding=str(i if images is None else images[i]))
        yield step("predict", prompts=as_prompts(given), **options)


def parts_of(result: Result, index: int) -> dict[str, NDArray[Any]]:
    return {part: result.arrays[f"{index}.{part}"] for part in PARTS}


def assert_as_alone(together: Result, alone: list[Result]) -> None:
    assert together.error is None, together.error
    assert together.value == len(alone)
    for index, single in enumerate(alone):
        assert single.error is None, single.error
        found = parts_of(together, index)
        for part, array in single.arrays.items():
            assert found[part].shape == array.shape
            assert found[part].dtype == array.dtype
        np.testing.assert_allclose(found["iou"], single.arrays["iou"], atol=1e-5)
        np.testing.assert_allclose(found["low_res"], single.arrays["low_res"], atol=1e-4)
        if found["masks"].dtype == np.float32:
            np.testing.assert_allclose(found["masks"], single.arrays["masks"], atol=1e-4)
        else:
            differing = (found["masks"] != single.arrays["masks"]).sum()
            assert differing <= 1e-3 * found["masks"].size


def runs(machine: Machine, *steps: Step) -> tuple[int, list[Result]]:
    """How often an engine ran, and the results."""
    results = machine.run(*steps)
    return machine.done()["runs"], results


def masks_for(model: Any, count: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(count)
    return rng.normal(0, 4, (count, 1, *model.manifest.prompts.mask_size)).astype(np.float32)


def test_every_golden_call(
    machine: Machine, proved: Path, tiny_model: Any, golden_images: dict[int, NDArray[np.uint8]]
) -> None:
    """In as few calls as their options allow: what Python has, and what each has alone."""
    golden: Golden = sam3_golden(tiny_model, golden_images)
    steps: list[Step] = [step("encode", image=i, embedding=n) for n, i in golden.images.items()]
    groups: dict[str, list[Call]] = {}
    for call in golden.calls:
        groups.setdefault(str((call.options, options_of(call))), []).append(call)
    assert max(map(len, groups.values())) > 8
    kept = []
    for calls in groups.values():
        steps += [
            step("predictor", **calls[0].options),
            step("set_embedding_batch", embeddings=[call.image for call in calls]),
            step(
                "predict_batch",
                prompts=[as_prompts(call.arguments) for call in calls],
                **options_of(calls[0]),
            ),
        ]
        batch = len(steps)
        for call in calls:
            steps += [
                step("set_embedding", embedding=call.image),
                step("predict", prompts=as_prompts(call.arguments), **options_of(call)),
            ]
        kept.append((calls, batch, range(batch + 2, len(steps) + 1, 2)))
    results = machine.run(loaded(proved), *steps)
    assert results[0].value["joins_images"]
    for calls, batch, alone in kept:
        assert_as_alone(results[batch], [results[i] for i in alone])
        for index, call in enumerate(calls):
            masks, iou, low_res = golden.expected[call.name]
            found = parts_of(results[batch], index)
            np.testing.assert_allclose(found["iou"], iou, atol=2e-3)
            np.testing.assert_allclose(found["low_res"], low_res, atol=2e-2, rtol=1e-3)
            assert ((found["masks"] > 0) != (masks > 0)).mean() < 2e-3


def options_of(call: Call) -> dict[str, Any]:
    return {name: value for name, value in call.arguments.items() if name in GROUPED}


@pytest.mark.parametrize("maps", ["float", "half"])
def test_prompts_of_all_kinds(machine: Machine, bundle: Path, tiny_model: Any, maps: str) -> None:
    """Mixed, of several classes of points, on images asked about twice, before and after runs are
    recorded."""
    with_engines(bundle, maps=maps)
    click: dict[str, Any] = {"point_coords": [[4, 4]], "point_labels": [1]}
    many = {"point_coords": np.full((20, 2), 6), "point_labels": np.ones(20)}
    none = {"point_coords": np.zeros((0, 1, 2)), "point_labels": np.zeros((0, 1))}
    prompts: list[dict[str, Any]] = [
        click,
        BOX,
        CLICK,
        many_objects(11),  # more than a run takes
        many,
        none,
        {},
        {**CLICK, "box": [1, 2, 30, 40]},
        {**click, "mask_input": masks_for(tiny_model, 1)[0]},
        {**click, "mask_input": masks_for(tiny_model, 2)[1]},
        {**many_objects(3), "mask_input": masks_for(tiny_model, 3)},
        click,
    ]
    images = [0, 1, 2, 3, 4, 0, 1, 1, 2, 3, 4, 0]
    cleaned = {"max_hole_area": 3, "max_sprinkle_area": 2}
    alone = list(one_by_one(prompts, images))
    batch = asked(prompts, images)
    results = machine.run(
        loaded(bundle), *encoded(IMAGES), step("predictor", **cleaned), *alone, *batch, *batch
    )
    first = len(IMAGES) + 2
    expected = results[first + 1 : first + len(alone) : 2]
    assert len(expected) == len(prompts)
    assert_as_alone(results[-3], expected)
    assert_as_alone(results[-1], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"return_logits": True},
        {"form": "bits"},
        {"best_mask_only": True, "foreground": 255},
        {"multimask_output": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_forms_of_results(machine: Machine, proved: Path, options: dict[str, Any]) -> None:
    prompts = [CLICK, BOX, CLICK, CLICK, many_objects(2)]
    results = machine.run(
        loaded(proved),
        *encoded(IMAGES),
        step("predictor", max_hole_area=3),
        *one_by_one(prompts, **options),
        *asked(prompts, **options),
    )
    assert_as_alone(results[-1], results[len(IMAGES) + 3 : -2 : 2])


def test_as_few_runs_as_objects_need(machine: Machine, proved: Path) -> None:
    start = [loaded(proved), *encoded(IMAGES), step("predictor")]
    five, _ = runs(machine, *start, *asked([CLICK] * 5))
    assert five == len(IMAGES) + 2
    # Masks make a kind of their own, and so do many points; an image that comes twice does not.
    many = {"point_coords": np.full((20, 2), 6), "point_labels": np.ones(20)}
    kinds, _ = runs(machine, *start, *asked([CLICK, many, CLICK, many], [0, 1, 0, 0]))
    assert kinds == len(IMAGES) + 2


@pytest.mark.parametrize("machine", ["tensorrt"], indirect=True)
def test_large_pictures(machine: Machine, proved: Path) -> None:
    """Two do not have their masks made at once, and a small one goes with either. 150 million
    pixels take too long with sanitizers."""
    images = [noise(5000, 5000), IMAGES[0], noise(5000, 5001)]
    start = [loaded(proved), *encoded(images), step("predictor")]
    count, results = runs(machine, *start, *asked([CLICK] * 3, form="bits"))
    assert count == len(images) + 2
    assert results[-1].arrays["2.masks"].shape == (3, 5000, 626)


def test_without_kernels(machine: Machine, proved: Path) -> None:
    """Masks are made on the host; the decoder's runs are shared all the same."""
    alone = machine.without_nvrtc(proved.parent / "alone")
    prompts = [CLICK] * 5
    results = machine.run(
        loaded(proved),
        *encoded(IMAGES),
        step("predictor"),
        *one_by_one(prompts),
        *asked(prompts),
        **alone,
    )
    assert machine.done()["kernels"] == 0
    # Five images, five clicks alone, and two runs together.
    assert machine.done()["runs"] == 12
    assert_as_alone(results[-1], results[len(IMAGES) + 3 : -2 : 2])


@pytest.mark.parametrize("form", ["old bundle", "old engines", "one object"])
def test_decoders_of_one_image(machine: Machine, bundle: Path, tmp_path: Path, form: str) -> None:
    """They run image by image."""
    if form == "old bundle":
        bundle = with_engines(one_image_form(tmp_path / "old", bundle).path)
    else:
        with_engines(bundle, **({"joined": 1} if form == "old engines" else {"objects": 1}))
    prompts = [CLICK, BOX, CLICK]
    start = [loaded(bundle), *encoded(IMAGES[:3]), step("predictor")]
    single, alone = runs(machine, *start, *one_by_one(prompts))
    count, results = runs(machine, *start, *asked(prompts))
    assert not results[0].value["joins_images"]
    assert count == single == 3 + (5 if form == "one object" else 3)
    assert_as_alone(results[-1], alone[6::2])


def test_little_memory(machine: Machine, proved: Path) -> None:
    """Where there is no room for several images' feature maps, one follows the other."""
    images = [noise(8, 8, seed) for seed in range(4)]
    prompts = [CLICK] * len(images)
    start = [loaded(proved), *encoded(images), step("predictor")]
    alone = machine.run(*start, *one_by_one(prompts))[len(start) + 1 :: 2]
    enough = machine.done()["peak"]
    plenty, results = runs(machine, *start, *asked(prompts))
    assert plenty == 5
    assert machine.done()["peak"] > enough * 3 // 2
    assert_as_alone(results[-1], alone)
    results = machine.run(*start, *asked(prompts), STAND_IN_MEMORY=str(enough))
    assert machine.done()["runs"] == 8
    assert_as_alone(results[-1], alone)


def test_what_is_refused(machine: Machine, proved: Path, tmp_path: Path) -> None:
    other = with_engines(one_image_form(tmp_path / "other", proved).path)
    many = {"point_coords": np.zeros((99, 2)), "point_labels": np.ones(99)}
    results = machine.run(
        {**loaded(other), "model": "other"},
        {**step("encode", image=IMAGES[0], embedding="another's"), "model": "other"},
        loaded(proved),
        *encoded(IMAGES[:2]),
        step("predictor"),
        step("predict_batch", prompts=[]),
        step("set_embedding_batch", embeddings=["0", "another's"]),
        step("predict_batch", prompts=[as_prompts(CLICK)] * 2),
        *asked([CLICK] * 3, [0, 1]),
        *asked([CLICK, {"point_coords": [[1, 2]]}]),
        *asked([CLICK, many]),
        *asked([CLICK] * 2, deadline=0),
        *asked([CLICK] * 2, foreground=0),
        *asked([]),
        step("predict"),
        *asked([CLICK] * 2),
        step("predict", prompts=as_prompts(CLICK)),
    )[6:]
    assert "set_embedding_batch" in results[0].refusal("StateError")
    message = results[2].refusal("EmbeddingError")
    fingerprints = [sam3rt.open_bundle(path).manifest.fingerprint for path in (other, proved)]
    assert all(fingerprint[:16] in message for fingerprint in fingerprints)
    results[4].refusal("PromptError", "prompts")
    message = results[6].refusal("PromptError", "prompts[1].point_labels")
    assert message.startswith("prompts[1].point_labels: got None with point_coords given, expected")
    assert "--max-points" in results[8].refusal("BackendError")
    results[10].refusal("CancelledError")
    results[12].refusal("InvalidInputError", "foreground")
    results[13].refusal("InvalidInputError", "embeddings")
    results[14].refusal("PromptError", "prompts")
    assert results[15].error is None
    # What failed has changed nothing; predict is about the last image.
    assert results[17].value == 2
    np.testing.assert_array_equal(results[18].arrays["masks"], results[17].arrays["1.masks"])


def test_onnxruntime_goes_image_by_image(cpp_build: Build, tiny_sam3: Path) -> None:
    prompts = [CLICK, BOX, many_objects(11), {}]
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": tiny_sam3},
            *encoded(IMAGES),
            step("predictor"),
            *one_by_one(prompts),
            *asked(prompts, [0, 1, 2, 3]),
        ]
    )
    assert not results[0].value["joins_images"]
    assert_as_alone(results[-1], results[len(IMAGES) + 3 : -2 : 2])
