"""The shape of a SAM 3 network: everything its graphs need besides the weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sam3Architecture:
    """Sizes of one SAM 3 interactive model.

    Attributes:
        image_size: side of the square input, pixels.
        patch_size: side of one token, pixels.
        embed_dim: width of the ViT.
        depth: transformer blocks.
        num_heads: attention heads per block.
        mlp_dim: hidden width of the ViT's MLPs.
        window: side of an attention window, tokens.
        global_blocks: indexes of the blocks that attend to the whole image.
        pretrain_grid: side of the learned position grid, tokens; it is tiled over the image.
        fpn_dim: channels of the neck and of the decoder.
        decoder_mlp_dim: hidden width of the decoder's MLPs.
        decoder_heads: attention heads of the two-way transformer.
        mask_channels: channels of the mask prompt before its last projection.
        rope_theta: frequency base of the rotary embedding.
        layer_norm_eps: epsilon of the ViT's normalizations.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    window: int
    global_blocks: tuple[int, ...]
    pretrain_grid: int
    fpn_dim: int
    decoder_mlp_dim: int
    decoder_heads: int = 8
    mask_channels: int = 16
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Channels per ViT attention head."""
        return self.embed_dim // self.num_heads
