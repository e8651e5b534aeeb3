"""The synthetic EfficientSAM3 students behind the golden data; see README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.golden.sam3 import synthetic

FOLDER = Path(__file__).parent
MODELS = ("efficientvit_b0", "repvit_m0_9", "tinyvit_5m")
TRUNK = "detector.backbone.vision_backbone.trunk.model."


def keys(file: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of ``keys_FILE.tsv``; counts have no shape."""
    rows = [line.split("\t") for line in (FOLDER / f"keys_{file}.tsv").read_text().splitlines()]
    return {
        name: () if sides == "scalar" else tuple(int(side) for side in sides.split("x"))
        for name, sides, _ in rows
    }


def parameter(name: str, shape: tuple[int, ...], salt: str, variance: float = 0.5) -> NDArray[Any]:
    """One parameter; variances are at least ``variance``."""
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    values = synthetic.weight(name, shape, salt)
    return abs(values) + np.float32(variance) if name.endswith("running_var") else values


def checkpoint(model: str) -> dict[str, NDArray[Any]]:
    """Every parameter of one of the :data:`MODELS` in ``sam3.pt`` naming."""
    # With smaller variances, RepViT's features would grow to 1e13.
    variance = 1.3 if model == "repvit_m0_9" else 0.5
    names = keys(model) | keys("head")
    tensors = {n: parameter(n, shape, "eff-golden-", variance) for n, shape in names.items()}
    tensors[TRUNK + "head.3.weight"] *= np.float32(1 / 16)
    return tensors


def image() -> NDArray[np.uint8]:
    """The image, uint8 [480, 640, 3] RGB."""
    return synthetic.image(820, 480, 640)
