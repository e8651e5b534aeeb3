"""What every checkpoint becomes before it is exported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from sam3rt.bundle import ImageSpec, MaskSpec, PromptSpec

from .graphs.sam_decoder import SamDecoderGraph


@dataclass(frozen=True)
class ReferenceMasks:
    """What the reference says of P objects.

    Attributes:
        logits: float32 [P, C, h, w], the multi-mask logits, then the single mask's.
        iou: float32 [P, C].
        object_score: float32 [P], or ``None``.
    """

    logits: Tensor
    iou: Tensor
    object_score: Tensor | None


class Reference(Protocol):
    """The model in PyTorch code by other authors; an export must agree with it."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """float32 [1, 3, S, S] to the feature maps, finest first."""

    def decode(
        self, features: tuple[Tensor, ...], points: Tensor, labels: Tensor, masks: Tensor | None
    ) -> ReferenceMasks:
        """Features, points [P, N, 2] in input pixels, labels [P, N], masks [M, h, w] or none."""


@dataclass(frozen=True)
class ExportSource:
    """A model ready to be traced.

    Attributes:
        name: default name of the bundle.
        model_type: family, as in the manifest.
        license: SPDX identifier or name.
        encoder: normalized pixels to feature maps.
        decoder: features and prompts to masks.
        reference: the same model in code that is not ours.
        feature_shapes: (channels, height, width) of each feature map, finest first.
        image: image rules.
        prompts: prompt rules.
        masks: mask rules.
        versions: of the libraries the reference comes from.
        kind: checkpoint format, as in the manifest.
        origin: where it came from, as in the manifest.
        sha256: of the checkpoint file, or empty.
        stored: type of the weights in the checkpoint, as in the manifest.
        notes: what a user should know of how the model came about, as in the manifest.
    """

    name: str
    model_type: Literal["sam3", "efficient_sam3", "sam2", "mobile_sam"]
    license: str
    encoder: nn.Module
    decoder: SamDecoderGraph
    reference: Reference
    feature_shapes: list[tuple[int, int, int]]
    image: ImageSpec
    prompts: PromptSpec
    masks: MaskSpec
    versions: dict[str, str] = field(default_factory=dict)
    kind: str = ""
    origin: str = ""
    sha256: str = ""
    stored: str = ""
    notes: tuple[str, ...] = ()
