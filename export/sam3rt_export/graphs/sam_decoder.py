"""SAM's prompt encoder and mask decoder as one graph, for SAM 3 and MobileSAM alike.

One pass yields the three masks and the single mask. The arithmetic is the reference's, with the
transformer rearranged (:mod:`.two_way`) and transposed convolutions as matmuls, channels last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import folding
from .operators import (
    Linear,
    channels_last,
    count_children,
    gelu,
    interleave_cells,
    layer_norm,
    regroup,
)
from .two_way import PADDING_SCORE, Pair, TokenToImage, TwoWayBlock, mlp


@dataclass(frozen=True)
class DecoderArchitecture:
    """Sizes and rules of a SAM decoder.

    Attributes:
        image_size: side of the encoder's square input, pixels; prompt coordinates are in it.
        grid: side of the image embedding, tokens.
        heads: attention heads.
        object_score: whether there is an object score token (SAM 2 and 3).
        high_resolution: whether the two high-resolution maps are added (SAM 2 and 3).
        single_mask: ``"stability"`` (SAM 2 and 3) or ``"token0"`` (SAM 1, MobileSAM).
        sigmoid_iou: whether the IoU head ends in a sigmoid (SAM 2 and 3).
    """

    image_size: int
    grid: int
    heads: int = 8
    object_score: bool = True
    high_resolution: bool = True
    single_mask: str = "stability"
    sigmoid_iou: bool = True

    @property
    def predicts_log_odds(self) -> bool:
        """Whether IoUs are predicted as log(s / (1 - s)), as by SAM 3.1.

        SAM 1's head has no sigmoid either, and predicts the IoU itself.
        """
        return self.single_mask == "stability" and not self.sigmoid_iou


class FourierPositions(nn.Module):
    """The random Fourier features that encode coordinates in [0, 1]."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        # 2 pi (2 c - 1) as in the reference's pe_layer; the factor joins the constant matrix.
        self.matrix = nn.Parameter((2.0 * math.pi * matrix.double()).float())

    def forward(self, unit: Tensor) -> Tensor:
        angle = torch.matmul(2.0 * unit - 1.0, self.matrix)
        return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


def cell_centres(side: int) -> Tensor:
    """Centres of the cells of a ``side`` x ``side`` grid over [0, 1], (x, y), [side^2, 2]."""
    centre = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


class MaskPrompt(nn.Module):
    """A mask prompt, or its absence, to one embedding per image token."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, grid: int) -> None:
        super().__init__()
        self.grid = grid
        down = prefix + "mask_downscaling."
        self.first = self._patch_conv(tensors, down + "0")
        self.first_norm = layer_norm(tensors, down + "1.", 1e-6)
        self.second = self._patch_conv(tensors, down + "3")
        self.second_norm = layer_norm(tensors, down + "4.", 1e-6)
        weight = tensors[down + "6.weight"]
        self.project = nn.Parameter(weight.flatten(1).T.contiguous())
        self.project_bias = nn.Parameter(tensors[down + "6.bias"])
        self.absent = nn.Parameter(tensors[prefix + "no_mask_embed.weight"].flatten())

    @staticmethod
    def _patch_conv(tensors: Mapping[str, Tensor], name: str) -> Linear:
        """A 2x2 convolution with stride 2 as a matmul with the (row, column, channel) cell."""
        weight = tensors[name + ".weight"]
        matrix = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
        return Linear(matrix, tensors[name + ".bias"])

    def forward(self, masks: Tensor, present: Tensor) -> Tensor:
        """masks [1, M, 4G, 4G] and a flag [1], to [M, G*G, C]."""
        g = self.grid
        x = regroup(masks, -1, g, 2, 2, g, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        x = regroup(x, -1, 4 * g * g, 4)
        x = gelu(self.first_norm(self.first(x)))
        x = regroup(x, -1, g * g, 4 * self.first.bias.shape[0])
        x = gelu(self.second_norm(self.second(x)))
        # The choice is made on the 16 channels before the projection, which is 16 times less.
        # A select, not a product: a mask that does not count may hold anything, NaN included.
        given = present > 0.5
        offset = torch.where(given, self.project_bias, self.absent)
        return torch.matmul(torch.where(given, x, 0.0), self.project) + offset


class SingleMask(nn.Module):
    """The choice of the mask that a single-mask call returns.

    Token 0, unless its stability score is low: then the token-1..3 mask with the best predicted
    IoU (``_dynamic_multimask_via_stability`` of the reference). The choice is a chain of selects,
    since a gather by batch index would need data-dependent indices.
    """

    # The logit offset of the stability score, and the score from which token 0 is trusted.
    delta, threshold = 0.05, 0.98

    def __init__(self, architecture: DecoderArchitecture) -> None:
        super().__init__()
        self.always_first = architecture.single_mask == "token0"

    def forward(self, masks: Tensor, iou: Tensor) -> Pair:
        """masks [P, M, h, w] and iou [P, M] to [P, 1, h, w] and [P, 1]."""
        chosen, chosen_iou = masks[:, :1], iou[:, :1]
        if self.always_first:
            return chosen, chosen_iou
        stable = self.stability(chosen) >= self.threshold
        best = torch.argmax(iou[:, 1:], dim=1, keepdim=True)
        other, other_iou = masks[:, 1:2], iou[:, 1:2]
        for index in range(1, masks.shape[1] - 1):
            hit = best == index
            other = torch.where(hit[:, :, None, None], masks[:, index + 1 : index + 2], other)
            other_iou = torch.where(hit, iou[:, index + 1 : index + 2], other_iou)
        return (
            torch.where(stable[:, :, None, None], chosen, other),
            torch.where(stable, chosen_iou, other_iou),
        )

    def stability(self, mask: Tensor) -> Tensor:
        """The stability score of a mask [P, 1, h, w], in [0, 1], [P, 1]."""
        inner = (mask > self.delta).float().sum(dim=(2, 3))
        outer = (mask > -self.delta).float().sum(dim=(2, 3))
        # max(outer, 1): where outer is 0 so is inner, and the score is defined as 1.
        return torch.where(outer > 0.5, inner / torch.clamp(outer, min=1.0), 1.0)


class SamDecoderGraph(nn.Module):
    """Features and prompts to masks, in one pass: of one image, or of one for each object.

    Nothing is computed from how many images there are, so that one image's features broadcast over
    the objects.

    ``tensors`` use SAM's own names below ``prompt_prefix`` and ``decoder_prefix``.
    """

    def __init__(
        self,
        architecture: DecoderArchitecture,
        tensors: Mapping[str, Tensor],
        prompt_prefix: str,
        decoder_prefix: str,
    ) -> None:
        super().__init__()
        arch = self.architecture = architecture
        self._build_prompts(tensors, prompt_prefix)
        d = decoder_prefix
        tokens = [tensors[d + "iou_token.weight"], tensors[d + "mask_tokens.weight"]]
        if arch.object_score:
            tokens.insert(0, tensors[d + "obj_score_token.weight"])
        self.output_tokens = nn.Parameter(torch.cat(tokens)[None])
        self.no_padding: Tensor
        self.register_buffer(
            "no_padding", torch.zeros(1, self.output_tokens.shape[1]), persistent=False
        )
        self.masks = tensors[d + "mask_tokens.weight"].shape[0]

        layers = count_children(tensors, d + "transformer.layers.")
        self.blocks = nn.ModuleList(
            TwoWayBlock(tensors, f"{d}transformer.layers.{i}.", arch.heads, first=i == 0)
            for i in range(layers)
        )
        self.final = TokenToImage(tensors, d + "transformer.final_attn_token_to_image.", arch.heads)
        self.final_norm = layer_norm(tensors, d + "transformer.norm_final_attn.", 1e-5)

        self.up1 = Linear(
            *folding.transposed_2x2_as_matrix(
                tensors[d + "output_upscaling.0.weight"], tensors[d + "output_upscaling.0.bias"]
            )
        )
        self.up1_norm = layer_norm(tensors, d + "output_upscaling.1.", 1e-6)
        self.up2 = Linear(
            *folding.transposed_2x2_as_matrix(
                tensors[d + "output_upscaling.3.weight"], tensors[d + "output_upscaling.3.bias"]
            )
        )

        self.single_mask = SingleMask(arch)
        self.hyper = self._stacked_hypernetworks(tensors, d)
        self.iou_head = mlp(tensors, self._head_names(tensors, d + "iou_prediction_head."))
        if arch.object_score:
            self.object_head = mlp(tensors, self._head_names(tensors, d + "pred_obj_score_head."))

    def _build_prompts(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self.positions = FourierPositions(
            tensors[prefix + "pe_layer.positional_encoding_gaussian_matrix"]
        )
        # The image's positions are computed in the graph: runtimes do it once, when they load,
        # and the file stays free of a table of several megabytes.
        self.register_buffer(
            "centres", cell_centres(self.architecture.grid)[None], persistent=False
        )
        rows = [tensors[prefix + "not_a_point_embed.weight"]]
        rows += [tensors[f"{prefix}point_embeddings.{i}.weight"] for i in range(4)]
        self.label_table = nn.Parameter(torch.cat(rows))
        self.mask_prompt = MaskPrompt(tensors, prefix, self.architecture.grid)

    @staticmethod
    def _head_names(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
        count = count_children(tensors, prefix + "layers.")
        return [f"{prefix}layers.{i}" for i in range(count)]

    def _stacked_hypernetworks(self, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
        """The masks' separate MLPs side by side, as batched matmuls."""
        names = [
            self._head_names(tensors, f"{prefix}output_hypernetworks_mlps.{i}.")
            for i in range(self.masks)
        ]
        layers: list[nn.Module] = []
        for same_layer in zip(*names, strict=True):
            if layers:
                layers.append(nn.ReLU())
            layers.append(
                Linear(
                    torch.stack([tensors[n + ".weight"].T for n in same_layer]),
                    torch.stack([tensors[n + ".bias"] for n in same_layer])[:, None],
                )
            )
        return nn.Sequential(*layers)

    def embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """points [P, N, 2] in input pixels, labels [P, N] up to 3, to [P, N, C].

        Label -1 is the "not a point" embedding, whatever the coordinates. Labels below it are
        padding; no one attends to what they embed to.
        """
        unit = (points + 0.5) / self.architecture.image_size
        is_point = (labels >= 0).to(points.dtype)[..., None]
        return self.positions(unit) * is_point + nn.functional.embedding(
            torch.clamp(labels, min=-1) + 1, self.label_table
        )

    def forward(
        self,
        image_embeddings: tuple[Tensor, ...],
        input_points: Tensor,
        input_labels: Tensor,
        input_masks: Tensor,
        has_input_masks: Tensor,
    ) -> tuple[Tensor, ...]:
        """See :mod:`sam3rt_export.contracts` for names, shapes and meanings."""
        arch = self.architecture
        points, labels = input_points[0], input_labels[0]
        prompt = self.embed_points(points, labels)
        # One zero per object spreads the output tokens over the objects. An expand would need the
        # number of objects as a value; the tracer would take it from whichever input has it,
        # the mask prompts included, of which there may be one for all objects.
        zero = (labels.sum(dim=1) * 0).to(prompt.dtype)[:, None, None]
        query_pe = torch.cat([self.output_tokens + zero, prompt], dim=1)
        tokens = query_pe.shape[1]
        absent = (labels < -1).to(prompt.dtype) * PADDING_SCORE
        present = zero[:, :, 0] + self.no_padding
        padding = torch.cat([present, absent], dim=1)[:, None]

        image = channels_last(image_embeddings[-1])
        keys = image + self.mask_prompt(input_masks, has_input_masks)
        image_pe = self.positions(self.centres)
        queries = query_pe
        for block in self.blocks:
            queries, keys = block(queries, keys, query_pe, image_pe, padding, tokens)
        placed = keys + image_pe
        # Nothing reads what the prompt's own tokens would learn from the image here.
        count = self.output_tokens.shape[1]
        queries, query_pe = queries[:, :count], query_pe[:, :count]
        queries = self.final_norm(queries + self.final(queries + query_pe, placed, keys, count))

        first = int(arch.object_score)
        iou = self.iou_head(queries[:, first])
        if arch.sigmoid_iou:
            iou = torch.sigmoid(iou)
        mask_tokens = queries[:, first + 1 : first + 1 + self.masks]
        masks = self.upscale(keys, mask_tokens, image_embeddings[:-1])
        single, single_iou = self.single_mask(masks, iou)
        results = [masks[None, :, 1:], iou[None, :, 1:], single[None], single_iou[None]]
        if arch.object_score:
            results.append(self.object_head(queries[:, 0])[None])
        return tuple(results)

    def upscale(self, keys: Tensor, mask_tokens: Tensor, details: tuple[Tensor, ...]) -> Tensor:
        """Image tokens to mask logits, [P, masks, 4G, 4G].

        Channels stay last until the masks themselves: interleaving the cells then moves whole
        runs of channels, and the high-resolution maps need one plain transpose each.
        """
        g = self.architecture.grid
        y = interleave_cells(self.up1(keys), g)
        if self.architecture.high_resolution:
            y = y + channels_last(details[1])
        y = interleave_cells(self.up2(gelu(self.up1_norm(y))), 2 * g)
        if self.architecture.high_resolution:
            y = y + channels_last(details[0])
        y = gelu(y)
        hyper = self.hyper(mask_tokens[:, :, None])[:, :, 0]
        logits = torch.matmul(hyper, y.transpose(1, 2))
        return regroup(logits, -1, self.masks, 4 * g, 4 * g)
