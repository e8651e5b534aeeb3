"""Every golden case as a call: the image, the predictor's options and the arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.golden.sam2 import synthetic as sam2
from tests.golden.sam3 import synthetic as sam3
from tests.support.cpp_driver import EMULATOR
from tests.support.golden import arguments_of, mobile_sam_cases

import sam3rt

# Between the two languages. Of logits up to 162 in size: on another processor, sums have another
# order.
LOGIT_LIMIT = 1e-3 if EMULATOR else 1e-4
IOU_LIMIT = 1e-5
PIXEL_LIMIT = 1e-4


@dataclass(frozen=True)
class Call:
    """One call of ``predict``.

    Attributes:
        name: the golden case.
        image: which image it is about.
        options: the predictor's keyword arguments.
        arguments: those of ``predict``, with arrays for prompts.
    """

    name: str
    image: str
    options: dict[str, Any]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Golden:
    """All calls on one model, and what the Python runtime returns for them.

    Attributes:
        bundle: the model's bundle.
        images: by name, uint8 [H, W, 3].
        calls: in an order in which each mask prompt is known.
        expected: masks, IoUs and low-resolution logits by name of the call.
        features: the feature maps by name of the image.
    """

    bundle: Path
    images: dict[str, NDArray[np.uint8]]
    calls: list[Call]
    expected: dict[str, tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]]
    features: dict[str, dict[str, NDArray[np.float32]]]


def sam3_golden(model: sam3rt.SegmentationModel, images: dict[int, NDArray[np.uint8]]) -> Golden:
    """The cases of SAM 3's own predictor, batches as one call per image."""
    return _sam_golden(model, images, sam3.cases()["cases"])


def sam2_golden(model: sam3rt.SegmentationModel, images: dict[int, NDArray[np.uint8]]) -> Golden:
    """The cases of SAM 2's own predictor, likewise."""
    return _sam_golden(model, images, sam2.cases()["cases"])


def _sam_golden(
    model: sam3rt.SegmentationModel, images: dict[int, NDArray[np.uint8]], cases: list[Any]
) -> Golden:
    named = {str(number): image for number, image in images.items()}
    calls = []
    for case in cases:
        if "batch_args" in case:
            index = case["index"]
            arguments = {
                key.removesuffix("_batch"): value[index] if isinstance(value, list) else value
                for key, value in case["batch_args"].items()
            }
            calls.append(Call(case["id"], str(index), case["ctor"], arguments))
        else:
            arguments = dict(case["args"])
            if "mask_input" in case:
                arguments["mask_input"] = case["mask_input"]
            calls.append(Call(case["id"], str(case["image"]), case["ctor"], arguments))
    return _run(model, named, calls)


def mobile_sam_golden(
    model: sam3rt.SegmentationModel, photos: dict[str, NDArray[np.uint8]]
) -> Golden:
    """The cases of MobileSAM's own predictor on photographs."""
    calls = [
        Call(name, case["photo"], {}, arguments_of(case))
        for name, case in mobile_sam_cases().items()
    ]
    return _run(model, photos, calls)


def _run(
    model: sam3rt.SegmentationModel, images: dict[str, NDArray[np.uint8]], calls: list[Call]
) -> Golden:
    """Call the Python runtime, filling in mask prompts that are results of other calls."""
    embeddings = {name: model.encode(image) for name, image in images.items()}
    expected: dict[str, Any] = {}
    done = []
    waiting = list(calls)
    while waiting:
        call = waiting.pop(0)
        source = call.arguments.get("mask_input")
        if isinstance(source, dict):
            if source["from_case"] not in expected:
                waiting.append(call)
                continue
            low_res = expected[source["from_case"]][2][source["channel"]][None]
            call.arguments["mask_input"] = low_res
        predictor = sam3rt.SAM3InteractiveImagePredictor(model, **call.options)
        predictor.set_embedding(embeddings[call.image])
        expected[call.name] = predictor.predict(**call.arguments)
        done.append(call)
    features = {name: embedding.numpy() for name, embedding in embeddings.items()}
    return Golden(model.bundle.path, images, done, expected, features)


def check_call(
    call: Call, golden: Golden, masks: NDArray[Any], iou: NDArray[Any], low_res: NDArray[Any]
) -> None:
    """Compare one call's results with those of the Python runtime."""
    expected_masks, expected_iou, expected_low_res = golden.expected[call.name]
    assert masks.shape == expected_masks.shape
    assert iou.shape == expected_iou.shape
    assert low_res.shape == expected_low_res.shape
    np.testing.assert_allclose(low_res, expected_low_res, atol=LOGIT_LIMIT, rtol=0)
    np.testing.assert_allclose(iou, expected_iou, atol=IOU_LIMIT, rtol=0)
    if call.arguments.get("return_logits"):
        assert masks.dtype == np.float32
        np.testing.assert_allclose(masks, expected_masks, atol=LOGIT_LIMIT, rtol=0)
    else:
        assert masks.dtype == np.uint8
        assert set(np.unique(masks)) <= {0, 1}
        differing = (masks != expected_masks).mean(axis=(-2, -1))
        assert differing.max() <= PIXEL_LIMIT
