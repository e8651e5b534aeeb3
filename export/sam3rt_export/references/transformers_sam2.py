"""SAM 2 from transformers' parts, put together as the reference predictor does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Sam2Config
from transformers.initialization import no_init_weights
from transformers.models.sam2.modeling_sam2 import Sam2Model

from ..checkpoint_keys import DECODER, PROMPT, SAM2_NECK, to_transformers
from ..errors import ModelError
from ..graphs.hiera import HieraArchitecture
from . import load_parameters
from .transformers_sam3 import TransformersReference

__all__ = ["Sam2Model", "Sam2Reference", "build_sam2_model"]


def build_sam2_model(architecture: HieraArchitecture, tensors: Mapping[str, Tensor]) -> Any:
    """A ``Sam2Model`` that shares the given tensors (canonical names).

    Raises:
        ModelError: a parameter is missing, has the wrong shape or is one too many.
    """
    arch = architecture
    width = _size(tensors, SAM2_NECK + "0.conv.weight", 0)
    config = Sam2Config(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": arch.widths[0],
                "num_attention_heads": arch.heads[0],
                "image_size": [arch.image_size] * 2,
                "window_positional_embedding_background_size": [
                    _size(tensors, "image_encoder.trunk.pos_embed", axis) for axis in (2, 3)
                ],
                "blocks_per_stage": list(arch.depths),
                "embed_dim_per_stage": list(arch.widths),
                "num_attention_heads_per_stage": list(arch.heads),
                "window_size_per_stage": list(arch.windows),
                "global_attention_blocks": list(arch.global_blocks),
                "layer_norm_eps": arch.layer_norm_eps,
            },
            "backbone_channel_list": list(arch.widths[::-1]),
            "backbone_feature_sizes": [[arch.side(stage)] * 2 for stage in range(3)],
            "fpn_hidden_size": width,
        },
        prompt_encoder_config={
            "hidden_size": width,
            "image_size": arch.image_size,
            "patch_size": arch.image_size // arch.grid,
            "mask_input_channels": _size(tensors, PROMPT + "mask_downscaling.6.weight", 1),
        },
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": _size(tensors, DECODER + "transformer.layers.0.mlp.lin1.weight", 0),
            "iou_head_hidden_dim": _size(
                tensors, DECODER + "iou_prediction_head.layers.0.weight", 0
            ),
        },
    )
    with no_init_weights():
        model = Sam2Model(config)
    load_parameters(model, to_transformers(tensors), tensors)
    return model


def _size(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    if name not in tensors:
        raise ModelError(f"tensor {name!r} is missing: this is no whole SAM 2")
    return tensors[name].shape[axis]


class Sam2Reference(TransformersReference):
    """Implements :class:`~sam3rt_export.source.Reference`.

    Args:
        model: a ``Sam2Model`` in FP32. Its prompt encoder and decoder are called like SAM 3's.
    """

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """float32 [1, 3, S, S] to three feature maps, finest first."""
        decoder = self.model.mask_decoder
        fine, middle, coarse = self.model.vision_encoder(pixels).fpn_hidden_states
        no_memory = self.model.no_memory_embedding.reshape(1, -1, 1, 1)
        return decoder.conv_s0(fine), decoder.conv_s1(middle), coarse + no_memory
