"""The names of one parameter in Meta's checkpoints and in transformers' models.

The names in ``sam3.pt`` and, of SAM 2's image encoder, in ``sam2.1_hiera_*.pt`` are the canonical
ones here; transformers' are those of ``Sam3TrackerModel`` and ``Sam2Model``. No name of one family
is one of the other's. A rule is a pair of names in which ``{}`` stands for a number that both sides
share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import ModelError

TRUNK = "detector.backbone.vision_backbone.trunk."
# EfficientSAM3's encoder stands in the trunk's place, below this.
STUDENT = TRUNK + "model."
NECK = "detector.backbone.vision_backbone.sam2_convs."
PROMPT = "tracker.sam_prompt_encoder."
DECODER = "tracker.sam_mask_decoder."
NO_MEMORY = "tracker.no_mem_embed"
# SAM 2's image encoder; its other parts have SAM 3's names.
SAM2_TRUNK = "image_encoder.trunk."
SAM2_NECK = "image_encoder.neck.convs."

_HF_TRUNK = "vision_encoder.backbone."
_HF_NECK = "vision_encoder.neck.fpn_layers."

_WEIGHT_BIAS = ("weight", "bias")


def _both(canonical: str, hf: str) -> list[tuple[str, str]]:
    return [(f"{canonical}.{leaf}", f"{hf}.{leaf}") for leaf in _WEIGHT_BIAS]


def _attention(canonical: str, hf: str) -> list[tuple[str, str]]:
    rules = []
    for name in ("q_proj", "k_proj", "v_proj"):
        rules += _both(f"{canonical}.{name}", f"{hf}.{name}")
    return rules + _both(f"{canonical}.out_proj", f"{hf}.o_proj")


def _head(canonical: str, hf: str) -> list[tuple[str, str]]:
    rules = _both(f"{canonical}.layers.0", f"{hf}.proj_in")
    rules += _both(f"{canonical}.layers.1", f"{hf}.layers.0")
    return rules + _both(f"{canonical}.layers.2", f"{hf}.proj_out")


def _rules() -> list[tuple[str, str]]:
    rules = [
        (
            TRUNK + "patch_embed.proj.weight",
            _HF_TRUNK + "embeddings.patch_embeddings.projection.weight",
        ),
        (NO_MEMORY, "no_memory_embedding"),
        (PROMPT + "not_a_point_embed.weight", "prompt_encoder.not_a_point_embed.weight"),
        (PROMPT + "no_mask_embed.weight", "prompt_encoder.no_mask_embed.weight"),
    ]
    rules += _both(TRUNK + "ln_pre", _HF_TRUNK + "layer_norm")
    block, hf_block = TRUNK + "blocks.{}.", _HF_TRUNK + "layers.{}."
    for name, hf_name in (
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("attn.proj", "attention.o_proj"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ):
        rules += _both(block + name, hf_block + hf_name)
    for level, name, hf_name in (
        ("0", "dconv_2x2_0", "scale_layers.0"),
        ("0", "dconv_2x2_1", "scale_layers.2"),
        ("1", "dconv_2x2", "scale_layers.0"),
    ):
        rules += _both(f"{NECK}{level}.{name}", f"{_HF_NECK}{level}.{hf_name}")
    rules += _both(NECK + "{}.conv_1x1", _HF_NECK + "{}.proj1")
    rules += _both(NECK + "{}.conv_3x3", _HF_NECK + "{}.proj2")
    for number, hf_name in (
        ("0", "conv1"),
        ("1", "layer_norm1"),
        ("3", "conv2"),
        ("4", "layer_norm2"),
        ("6", "conv3"),
    ):
        rules += _both(f"{PROMPT}mask_downscaling.{number}", f"prompt_encoder.mask_embed.{hf_name}")
    hf_decoder = "mask_decoder."
    layer, hf_layer = DECODER + "transformer.layers.{}.", hf_decoder + "transformer.layers.{}."
    for which in range(1, 5):
        rules += _both(f"{layer}norm{which}", f"{hf_layer}layer_norm{which}")
    rules += _both(layer + "mlp.lin1", hf_layer + "mlp.proj_in")
    rules += _both(layer + "mlp.lin2", hf_layer + "mlp.proj_out")
    for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
        rules += _attention(layer + name, hf_layer + name)
    final = "transformer.final_attn_token_to_image"
    rules += _attention(DECODER + final, hf_decoder + final)
    rules += _both(
        DECODER + "transformer.norm_final_attn", hf_decoder + "transformer.layer_norm_final_attn"
    )
    for number, hf_name in (
        ("0", "upscale_conv1"),
        ("1", "upscale_layer_norm"),
        ("3", "upscale_conv2"),
    ):
        rules += _both(f"{DECODER}output_upscaling.{number}", hf_decoder + hf_name)
    rules += _head(
        DECODER + "output_hypernetworks_mlps.{}", hf_decoder + "output_hypernetworks_mlps.{}"
    )
    for head in ("iou_prediction_head", "pred_obj_score_head"):
        rules += _head(DECODER + head, hf_decoder + head)
    for name in ("conv_s0", "conv_s1"):
        rules += _both(DECODER + name, hf_decoder + name)
    for name in ("iou_token", "mask_tokens", "obj_score_token"):
        rules.append((f"{DECODER}{name}.weight", f"{hf_decoder}{name}.weight"))
    return rules


def _sam2_rules() -> list[tuple[str, str]]:
    """Of SAM 2's image encoder."""
    rules = [(SAM2_TRUNK + name, _HF_TRUNK + name) for name in ("pos_embed", "pos_embed_window")]
    rules += _both(SAM2_TRUNK + "patch_embed.proj", _HF_TRUNK + "patch_embed.projection")
    for name, hf_name in (
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("attn.qkv", "attn.qkv"),
        ("attn.proj", "attn.proj"),
        ("proj", "proj"),
        ("mlp.layers.0", "mlp.proj_in"),
        ("mlp.layers.1", "mlp.proj_out"),
    ):
        rules += _both(f"{SAM2_TRUNK}blocks.{{}}.{name}", f"{_HF_TRUNK}blocks.{{}}.{hf_name}")
    return rules + _both(SAM2_NECK + "{}.conv", "vision_encoder.neck.convs.{}")


RULES = (*_rules(), *_sam2_rules())

_POS = TRUNK + "pos_embed"
_HF_POS = _HF_TRUNK + "embeddings.position_embeddings"
_GAUSS = PROMPT + "pe_layer.positional_encoding_gaussian_matrix"
_HF_GAUSS = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)
_HF_POINTS = "prompt_encoder.point_embed.weight"
_POINTS = 4


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename canonical tensors for ``load_state_dict`` of transformers' model.

    Tensors the interactive predictor does not use are left out. No tensor is copied but the
    four stacked point embeddings.
    """
    renamed = dict(_rename(tensors, RULES))
    for name, tensor in tensors.items():
        match = re.fullmatch(re.escape(TRUNK) + r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if match:
            block, leaf = match.groups()
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{_HF_TRUNK}layers.{block}.attention.{part}_proj.{leaf}"] = chunk
    if _POS in tensors:  # EfficientSAM3 has none, and SAM 2's have rules
        renamed[_HF_POS] = tensors[_POS][:, 1:]
    for name in _HF_GAUSS:
        renamed[name] = tensors[_GAUSS]
    renamed[_HF_POINTS] = torch.cat(
        [tensors[f"{PROMPT}point_embeddings.{i}.weight"] for i in range(_POINTS)]
    )
    return renamed


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state of transformers' model to canonical names; the inverse of the above.

    The class-token position that transformers drops comes back as zeros; nothing reads it.
    """
    renamed = dict(_rename(state, [(hf, canonical) for canonical, hf in RULES]))
    pattern = re.escape(_HF_TRUNK) + r"layers\.(\d+)\.attention\.q_proj\.(weight|bias)"
    for name in state:
        match = re.fullmatch(pattern, name)
        if match:
            block, leaf = match.groups()
            parts = [
                state[f"{_HF_TRUNK}layers.{block}.attention.{part}_proj.{leaf}"] for part in "qkv"
            ]
            renamed[f"{TRUNK}blocks.{block}.attn.qkv.{leaf}"] = torch.cat(parts)
    if _HF_POS in state:
        positions = state[_HF_POS]
        renamed[_POS] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    renamed[_GAUSS] = state[_HF_GAUSS[0]]
    for index, row in enumerate(state[_HF_POINTS].split(1)):
        renamed[f"{PROMPT}point_embeddings.{index}.weight"] = row
    return renamed


def unknown_names(names: Iterable[str]) -> list[str]:
    """Those that are no canonical name of a parameter the interactive predictor has."""
    return [name for name in names if not _CANONICAL.fullmatch(name)]


def unknown_transformers_names(names: Iterable[str]) -> list[str]:
    """Those that are no name of a parameter of transformers' models."""
    return [name for name in names if not _TRANSFORMERS.fullmatch(name)]


LORA = re.compile(r"(^|[._])lora_|\.base_layer\.|^base_model\.")
# What unknown tensors look like: a pattern of their names, what they are and what helps.
_LOOKS = (
    (
        LORA,
        "LoRA adapters: merge them into the weights first (PEFT: model.merge_and_unload()), or "
        "save them by themselves and pass them by --lora",
    ),
    (
        re.compile(
            r"(weight|input)_scale|_scale_inv|scale_(weight|input)|\.scales?$|zero_point|_packed|quant|absmax|\.SCB$"
        ),
        "the scales of quantized weights: export the weights they were made from",
    ),
    (re.compile(r"_orig_mod"), "the names of a compiled model: pass the model it was made from"),
)


def unknown_tensors(names: Iterable[str]) -> ModelError:
    """The error for tensors that belong to an exported part and are none of its parameters.

    Args:
        names: all of them, as they stand in the checkpoint.
    """
    names = sorted(names)
    looks = next((text for regex, text in _LOOKS if any(regex.search(n) for n in names)), None)
    shown = ", ".join(repr(name) for name in names[:3])
    return ModelError(
        f"{len(names)} unknown tensors in the parts that are exported, such as {shown}"
        + (f". They look like {looks}" if looks else "; without them this is another model")
    )


def _pattern(rule: str) -> str:
    return re.escape(rule).replace(r"\{\}", r"(\d+)")


def _any_of(rules: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(_pattern, rules)))


_CANONICAL = _any_of(
    [canonical for canonical, _ in RULES]
    + [f"{TRUNK}blocks.{{}}.attn.qkv.{leaf}" for leaf in _WEIGHT_BIAS]
    + [f"{TRUNK}blocks.{{}}.attn.freqs_cis{part}" for part in ("", "_real", "_imag")]
    + [_POS, _GAUSS]
    + [f"{PROMPT}point_embeddings.{index}.weight" for index in range(_POINTS)]
)
_TRANSFORMERS = _any_of(
    [hf for _, hf in RULES]
    + [
        f"{_HF_TRUNK}layers.{{}}.attention.{part}_proj.{leaf}"
        for part in "qkv"
        for leaf in _WEIGHT_BIAS
    ]
    + [_HF_POS, *_HF_GAUSS, _HF_POINTS]
)


def _rename(
    tensors: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]
) -> Iterable[tuple[str, Tensor]]:
    compiled = [(re.compile(_pattern(old)), new) for old, new in rules]
    for name, tensor in tensors.items():
        for pattern, new in compiled:
            match = pattern.fullmatch(name)
            if match:
                yield new.format(*match.groups()), tensor
                break
