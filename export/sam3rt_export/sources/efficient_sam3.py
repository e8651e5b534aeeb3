"""EfficientSAM3: a RepViT, TinyViT or EfficientViT in the place of SAM 3's ViT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..checkpoint_keys import DECODER, NECK, PROMPT, STUDENT, unknown_tensors
from ..errors import ModelError
from ..graphs.efficient_sam3 import Backbone, StudentArchitecture
from ..graphs.sam3_encoder import Sam3Architecture
from ..graphs.tiny_vit import TinyViTArchitecture
from ..references.efficient_sam3 import PlainStudent
from ..references.transformers_sam3 import build_tracker_model
from ..source import ExportSource
from .sam3 import sam3_source, size_notes
from .sam3_architecture import check_image_size

# SAM 3's own, which the students keep; no tensor of theirs says so.
_TRAINED_SIZE = 1008
_PATCH = 14
_SIZE_STEP = 336
_BACKBONE = STUDENT + "backbone.model."
# What tells the families apart.
_FAMILIES: dict[str, Backbone] = {
    _BACKBONE + "features.": "repvit",
    _BACKBONE + "layers.": "tinyvit",
    _BACKBONE + "input_stem.": "efficientvit",
}
# What the authors call a trunk whose last map has so many channels.
_VARIANTS = {
    ("repvit", 384): "repvit_m0_9",
    ("repvit", 512): "repvit_m1_1",
    ("repvit", 640): "repvit_m2_3",
    ("tinyvit", 320): "tinyvit_5m",
    ("tinyvit", 448): "tinyvit_11m",
    ("tinyvit", 576): "tinyvit_21m",
    ("efficientvit", 128): "efficientvit_b0",
    ("efficientvit", 256): "efficientvit_b1",
    ("efficientvit", 384): "efficientvit_b2",
}


def open_efficient_sam3(
    tensors: Mapping[str, Tensor], *, sigmoid_iou: bool = True, image_size: int | None = None
) -> ExportSource:
    """Prepare EfficientSAM3; see :func:`.sam3.source_from_tensors` for the arguments.

    Raises:
        ModelError: a tensor is unknown.
        CheckpointError: it has no such image size.
        KeyError, RuntimeError, ValueError: a tensor is missing or has the wrong shape.
    """
    student = read_student(tensors, _TRAINED_SIZE if image_size is None else image_size)
    architecture = _rest_of_sam3(tensors, student)
    others = {name: t for name, t in tensors.items() if not name.startswith(STUDENT)}
    own = {n.removeprefix(STUDENT): t for n, t in tensors.items() if n.startswith(STUDENT)}
    plain = PlainStudent(student.backbone, own, student.grid)
    model = build_tracker_model(architecture, others, sigmoid_iou=sigmoid_iou, backbone=plain)
    seen = _Seen(tensors)
    notes = size_notes(student.image_size, _TRAINED_SIZE)
    source = sam3_source(architecture, seen, model, notes=notes, student=student)
    # What tells a wrong shape is running it; its size does not matter.
    plain(torch.zeros(1, 3, 64, 64))
    unread = [name for name in own if STUDENT + name not in seen.names]
    if unread:
        raise unknown_tensors(STUDENT + name for name in unread)
    return source


def read_student(tensors: Mapping[str, Tensor], image_size: int) -> StudentArchitecture:
    """Work out a student's sizes from tensors in ``sam3.pt`` naming.

    Raises:
        ModelError: it is of no known family.
        CheckpointError: it has no such image size.
        KeyError: a tensor is missing.
    """
    check_image_size(image_size, _SIZE_STEP, _TRAINED_SIZE)
    found = {f for prefix, f in _FAMILIES.items() if any(n.startswith(prefix) for n in tensors)}
    if len(found) != 1:
        first = next(name for name in tensors if name.startswith(STUDENT))
        raise ModelError(
            "EfficientSAM3's image encoder is a RepViT, a TinyViT or an EfficientViT; this one has "
            f"tensors such as {first!r}"
        )
    (backbone,) = found
    width = tensors[STUDENT + "head.0.weight"].shape[1]
    return StudentArchitecture(
        backbone=backbone,
        variant=_VARIANTS.get((backbone, width), backbone),
        image_size=image_size,
        grid=image_size // _PATCH,
        tiny_vit=_tiny_vit(tensors, image_size) if backbone == "tinyvit" else None,
    )


def _tiny_vit(tensors: Mapping[str, Tensor], image_size: int) -> TinyViTArchitecture:
    """A bias per head and per offset within a window tells heads and windows."""
    pattern = re.compile(re.escape(_BACKBONE) + r"layers\.(\d+)\.blocks\.(\d+)\..*")
    blocks = {(int(m[1]), int(m[2])) for m in map(pattern.fullmatch, tensors) if m}
    stages = 1 + max(stage for stage, _ in blocks)
    depths = [sum(stage == s for s, _ in blocks) for stage in range(stages)]
    heads, windows = [1], [1]
    for stage in range(1, stages):
        biases = tensors[f"{_BACKBONE}layers.{stage}.blocks.0.attn.attention_biases"]
        heads.append(biases.shape[0])
        windows.append(round(biases.shape[1] ** 0.5))
    return TinyViTArchitecture(image_size, tuple(depths), tuple(heads), tuple(windows), 2)


def _rest_of_sam3(tensors: Mapping[str, Tensor], student: StudentArchitecture) -> Sam3Architecture:
    """The sizes of neck and decoder, and a ViT without blocks."""
    return Sam3Architecture(
        image_size=student.image_size,
        patch_size=_PATCH,
        embed_dim=tensors[NECK + "0.dconv_2x2_0.weight"].shape[0],
        depth=0,
        num_heads=1,
        mlp_dim=1,
        window=student.grid,
        global_blocks=(),
        pretrain_grid=1,
        fpn_dim=tensors[NECK + "2.conv_3x3.weight"].shape[0],
        decoder_mlp_dim=tensors[DECODER + "transformer.layers.0.mlp.lin1.weight"].shape[0],
        mask_channels=tensors[PROMPT + "mask_downscaling.6.weight"].shape[1],
    )


class _Seen(Mapping[str, Tensor]):
    """Tensors, and the names of those that were read: the others are of another model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self.names.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
