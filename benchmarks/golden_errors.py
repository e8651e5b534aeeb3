"""How far this machine's results are from the golden outputs of the two reference predictors.

    python -m benchmarks.golden_errors SMALL_BUNDLE [--output FILE]

SMALL_BUNDLE is an export of the small SAM 3 of tests/golden/sam3. The tests hold the same distances
to fixed limits; this prints what is reached.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser
from tests.golden.sam3 import synthetic
from tests.support import golden
from tests.support.helpers import photo

import sam3rt


def sam3_errors(bundle: Path) -> dict[str, float]:
    """Largest errors over the golden cases of SAM 3."""
    model = sam3rt.load_model(bundle, backend="onnxruntime", device="cpu")
    embeddings = {
        int(number): model.encode(synthetic.image(entry["seed"], entry["height"], entry["width"]))
        for number, entry in synthetic.cases()["images"].items()
    }
    cases = [name for name, case in golden.sam_cases("sam3").items() if not case.get("batch")]
    errors = [
        golden.sam_errors("sam3", name, golden.predict_sam_case("sam3", name, model, embeddings))
        for name in cases
    ]
    features = [
        golden.sam_feature_error("sam3", n, embedding) for n, embedding in embeddings.items()
    ]
    return {"cases": len(cases), "features": worst(features)} | {
        name: worst(e[name] for e in errors) for name in errors[0]
    }


def mobile_sam_errors() -> dict[str, float]:
    """Least mask IoU and largest error of predicted IoUs over the golden cases of MobileSAM."""
    model = sam3rt.load_model(backend="onnxruntime", device="cpu")
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    embeddings = {
        name: model.encode(photo(name)) for name in golden.mobile_sam_document()["photos"]
    }
    errors = []
    for name, case in golden.mobile_sam_cases().items():
        predictor.set_embedding(embeddings[case["photo"]])
        errors.append(
            golden.mobile_sam_errors(name, predictor.predict(**golden.arguments_of(case)))
        )
    return {
        "masks": sum(e["mask_ious"].size for e in errors),
        "least_mask_iou": float(np.min([e["mask_ious"].min() for e in errors])),
        "iou": worst(e["iou"] for e in errors),
    }


def worst(values: Iterable[float]) -> float:
    """The largest; NaN where one is."""
    return float(np.max(list(values)))


def main() -> None:
    """Print, and write, the errors."""
    parser = script_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = conditions("onnxruntime")
    document["sam3"] = sam3_errors(options.bundle)
    document["mobile_sam"] = mobile_sam_errors()
    publish(document, options.output)


if __name__ == "__main__":
    main()
