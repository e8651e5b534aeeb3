"""SAM 3 from transformers' parts, put together as the reference predictor does.

``Sam3TrackerModel``'s own ``forward`` and ``get_image_embeddings`` add the no-memory embedding
to a level that is then dropped, which ruins every mask; its parts are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam3TrackerConfig
from transformers.initialization import no_init_weights
from transformers.models.sam3_tracker.modeling_sam3_tracker import Sam3TrackerModel

from ..checkpoint_keys import to_transformers
from ..graphs.sam3_encoder import Sam3Architecture
from ..source import ReferenceMasks
from . import load_parameters

__all__ = ["Sam3TrackerModel", "TransformersReference", "build_tracker_model"]

# Finest first; the fourth level of SAM 3's neck does not reach the interactive predictor.
_LEVELS = 3


def build_tracker_model(
    architecture: Sam3Architecture,
    tensors: Mapping[str, Tensor],
    *,
    sigmoid_iou: bool = True,
    backbone: nn.Module | None = None,
) -> Any:
    """A ``Sam3TrackerModel`` that shares the given tensors (``sam3.pt`` naming).

    Args:
        architecture: its sizes.
        tensors: its parameters.
        sigmoid_iou: whether predicted IoUs go through a sigmoid; transformers' code always does.
        backbone: stands in the ViT's place, with its own parameters; it returns an object with
            ``last_hidden_state``, [B, grid^2, C].

    Raises:
        ModelError: a parameter is missing, has the wrong shape or is one too many.
    """
    arch = architecture
    grid = arch.grid
    config = Sam3TrackerConfig(
        vision_config={
            "model_type": "sam3_vision_model",
            "fpn_hidden_size": arch.fpn_dim,
            "scale_factors": [4.0, 2.0, 1.0, 0.5],
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": arch.embed_dim,
                "intermediate_size": arch.mlp_dim,
                "num_hidden_layers": arch.depth,
                "num_attention_heads": arch.num_heads,
                "image_size": arch.image_size,
                "patch_size": arch.patch_size,
                "window_size": arch.window,
                "global_attn_indexes": list(arch.global_blocks),
                "pretrain_image_size": arch.pretrain_grid * arch.patch_size,
                "layer_norm_eps": arch.layer_norm_eps,
                "rope_parameters": {"rope_theta": arch.rope_theta},
            },
        },
        prompt_encoder_config={
            "hidden_size": arch.fpn_dim,
            "image_size": arch.image_size,
            "patch_size": arch.patch_size,
            "mask_input_channels": arch.mask_channels,
        },
        mask_decoder_config={
            "hidden_size": arch.fpn_dim,
            "mlp_dim": arch.decoder_mlp_dim,
            "num_attention_heads": arch.decoder_heads,
        },
    )
    with no_init_weights():
        model = Sam3TrackerModel(config)
    # The neck's coarsest level is unused, and absent from some checkpoints.
    optional = ["vision_encoder.neck.fpn_layers.3."]
    if backbone is not None:
        optional.append("vision_encoder.backbone.")
    load_parameters(model, to_transformers(tensors), tensors, tuple(optional))
    if backbone is not None:
        model.vision_encoder.backbone = backbone.eval()
    model.mask_decoder.iou_prediction_head.sigmoid_output = sigmoid_iou
    return model


class TransformersReference:
    """Implements :class:`~sam3rt_export.source.Reference`.

    Args:
        model: a ``Sam3TrackerModel`` in FP32.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def to(self, device: str) -> TransformersReference:
        """Move the model to a device, such as ``"cuda:0"``; returns itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """float32 [1, 3, S, S] to three feature maps, finest first."""
        vision, decoder = self.model.vision_encoder, self.model.mask_decoder
        tokens = vision.backbone(pixels).last_hidden_state
        side = round(tokens.shape[1] ** 0.5)
        x = tokens.reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)
        maps = [vision.neck.fpn_layers[level](x) for level in range(_LEVELS)]
        no_memory = self.model.no_memory_embedding.reshape(1, -1, 1, 1)
        return decoder.conv_s0(maps[0]), decoder.conv_s1(maps[1]), maps[2] + no_memory

    @torch.no_grad()
    def decode(
        self, features: tuple[Tensor, ...], points: Tensor, labels: Tensor, masks: Tensor | None
    ) -> ReferenceMasks:
        """See :class:`~sam3rt_export.source.Reference`. Objects are decoded one by one."""
        parts = []
        for i in range(len(points)):
            mask = None if masks is None else masks[i % len(masks)][None]
            one = (features, points[i : i + 1], labels[i : i + 1], mask)
            logits, iou, score = self.decode_together(*one, multimask=True)
            single_logits, single_iou, _ = self.decode_together(*one, multimask=False)
            parts.append(
                (torch.cat([logits, single_logits], 1), torch.cat([iou, single_iou], 1), score)
            )
        logits, iou, score = (torch.cat(values) for values in zip(*parts, strict=True))
        return ReferenceMasks(logits, iou, score[:, 0])

    @torch.no_grad()
    def decode_together(
        self,
        features: tuple[Tensor, ...],
        points: Tensor,
        labels: Tensor,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of the mask decoder for all objects.

        Args:
            features: from :meth:`encode`, of one image.
            points: float32 [P, N, 2], pixels of the encoder's input.
            labels: int64 [P, N].
            masks: float32 [1, h, w] or [P, h, w], or ``None``.
            multimask: three masks per object, or one.

        Returns:
            Logits [P, C, h, w], IoUs [P, C] and object scores [P, 1].
        """
        prompt_encoder = self.model.prompt_encoder
        sparse = prompt_encoder._embed_points(points[None], labels[None], pad=False)
        grid = features[-1].shape[-1]
        if masks is None:
            dense = prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            dense = dense.expand(1, -1, grid, grid)
        else:
            dense = prompt_encoder.mask_embed(masks[:, None])
            if len(masks) > 1:
                # One mask per object: objects take the place of images, which have one each.
                sparse = sparse.transpose(0, 1)
                features = tuple(f.expand(len(masks), -1, -1, -1) for f in features)
        logits, iou, _, score = self.model.mask_decoder(
            image_embeddings=features[-1],
            image_positional_embeddings=self.model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            high_resolution_features=list(features[:-1]),
        )
        return logits.flatten(0, 1), iou.flatten(0, 1), score.flatten(0, 1)
