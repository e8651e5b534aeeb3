"""The synthetic SAM 3 and images behind the golden data.

Nothing here was trained: every parameter is a function of its checkpoint name, its shape and a
salt, and every image of a seed, so that anyone can build the same checkpoint anywhere.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent


def cases() -> dict[str, Any]:
    """The parsed ``cases.json``: the model, the images and the calls."""
    parsed: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text())
    return parsed


def scale_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a parameter: what keeps activations of ordinary size."""
    *_, parent, leaf = ("", *name.split("."))
    if leaf == "bias":
        return 0.0, 0.1
    if leaf == "weight" and len(shape) == 1:
        return 1.0, 0.1
    if leaf == "pos_embed":
        return 0.0, 0.2
    if leaf == "positional_encoding_gaussian_matrix":
        return 0.0, 1.0
    if leaf == "no_mem_embed" or "embed" in parent or "token" in parent:
        return 0.0, 0.5
    transposed = "dconv_2x2" in name or "output_upscaling" in name
    fan_in = shape[0] if transposed or len(shape) < 2 else int(np.prod(shape[1:]))
    return 0.0, float(1 / np.sqrt(fan_in))


def weight(name: str, shape: tuple[int, ...], salt: str) -> NDArray[np.float32]:
    """One parameter, float32 of the given shape."""
    rng = np.random.default_rng(zlib.crc32((salt + name).encode()))
    values = rng.standard_normal(shape, dtype=np.float32)
    mean, deviation = scale_of(name, shape)
    return np.float32(mean) + np.float32(deviation) * values


def checkpoint(salt: str | None = None) -> dict[str, NDArray[Any]]:
    """Every parameter of the small model in ``sam3.pt`` naming.

    Args:
        salt: another salt gives another model; the golden data's by default.
    """
    salt = cases()["model"]["salt"] if salt is None else salt
    tables = np.load(FOLDER / "freqs_cis.npz")
    tensors: dict[str, NDArray[Any]] = {}
    for line in (FOLDER / "keys.tsv").read_text().splitlines():
        name, sides, kind = line.split("\t")
        shape = tuple(int(side) for side in sides.split("x"))
        if kind == "complex64":
            tensors[name] = tables["window" if shape[0] == 576 else "global_"]
        else:
            tensors[name] = weight(name, shape, salt)
    return tensors


def full_size_checkpoint(salt: str = "full-") -> Iterator[tuple[str, NDArray[Any]]]:
    """The interactive part of a SAM 3 of the published size, in ``sam3.pt`` naming.

    Width 1024, depth 32, 16 heads, MLP 4736, global blocks 7, 15, 23 and 31; names and the
    decoder's shapes are the small model's. About 1.9 GB, so tensors come one at a time.
    """
    tables = np.load(FOLDER / "freqs_cis.npz")
    trunk, neck = (f"detector.backbone.vision_backbone.{part}." for part in ("trunk", "sam2_convs"))
    wider = {128: 1024, 384: 3072, 592: 4736, 64: 512, 32: 256}
    for line in (FOLDER / "keys.tsv").read_text().splitlines():
        name, sides, kind = line.split("\t")
        shape = tuple(int(side) for side in sides.split("x"))
        if not name.startswith((trunk, neck, "tracker.")):
            continue
        if name.startswith((trunk, neck)):
            shape = tuple(wider.get(side, side) for side in shape)
        if not name.startswith(trunk + "blocks."):
            yield name, weight(name, shape, salt)
        elif name.startswith(trunk + "blocks.0."):
            for block in range(32):
                own = name.replace("blocks.0.", f"blocks.{block}.")
                if kind == "complex64":
                    yield own, tables["global_" if block % 8 == 7 else "window"]
                else:
                    yield own, weight(own, shape, salt)


def image(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth colour blobs with texture, uint8 [height, width, 3] RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    result = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        field = np.zeros((height, width))
        for _ in range(6):
            centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
            spread = rng.uniform(0.05, 0.3) * max(height, width)
            sign = rng.uniform(-1, 1)
            distance = (x - centre_x) ** 2 + (y - centre_y) ** 2
            field += sign * np.exp(-distance / (2 * spread * spread))
        field += 0.15 * rng.standard_normal((height, width))
        field = (field - field.min()) / (field.max() - field.min())
        result[..., channel] = np.round(255 * field).astype(np.uint8)
    return result
