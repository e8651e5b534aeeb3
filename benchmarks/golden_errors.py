"""How far this machine's results are from the golden outputs of the two reference predictors.

    python -m benchmarks.golden_errors SMALL_BUNDLE [--output FILE]

SMALL_BUNDLE is an export of the small SAM 3 of tests/golden/sam3. The tests hold the same
comparisons to fixed limits; this prints what is reached.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from benchmarks.report import publish
from tests import conftest
from tests.golden import test_golden_mobile_sam as mobile
from tests.golden import test_golden_sam3 as sam3_cases

import sam3rt


def sam3_errors(bundle: Path) -> dict[str, float]:
    """Largest errors over the golden cases of SAM 3."""
    model = sam3rt.load_model(bundle, device="cpu")
    images = {
        int(number): sam3_cases.synthetic.image(entry["seed"], entry["height"], entry["width"])
        for number, entry in sam3_cases.synthetic.cases()["images"].items()
    }
    embeddings = {number: model.encode(image) for number, image in images.items()}
    golden = sam3_cases.GOLDEN
    worst = {"features": 0.0, "logits": 0.0, "iou": 0.0, "mask_pixels": 0.0}
    for number, embedding in embeddings.items():
        fine, middle, coarse = embedding.numpy().values()
        for array, name in (
            (coarse[:, ::8, ::4, ::4], "image_embed"),
            (fine[:, ::8, ::16, ::16], "high_res_0"),
            (middle[:, ::8, ::8, ::8], "high_res_1"),
        ):
            _worse(worst, "features", np.abs(array - golden[f"image{number}/{name}"]).max())
    for name, case in sam3_cases.CASES.items():
        if case.get("batch"):
            continue
        masks, iou, low_res = sam3_cases.predict_case(name, model, embeddings)
        expected = np.unpackbits(golden[f"{name}/masks"], count=masks.size).reshape(masks.shape)
        _worse(worst, "logits", np.abs(low_res[..., ::3, ::3] - golden[f"{name}/low_res"]).max())
        _worse(worst, "iou", np.abs(iou - golden[f"{name}/iou"]).max())
        differing = ((masks > 0) != expected.astype(bool)).mean(axis=(-2, -1)).max()
        _worse(worst, "mask_pixels", differing)
    return worst


def mobile_sam_errors() -> dict[str, float]:
    """Least mask IoU and largest IoU-head error over the golden cases of MobileSAM."""
    model = sam3rt.load_model(device="cpu")
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    embeddings = {name: model.encode(conftest.photo(name)) for name in mobile.DOCUMENT["photos"]}
    least, iou_error, count = 1.0, 0.0, 0
    for name, case in mobile.CASES.items():
        predictor.set_embedding(embeddings[case["photo"]])
        masks, iou, _ = predictor.predict(**mobile.arguments_of(case))
        bits = np.unpackbits(mobile.EXPECTED[f"{name}/masks"], count=masks.size)
        ious = mobile.mask_ious(masks > 0, bits.reshape(masks.shape).astype(bool))
        least, count = min(least, float(ious.min())), count + ious.size
        iou_error = max(iou_error, float(np.abs(iou - mobile.EXPECTED[f"{name}/iou"]).max()))
    return {"masks": count, "least_mask_iou": least, "iou": iou_error}


def _worse(worst: dict[str, float], name: str, value: Any) -> None:
    worst[name] = max(worst[name], float(value))


def main() -> None:
    """Print, and write, the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    document = {
        "command": "python -m benchmarks.golden_errors SMALL_BUNDLE",
        "machine": platform.platform(),
        "versions": {"sam3rt": sam3rt.__version__, "onnxruntime": onnxruntime.__version__},
        "sam3": sam3_errors(options.bundle),
        "mobile_sam": mobile_sam_errors(),
    }
    publish(document, options.output)


if __name__ == "__main__":
    main()
