"""Names of one parameter in sam3.pt, in transformers and in the reference's own tracker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from tests.support.export_helpers import TRUNK, USED, canonical_tensors, keys, small_tensors
from torch import Tensor

from sam3rt_export.checkpoint_keys import (
    RULES,
    from_transformers,
    to_transformers,
)
from sam3rt_export.references.transformers_sam3 import Sam3TrackerModel, build_tracker_model
from sam3rt_export.sources.sam3_architecture import read_architecture

POSITIONS = TRUNK + "pos_embed"
GAUSS = "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The small SAM 3, unused tensors included."""
    return small_tensors()


def used(names: Iterable[str]) -> set[str]:
    """The names the interactive predictor reads; rotary tables are computed, not read."""
    return {name for name in names if name.startswith(USED) and not name.endswith("freqs_cis")}


def test_there_and_back_again_gives_every_used_tensor(tensors: dict[str, Tensor]) -> None:
    back = from_transformers(to_transformers(tensors))
    assert set(back) == used(tensors)
    for name, tensor in back.items():
        if name == POSITIONS:
            assert torch.equal(tensor[:, 1:], tensors[name][:, 1:])
            assert not tensor[:, 0].any(), "the class token's position is not blank"
        else:
            assert torch.equal(tensor, tensors[name]), name


def test_every_tensor_of_the_model_has_a_name_and_no_other(tensors: dict[str, Tensor]) -> None:
    config = build_tracker_model(read_architecture(tensors), tensors).config
    report = Sam3TrackerModel(config).load_state_dict(to_transformers(tensors), strict=False)
    assert report.missing_keys == []
    assert report.unexpected_keys == []


def test_transformers_names_there_and_back_again(tensors: dict[str, Tensor]) -> None:
    state = build_tracker_model(read_architecture(tensors), tensors).state_dict()
    again = to_transformers(from_transformers(state))
    assert set(again) == set(state)
    for name, tensor in again.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("canonical", "hf"),
    [
        ("trunk.patch_embed.proj.weight", "backbone.embeddings.patch_embeddings.projection.weight"),
        ("trunk.ln_pre.bias", "backbone.layer_norm.bias"),
        ("trunk.blocks.3.norm2.weight", "backbone.layers.3.layer_norm2.weight"),
        ("trunk.blocks.1.attn.proj.bias", "backbone.layers.1.attention.o_proj.bias"),
        ("trunk.blocks.2.mlp.fc1.weight", "backbone.layers.2.mlp.fc1.weight"),
        ("sam2_convs.0.dconv_2x2_0.weight", "neck.fpn_layers.0.scale_layers.0.weight"),
        ("sam2_convs.0.dconv_2x2_1.bias", "neck.fpn_layers.0.scale_layers.2.bias"),
        ("sam2_convs.1.dconv_2x2.weight", "neck.fpn_layers.1.scale_layers.0.weight"),
        ("sam2_convs.2.conv_1x1.weight", "neck.fpn_layers.2.proj1.weight"),
        ("sam2_convs.3.conv_3x3.bias", "neck.fpn_layers.3.proj2.bias"),
    ],
)
def test_names_of_the_encoder(tensors: dict[str, Tensor], canonical: str, hf: str) -> None:
    tensor = tensors[f"detector.backbone.vision_backbone.{canonical}"]
    assert to_transformers(tensors)[f"vision_encoder.{hf}"] is tensor


@pytest.mark.parametrize(
    ("canonical", "hf"),
    [
        ("no_mem_embed", "no_memory_embedding"),
        ("sam_prompt_encoder.no_mask_embed.weight", "prompt_encoder.no_mask_embed.weight"),
        (
            "sam_prompt_encoder.mask_downscaling.4.weight",
            "prompt_encoder.mask_embed.layer_norm2.weight",
        ),
        ("sam_prompt_encoder.mask_downscaling.6.bias", "prompt_encoder.mask_embed.conv3.bias"),
        ("sam_mask_decoder.iou_token.weight", "mask_decoder.iou_token.weight"),
        ("sam_mask_decoder.mask_tokens.weight", "mask_decoder.mask_tokens.weight"),
        ("sam_mask_decoder.obj_score_token.weight", "mask_decoder.obj_score_token.weight"),
        ("sam_mask_decoder.conv_s1.weight", "mask_decoder.conv_s1.weight"),
        ("sam_mask_decoder.output_upscaling.0.weight", "mask_decoder.upscale_conv1.weight"),
        ("sam_mask_decoder.output_upscaling.1.weight", "mask_decoder.upscale_layer_norm.weight"),
        ("sam_mask_decoder.output_upscaling.3.bias", "mask_decoder.upscale_conv2.bias"),
        (
            "sam_mask_decoder.transformer.layers.1.norm4.bias",
            "mask_decoder.transformer.layers.1.layer_norm4.bias",
        ),
        (
            "sam_mask_decoder.transformer.layers.0.mlp.lin2.weight",
            "mask_decoder.transformer.layers.0.mlp.proj_out.weight",
        ),
        (
            "sam_mask_decoder.transformer.layers.0.cross_attn_image_to_token.out_proj.weight",
            "mask_decoder.transformer.layers.0.cross_attn_image_to_token.o_proj.weight",
        ),
        (
            "sam_mask_decoder.transformer.final_attn_token_to_image.q_proj.bias",
            "mask_decoder.transformer.final_attn_token_to_image.q_proj.bias",
        ),
        (
            "sam_mask_decoder.transformer.norm_final_attn.weight",
            "mask_decoder.transformer.layer_norm_final_attn.weight",
        ),
        (
            "sam_mask_decoder.output_hypernetworks_mlps.2.layers.1.weight",
            "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight",
        ),
        (
            "sam_mask_decoder.iou_prediction_head.layers.0.bias",
            "mask_decoder.iou_prediction_head.proj_in.bias",
        ),
        (
            "sam_mask_decoder.pred_obj_score_head.layers.2.weight",
            "mask_decoder.pred_obj_score_head.proj_out.weight",
        ),
    ],
)
def test_names_of_the_tracker(tensors: dict[str, Tensor], canonical: str, hf: str) -> None:
    assert to_transformers(tensors)[hf] is tensors[f"tracker.{canonical}"]


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_qkv_is_split_in_this_order(tensors: dict[str, Tensor], leaf: str) -> None:
    renamed = to_transformers(tensors)
    whole = tensors[f"{TRUNK}blocks.2.attn.qkv.{leaf}"]
    for index, part in enumerate("qkv"):
        name = f"vision_encoder.backbone.layers.2.attention.{part}_proj.{leaf}"
        assert torch.equal(renamed[name], whole[128 * index : 128 * (index + 1)])


def test_stacked_and_shared_tensors(tensors: dict[str, Tensor]) -> None:
    renamed = to_transformers(tensors)
    assert renamed["shared_image_embedding.positional_embedding"] is tensors[GAUSS]
    assert renamed["prompt_encoder.shared_embedding.positional_embedding"] is tensors[GAUSS]
    for row in range(4):
        expected = tensors[f"tracker.sam_prompt_encoder.point_embeddings.{row}.weight"][0]
        assert torch.equal(renamed["prompt_encoder.point_embed.weight"][row], expected)
    name = "vision_encoder.backbone.embeddings.position_embeddings"
    assert torch.equal(renamed[name], tensors[POSITIONS][:, 1:])


def test_nothing_large_is_copied(tensors: dict[str, Tensor]) -> None:
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    copies = {
        name
        for name, tensor in to_transformers(tensors).items()
        if tensor.untyped_storage().data_ptr() not in owned
    }
    assert copies == {"prompt_encoder.point_embed.weight"}


def test_no_two_rules_for_one_name() -> None:
    for side in zip(*RULES, strict=True):
        assert [name for name, count in Counter(side).items() if count > 1] == []


def test_both_sides_of_a_rule_share_its_runs() -> None:
    assert all(canonical.count("{}") == hf.count("{}") for canonical, hf in RULES)


def test_names_of_the_references_own_tracker(tensors: dict[str, Tensor]) -> None:
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("tracker."):
            state[name.removeprefix("tracker.")] = tensor
        elif name.startswith("detector.backbone.vision_backbone."):
            state[name.removeprefix("detector.")] = tensor
    assert "backbone.vision_backbone.trunk.pos_embed" in state
    assert "sam_mask_decoder.conv_s0.weight" in state
    renamed = canonical_tensors(state, "test")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in renamed.items())
    assert used(keys()) <= set(renamed)
