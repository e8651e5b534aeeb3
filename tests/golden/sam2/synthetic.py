"""The synthetic SAM 2.1 behind the golden data, made like the synthetic SAM 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.golden.sam3 import synthetic as sam3

FOLDER = Path(__file__).parent
# Blocks a stage, width of the first and side of the position grid, as published.
FULL_SIZES = {
    "tiny": ((1, 2, 7, 2), 96, 7),
    "small": ((1, 2, 11, 2), 96, 7),
    "base_plus": ((2, 3, 16, 3), 112, 14),
    "large": ((2, 6, 36, 4), 144, 7),
}
_TRUNK, _NECK = "image_encoder.trunk.", "image_encoder.neck.convs."


def cases() -> dict[str, Any]:
    """The parsed ``cases.json``: the model, the images and the calls."""
    parsed: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text())
    return parsed


def shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the small model."""
    rows = [line.split("\t") for line in (FOLDER / "keys.tsv").read_text().splitlines()]
    return {name: tuple(int(side) for side in sides.split("x")) for name, sides, _ in rows}


def shapes_of(
    depths: tuple[int, ...], width: int, grid: int, window: int
) -> dict[str, tuple[int, ...]]:
    """The same of another size; neck, prompt encoder and decoder keep theirs.

    Args:
        depths: blocks of each stage.
        width: channels of the first stage.
        grid: side of the position grid.
        window: side of the first stage's windows.
    """
    result = {}
    for name, shape in shapes().items():
        if name == _TRUNK + "pos_embed":
            shape = (1, width, grid, grid)
        elif name == _TRUNK + "pos_embed_window":
            shape = (1, width, window, window)
        elif name.startswith(_TRUNK):
            shape = tuple(width if side == 16 else side for side in shape)
        elif name.startswith(_NECK) and name.endswith("weight"):
            shape = (shape[0], shape[1] // 16 * width, 1, 1)
        if not name.startswith(_TRUNK + "blocks."):
            result[name] = shape
    block = 0
    for stage, depth in enumerate(depths):
        for position in range(depth):
            out = width * 2**stage
            into = out // 2 if stage and not position else out
            layers = {"norm1": (into,), "attn.qkv": (3 * out, into), "attn.proj": (out, out)}
            layers |= {"norm2": (out,), "mlp.layers.0": (4 * out, out)}
            layers |= {"mlp.layers.1": (out, 4 * out)}
            if into != out:
                layers["proj"] = (out, into)
            for name, shape in layers.items():
                result[f"{_TRUNK}blocks.{block}.{name}.weight"] = shape
                result[f"{_TRUNK}blocks.{block}.{name}.bias"] = shape[:1]
            block += 1
    return result


def checkpoint(salt: str | None = None) -> dict[str, NDArray[np.float32]]:
    """Every parameter of the small model in the naming of ``sam2.1_hiera_*.pt``.

    Args:
        salt: another salt gives another model; the golden data's by default.
    """
    salt = cases()["model"]["salt"] if salt is None else salt
    return {name: weight(name, shape, salt) for name, shape in shapes().items()}


def full_size_checkpoint(size: str, salt: str = "full-") -> dict[str, NDArray[np.float32]]:
    """The parameters of a published size, up to 0.9 GB, without the parts for video."""
    depths, width, grid = FULL_SIZES[size]
    named = shapes_of(depths, width, grid, 8)
    return {name: weight(name, shape, salt) for name, shape in named.items()}


def weight(name: str, shape: tuple[int, ...], salt: str) -> NDArray[np.float32]:
    """One parameter, float32 of the given shape."""
    values = sam3.weight(name, shape, salt)
    if name.endswith("pos_embed_window"):  # as SAM 3's pos_embed
        values *= np.float32(0.2 * np.sqrt(np.prod(shape[1:])))
    return values
