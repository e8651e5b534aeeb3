"""Names under which people hold the same weights, and tensors that an export must not pass over."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from tests.support.export_helpers import (
    DECODER,
    NECK,
    NO_MEMORY,
    PROMPT,
    TRUNK,
    as_multiplex,
    small_tensors,
    tiny_tensors,
)
from torch import Tensor

from sam3rt_export.errors import CheckpointError
from sam3rt_export.sources.state_dict import canonical_tensors, describe_names, family_of

Tensors = dict[str, Tensor]

QKV = TRUNK + "blocks.1.attn.qkv"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """A tiny SAM 3."""
    return tiny_tensors()


def renamed(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """Replaces the first prefix that fits."""

    def rename(name: str) -> str:
        for old, new in pairs:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return rename


NAMINGS: dict[str, Callable[[str], str]] = {
    "the checkpoint's own": lambda name: name,
    "DistributedDataParallel": lambda name: "module." + name,
    "torch.compile": lambda name: "_orig_mod." + name,
    "both": lambda name: "module._orig_mod." + name,
    "a compiled part": lambda name: name.replace("trunk.blocks.", "trunk._orig_mod.blocks."),
    "the image model": renamed(
        ("detector.", ""), ("tracker.", "inst_interactive_predictor.model.")
    ),
    "the tracker": renamed(("detector.", ""), ("tracker.", "")),
    "older internal names": renamed(("detector.", "sam3_model."), ("tracker.", "sam2_predictor.")),
}


@pytest.mark.parametrize("rename", NAMINGS.values(), ids=list(NAMINGS))
def test_every_naming_gives_the_same_tensors(
    tensors: Tensors, rename: Callable[[str], str]
) -> None:
    state = {rename(name): tensor for name, tensor in tensors.items()}
    assert family_of(state) == "sam3"
    found = canonical_tensors(state, "test")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("rename", [lambda name: name, NAMINGS["older internal names"]])
def test_the_parts_for_clicks_are_taken_from_sam_3_1(
    tensors: Tensors, rename: Callable[[str], str]
) -> None:
    state = {rename(name): tensor for name, tensor in as_multiplex(tensors).items()}
    assert family_of(state) == "sam3.1"
    found = canonical_tensors(state, "test")
    assert found.keys() == {name for name in tensors if not name.startswith(NECK + "3.")}
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def test_the_small_model_as_a_sam_3_1() -> None:
    """Golden data hold for it: its graphs are made of equal tensors."""
    small = small_tensors()
    expected = canonical_tensors(small, "test")
    found = canonical_tensors(as_multiplex(small), "test")
    assert found.keys() == {name for name in expected if not name.startswith(NECK + "3.")}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_rotary_tables_in_two_parts(tensors: Tensors) -> None:
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("freqs_cis"):
            state |= {name + "_real": tensor.real, name + "_imag": tensor.imag}
        else:
            state[name] = tensor
    found = canonical_tensors(state, "test")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_one_part_of_a_rotary_table_is_not_passed_over(tensors: Tensors) -> None:
    name = TRUNK + "blocks.0.attn.freqs_cis"
    state = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match="freqs_cis_real"):
        canonical_tensors(state | {name + "_real": tensors[name].real}, "test")


UNKNOWN: dict[str, tuple[str, str]] = {
    "LoRA of PEFT": (QKV + ".lora_A.default.weight", "LoRA.*merge"),
    "LoRA of loralib": (QKV + ".lora_B", "LoRA.*merge"),
    "LoRA in a copy of the model": ("base_model.model." + QKV + ".lora_A.weight", "LoRA.*merge"),
    "LoRA elsewhere": ("adapters.lora_A.0", "LoRA.*merge"),
    "quantized": (QKV + ".weight_scale", "quantized"),
    "EfficientSAM3's encoder beside it": (
        TRUNK + "model.backbone.model.features.0.0.c.weight",
        "EfficientSAM3",
    ),
    "another head": (DECODER + "iou_prediction_head.layers.extra.weight", "another model"),
    "a prompt": (PROMPT + "something_else", "another model"),
    "a block": (TRUNK + "blocks.x.norm1.weight", "another model"),
    "a neck": (NECK + "2.conv_5x5.weight", "another model"),
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_what_would_be_left_out_is_refused_by_name(
    tensors: Tensors, name: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        canonical_tensors(tensors | {name: torch.zeros(2, 2)}, "model.pt")
    assert repr(name) in str(caught.value)
    assert str(caught.value).startswith("model.pt: 1 unknown")


@pytest.mark.parametrize(
    "name",
    [
        "detector.transformer.encoder.layers.0.lora_A.weight",
        "tracker.maskmem_backbone.extra",
        "tracker.unrelated",
        "detector.backbone.vision_backbone.convs.0.conv_1x1.weight",
        "optimizer.step",
    ],
)
def test_parts_that_are_not_exported_may_hold_anything(tensors: Tensors, name: str) -> None:
    found = canonical_tensors(tensors | {name: torch.full((2,), float("nan"))}, "test")
    assert found.keys() == tensors.keys()


def test_one_parameter_under_two_names_is_refused(tensors: Tensors) -> None:
    name = NO_MEMORY
    with pytest.raises(CheckpointError, match=r"both '.*no_mem_embed' and 'module\.tracker"):
        canonical_tensors(tensors | {"module." + name: tensors[name]}, "test")


class Subclass(Tensor):
    """Stands for what quantizing libraries put in a tensor's place."""


VALUES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), "NaN or infinity"),
    "infinity": (lambda t: t.index_fill(0, torch.tensor([1]), float("-inf")), "NaN or infinity"),
    "too large for FP32": (lambda t: t.double() + 1e300, "NaN or infinity"),
    "int8": (lambda t: t.to(torch.int8), "int8"),
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "no data": (lambda t: t.to("meta"), "meta device"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized"),
    "a subclass": (lambda t: t.as_subclass(Subclass), "a Subclass"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("change", "message"), VALUES.values(), ids=list(VALUES))
def test_values_that_cannot_be_used_are_refused(
    tensors: Tensors, change: Callable[[Tensor], Tensor], message: str
) -> None:
    name = DECODER + "conv_s0.weight"
    with pytest.raises(CheckpointError, match=message) as caught:
        canonical_tensors(tensors | {name: change(tensors[name].clone())}, "test")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["image_encoder.blocks.0.attn.qkv.weight", "mask_decoder.iou_token.weight"], "SAM 1"),
        (["image_encoder.trunk.pos_embed", "sam_mask_decoder.iou_token.weight"], "SAM 2"),
        ([TRUNK + "pos_embed", "detector.transformer.x"], "detector without the tracker"),
        (["backbone.vision_backbone.trunk.pos_embed"], "detector without the tracker"),
        (
            [TRUNK + "pos_embed", "tracker.model.sam_mask_decoder.iou_token.weight"],
            "decoder for propagation",
        ),
        (["tracker.sam_mask_decoder.iou_token.weight"], "tracker without its image encoder"),
        (["tracker_model.mask_decoder.iou_token.weight"], "transformers' names"),
        ([TRUNK + "model.backbone.model.features.0.0.c.weight"], "EfficientSAM3"),
        (["base_model.model.x.lora_A.weight"], "LoRA"),
        (["fc.weight", "fc.bias"], r"neither.*'fc\.weight', 'fc\.bias'"),
        ([], "no tensors"),
    ],
)
def test_what_is_no_sam3_is_said_to_be_what_it_is(names: list[str], message: str) -> None:
    assert re.search(message, describe_names(names))


def test_a_detector_alone_is_refused_as_such(tensors: Tensors) -> None:
    state = {name: t for name, t in tensors.items() if name.startswith("detector.")}
    with pytest.raises(CheckpointError, match=r"detector without the tracker.*accepted are"):
        canonical_tensors(state, "finetuned.pt")
