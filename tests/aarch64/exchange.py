"""Encodes an image, or segments from an embedding file; run on both processors.

python exchange.py encode BUNDLE IMAGE EMBEDDING
python exchange.py segment BUNDLE EMBEDDING X,Y RESULT.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import sam3rt
from sam3rt.image_files import read_image


def main() -> None:
    """Do what the command line says."""
    action, bundle, *arguments = sys.argv[1:]
    model = sam3rt.load_model(bundle, backend="onnxruntime", device="cpu", threads=1)
    if action == "encode":
        image, path = arguments
        model.encode(read_image(Path(image))).save(path)
        return
    path, click, result = arguments
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    predictor.set_embedding(model.load_embedding(path))
    masks, iou, low_res = predictor.predict(
        point_coords=np.array([[float(part) for part in click.split(",")]]),
        point_labels=np.array([1]),
    )
    np.savez(result, masks=masks, iou=iou, low_res=low_res)


main()
