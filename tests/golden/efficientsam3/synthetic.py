"""The synthetic EfficientSAM3 students behind the golden data; see README.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.golden.sam3 import synthetic

FOLDER = Path(__file__).parent
MODELS = ("efficientvit_b0", "repvit_m0_9", "tinyvit_5m")
TRUNK = "detector.backbone.vision_backbone.trunk.model."


@dataclass(frozen=True)
class Sizes:
    """What tells the sizes of a family apart.

    Attributes:
        widths: channels of each stage.
        depths: blocks of each stage, those that shrink the map included.
        heads: a TinyViT's attention heads in each stage.
        dim: channels of an EfficientViT's attention head.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...] = ()
    dim: int = 16


# As published. A TinyViT of every size has windows of 7, 14 and 7.
SIZES = {
    "repvit_m0_9": Sizes((48, 96, 192, 384), (3, 4, 16, 3)),
    "repvit_m1_1": Sizes((64, 128, 256, 512), (3, 4, 14, 3)),
    "repvit_m2_3": Sizes((80, 160, 320, 640), (7, 8, 36, 3)),
    "tinyvit_5m": Sizes((64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10)),
    "tinyvit_11m": Sizes((64, 128, 256, 448), (2, 2, 6, 2), (2, 4, 8, 14)),
    "tinyvit_21m": Sizes((96, 192, 384, 576), (2, 2, 6, 2), (3, 6, 12, 18)),
    "efficientvit_b0": Sizes((16, 32, 64, 128), (2, 2, 3, 3)),
    "efficientvit_b1": Sizes((32, 64, 128, 256), (2, 3, 4, 5)),
    "efficientvit_b2": Sizes((48, 96, 192, 384), (3, 4, 5, 7), dim=32),
}
# With smaller variances, features would grow with every block: those of RepViT m0.9 to 1e13.
_VARIANCES = {
    "repvit_m0_9": 1.3,
    "repvit_m1_1": 1.3,
    "repvit_m2_3": 1.5,
    "efficientvit_b2": 0.7,
}
_SMALLEST = {model.partition("_")[0]: model for model in MODELS}
# Above, the number and the rest of a block's name, where depths differ.
_BLOCK = {
    "repvit": re.compile(r"(.*features\.)(\d+)(\..*)"),
    "efficientvit": re.compile(r"(.*stages\.\d\.op_list\.)(\d+)(\..*)"),
}


def keys(file: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of ``keys_FILE.tsv``; counts have no shape."""
    rows = [line.split("\t") for line in (FOLDER / f"keys_{file}.tsv").read_text().splitlines()]
    return {
        name: () if sides == "scalar" else tuple(int(side) for side in sides.split("x"))
        for name, sides, _ in rows
    }


def keys_of(model: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of one of the :data:`SIZES` and of the neck it uses."""
    family = model.partition("_")[0]
    names = keys(_SMALLEST[family])
    if family in _BLOCK:
        names = dict(_with_depths(names, family, SIZES[model].depths))
    return {
        name: _widened(name, shape, SIZES[_SMALLEST[family]], SIZES[model])
        for name, shape in names.items()
    }


def _with_depths(
    names: dict[str, tuple[int, ...]], family: str, depths: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter where each block is like one of the smallest model's."""
    lists: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in names.items():
        if match := _BLOCK[family].fullmatch(name):
            blocks = lists.setdefault(match[1], {})
            blocks.setdefault(int(match[2]), {})[match[3]] = shape
        else:
            yield name, shape
    for stage, (prefix, blocks) in enumerate(lists.items()):
        # An EfficientViT has a list for each stage, whose first block alone is another.
        like = [0] + [1] * (depths[stage] - 1) if family == "efficientvit" else _repvit(depths)
        for number, old in enumerate(like):
            for rest, shape in blocks[old].items():
                yield f"{prefix}{number}{rest}", shape


def _repvit(depths: tuple[int, ...]) -> list[int]:
    """Which block of the smallest RepViT each block is like; block 0 is the stem."""
    like, start = [0], 1
    for stage, depth in enumerate(depths):
        first = start + (stage > 0)  # a block that shrinks the map is before it
        count = depth - (stage > 0)
        like += range(start, first)
        # Every other block has squeeze and excitation, but not one that is left over at the end.
        like += [first + (place % 2 or place == count - 1) for place in range(count)]
        start += SIZES[_SMALLEST["repvit"]].depths[stage]
    return like


def _widened(name: str, shape: tuple[int, ...], old: Sizes, new: Sizes) -> tuple[int, ...]:
    """The shape of a parameter with the channels of another size."""
    own = name.removeprefix(TRUNK)
    if own == name or own.startswith(("head.1.", "head.3.")):
        return shape
    if own == "head.0.weight":
        return (shape[0], new.widths[-1], 1, 1)
    if own.endswith("attention_biases"):
        return (new.heads[old.heads.index(shape[0])], shape[1])
    channels = {1: 1, 3: 3}  # depthwise kernels, and the image's own
    stages = list(zip(old.widths, new.widths, strict=True))
    if old.heads:  # times 3 for Q, K and V, times 4 in MLPs, half in the stem
        channels |= {times * a: times * b for a, b in stages for times in (1, 3, 4)}
        channels[old.widths[0] // 2] = new.widths[0] // 2
    else:
        channels |= {side: side * stages[0][1] // stages[0][0] for side in shape[:2] if side > 3}
    sides = [channels[side] for side in shape[:2]]
    if own.endswith("aggreg.0.1.weight"):
        sides[1] = new.dim
    if ".token_mixer.1." in own and not own.endswith("fc2.bias"):
        squeezed = {_squeezed(a): _squeezed(b) for a, b in stages}
        axis = 1 if ".fc2." in own else 0
        sides[axis] = squeezed[shape[axis]]
    return (*sides, *shape[2:])


def _squeezed(width: int) -> int:
    """A quarter of the channels, to the nearest 8 (upwards from the middle)."""
    return (width // 4 + 4) // 8 * 8


def parameter(name: str, shape: tuple[int, ...], salt: str, variance: float = 0.5) -> NDArray[Any]:
    """One parameter; variances are at least ``variance``."""
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    values = synthetic.weight(name, shape, salt)
    return abs(values) + np.float32(variance) if name.endswith("running_var") else values


def checkpoint(model: str) -> dict[str, NDArray[Any]]:
    """Every parameter of one of the :data:`SIZES` in ``sam3.pt`` naming."""
    variance = _VARIANCES.get(model, 0.5)
    names = keys_of(model) | keys("head")
    tensors = {n: parameter(n, shape, "eff-golden-", variance) for n, shape in names.items()}
    tensors[TRUNK + "head.3.weight"] *= np.float32(1 / 16)
    return tensors


def image() -> NDArray[np.uint8]:
    """The image, uint8 [480, 640, 3] RGB."""
    return synthetic.image(820, 480, 640)
