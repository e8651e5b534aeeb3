"""MobileSAM in its authors' own code (PyPI ``mobilesam-mirror``)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..source import ReferenceMasks
from . import load_parameters


class MobileSamReference:
    """Implements :class:`~sam3rt_export.source.Reference`.

    Args:
        tensors: the checkpoint's parameters.

    Raises:
        CheckpointError: the package is not installed.
        ModelError: a tensor is missing, does not fit or is one too many.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        try:
            with warnings.catch_warnings():
                # It registers models that timm has under the same names, by an old path.
                warnings.simplefilter("ignore")
                from mobile_sam import build_sam_vit_t
        except ImportError as error:
            raise CheckpointError(
                "exporting MobileSAM compares with its authors' code: "
                f"pip install 'sam3rt[mobile-sam]' ({error})"
            ) from error
        self._model: Any = build_sam_vit_t()
        load_parameters(self._model, tensors, tensors)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """float32 [1, 3, 1024, 1024] to the one feature map."""
        return (self._model.image_encoder(pixels),)

    @torch.no_grad()
    def decode(
        self, features: tuple[Tensor, ...], points: Tensor, labels: Tensor, masks: Tensor | None
    ) -> ReferenceMasks:
        """See :class:`~sam3rt_export.source.Reference`."""
        encoder, decoder = self._model.prompt_encoder, self._model.mask_decoder
        sparse = self._embed(points, labels)
        grid = encoder.image_embedding_size
        if masks is None:
            dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            dense = dense.expand(len(points), -1, *grid)
        else:
            dense = encoder._embed_masks(masks[:, None])
        logits, iou = decoder.predict_masks(
            image_embeddings=features[0],
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        # Channel 0 is the single mask, the others are the multi-mask ones.
        order = [1, 2, 3, 0]
        return ReferenceMasks(logits[:, order], iou[:, order], None)

    def _embed(self, points: Tensor, labels: Tensor) -> Tensor:
        """Embed points one kind at a time, as the prompt encoder does.

        Its two methods split clicks from boxes; packed prompts hold both in one list, boxes last.
        """
        encoder = self._model.prompt_encoder
        corners = (labels >= 2).all(dim=0)
        clicks = encoder._embed_points(points[:, ~corners], labels[:, ~corners], pad=False)
        if not bool(corners.any()):
            return clicks
        boxes = encoder._embed_boxes(points[:, corners].reshape(len(points), 4))
        return torch.cat([clicks, boxes], dim=1)
