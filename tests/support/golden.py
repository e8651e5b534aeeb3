"""The reference predictors' real outputs, and how far a result is from them.

The golden tests hold these distances to limits. tests/golden/*/README.md say what the data is.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.golden.efficientsam3 import synthetic as efficient_sam3
from tests.golden.sam2 import synthetic as sam2
from tests.golden.sam3 import synthetic as sam3

from sam3rt import ImageEmbedding, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.accuracy.metrics import largest_error, mask_ious

_MOBILE_SAM = Path(__file__).resolve().parents[1] / "golden" / "mobile_sam"

# Both predictors have one interface, and their golden data one form.
_SYNTHETIC: dict[str, ModuleType] = {"sam3": sam3, "sam2": sam2}

Case = dict[str, Any]
Prediction = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]


@cache
def sam_outputs(family: str) -> dict[str, NDArray[Any]]:
    """What the own predictor of SAM 3 or 2 returned on the small synthetic model, by name."""
    return dict(np.load(_SYNTHETIC[family].FOLDER / "golden.npz"))


@cache
def sam_cases(family: str) -> dict[str, Case]:
    """The calls behind it, by name."""
    return {case["id"]: case for case in _SYNTHETIC[family].cases()["cases"]}


def predict_sam_case(
    family: str, name: str, model: SegmentationModel, embeddings: dict[int, ImageEmbedding]
) -> Prediction:
    """Answer one call, and before it the one that its mask prompt comes from."""
    case = sam_cases(family)[name]
    predictor = SAM3InteractiveImagePredictor(model, **case["ctor"])
    predictor.set_embedding(embeddings[case["image"]])
    arguments = dict(case["args"])
    if "mask_input" in case:
        source = case["mask_input"]
        low_res = predict_sam_case(family, source["from_case"], model, embeddings)[2]
        arguments["mask_input"] = low_res[source["channel"]][None]
    return predictor.predict(**arguments)


def sam_errors(family: str, name: str, prediction: Prediction) -> dict[str, float]:
    """Largest errors of one call: of logits and of predicted IoUs, and the share of mask pixels."""
    masks, iou, low_res = prediction
    outputs = sam_outputs(family)
    logits = largest_error(low_res[..., ::3, ::3], outputs[f"{name}/low_res"])
    if f"{name}/logits" in outputs:
        logits = max(logits, largest_error(masks[..., ::7, ::7], outputs[f"{name}/logits"]))
    differing = ((masks > 0) != _unpacked(outputs[f"{name}/masks"], masks)).mean(axis=(-2, -1))
    return {
        "logits": logits,
        "iou": largest_error(iou, outputs[f"{name}/iou"]),
        "mask_pixels": float(differing.max()),
    }


def sam_feature_error(family: str, number: int, embedding: ImageEmbedding) -> float:
    """The largest error of the feature maps of one golden image, and of their statistics."""
    fine, middle, coarse = embedding.numpy().values()
    outputs = sam_outputs(family)
    stats = [[a.mean(), a.std(), np.abs(a).max()] for a in (fine, middle, coarse)]
    errors = [
        largest_error(coarse[:, ::8, ::4, ::4], outputs[f"image{number}/image_embed"]),
        largest_error(fine[:, ::8, ::16, ::16], outputs[f"image{number}/high_res_0"]),
        largest_error(middle[:, ::8, ::8, ::8], outputs[f"image{number}/high_res_1"]),
        largest_error(np.ravel(stats), outputs[f"image{number}/stats"].ravel()),
    ]
    return float(np.max(errors))


@cache
def mobile_sam_outputs() -> dict[str, NDArray[Any]]:
    """What MobileSAM's own predictor returned on photographs, by name."""
    return dict(np.load(_MOBILE_SAM / "golden.npz"))


@cache
def mobile_sam_document() -> dict[str, Any]:
    """The parsed ``cases.json``: the photographs and the calls."""
    parsed: dict[str, Any] = json.loads((_MOBILE_SAM / "cases.json").read_text())
    return parsed


@cache
def mobile_sam_cases() -> dict[str, Case]:
    """The calls, by name."""
    return {case["id"]: case for case in mobile_sam_document()["cases"]}


def arguments_of(case: Case) -> dict[str, Any]:
    """The arguments of ``predict`` for one of MobileSAM's calls."""
    arguments = {key: value for key, value in case["args"].items() if value is not None}
    if "boxes" in arguments:
        arguments["box"] = arguments.pop("boxes")
    if "mask_input" in case:
        source = case["mask_input"]
        with np.load(_MOBILE_SAM / "mask_inputs.npz") as masks:
            arguments["mask_input"] = masks[f"{source['from_case']}/{source['channel']}"][None]
    return arguments


def mobile_sam_errors(name: str, prediction: Prediction) -> dict[str, Any]:
    """Largest errors of one call, and the IoU of each of its masks with the reference's."""
    masks, iou, low_res = prediction
    outputs = mobile_sam_outputs()
    logits = largest_error(low_res[..., ::3, ::3], outputs[f"{name}/low_res"])
    if f"{name}/logits" in outputs:
        logits = max(logits, largest_error(masks[..., ::7, ::7], outputs[f"{name}/logits"]))
    return {
        "logits": logits,
        "iou": largest_error(iou, outputs[f"{name}/iou"]),
        "mask_ious": mask_ious(masks, _unpacked(outputs[f"{name}/masks"], masks)),
    }


@cache
def efficient_sam3_outputs() -> dict[str, NDArray[Any]]:
    """What EfficientSAM3's own code returned for its three synthetic students, by name."""
    return dict(np.load(efficient_sam3.FOLDER / "golden.npz"))


def efficient_sam3_feature_error(
    student: str, fine: NDArray[Any], middle: NDArray[Any], coarse: NDArray[Any]
) -> float:
    """The largest error of a student's feature maps [1, C, h, w], and of their statistics."""
    outputs = efficient_sam3_outputs()
    stats = [[a.mean(), a.std(), np.abs(a).max()] for a in (fine, middle, coarse)]
    errors = [
        largest_error(fine[0, ::8, ::16, ::16], outputs[f"{student}/high_res_0"]),
        largest_error(middle[0, ::8, ::8, ::8], outputs[f"{student}/high_res_1"]),
        largest_error(coarse[0, ::8, ::4, ::4], outputs[f"{student}/image_embed"]),
        largest_error(np.ravel(stats), outputs[f"{student}/stats"][4:].ravel()),
    ]
    return float(np.max(errors))


# The calls behind the outputs, by name.
EFFICIENT_SAM3_CALLS: dict[str, dict[str, Any]] = {
    "point": {"point_coords": np.array([[320, 240]]), "point_labels": np.array([1])},
    "box": {"box": np.array([150, 100, 420, 330]), "multimask_output": False},
}


def efficient_sam3_errors(
    student: str, call: str, prediction: Prediction, *, holes_filled: bool
) -> dict[str, float]:
    """Largest errors of one call: of logits and of predicted IoUs, and the share of mask pixels."""
    masks, iou, low_res = prediction
    outputs, name = efficient_sam3_outputs(), f"{student}/{call}"
    expected = _unpacked(outputs[f"{name}/masks{'' if holes_filled else '_plain'}"], masks)
    return {
        "logits": largest_error(low_res[:, ::4, ::4], outputs[f"{name}/low_res"]),
        "iou": largest_error(iou, outputs[f"{name}/iou"]),
        "mask_pixels": float(((masks > 0) != expected).mean(axis=(-2, -1)).max()),
    }


def _unpacked(bits: NDArray[np.uint8], masks: NDArray[Any]) -> NDArray[np.bool_]:
    """Packed masks in the shape of others."""
    return np.unpackbits(bits, count=masks.size).reshape(masks.shape).astype(bool)
