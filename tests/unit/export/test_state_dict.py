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
    STUDENT,
    TRUNK,
    as_multiplex,
    canonical_tensors,
    tiny_student,
    tiny_tensors,
)
from torch import Tensor

from sam3rt_export.errors import CheckpointError
from sam3rt_export.sources.state_dict import (
    describe_names,
    family_of,
    interactive_parts,
    tracker_parts,
)

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
    "quantized by other names": (QKV + ".scale_weight", "quantized"),
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


@pytest.mark.parametrize("multiplex", [False, True])
def test_a_second_model_beside_the_first_is_not_passed_over(
    tensors: Tensors, multiplex: bool
) -> None:
    """Such as the averaged weights, which are those that somebody means."""
    copy = {"ema." + name: t + 1 for name, t in tensors.items() if t.is_floating_point()}
    state = as_multiplex(tensors) if multiplex else tensors
    with pytest.raises(CheckpointError, match=r"^x\.pt: 'ema\..* is of a second model"):
        canonical_tensors(state | copy, "x.pt")


def test_one_parameter_under_two_names_is_refused(tensors: Tensors) -> None:
    name = NO_MEMORY
    with pytest.raises(CheckpointError, match=r"both '.*no_mem_embed' and 'module\.tracker"):
        canonical_tensors(tensors | {"module." + name: tensors[name]}, "test")


class Subclass(Tensor):
    """Stands for what quantizing libraries put in a tensor's place."""


VALUES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), "NaN, infinity or"),
    "infinity": (lambda t: t.index_fill(0, torch.tensor([1]), float("-inf")), "NaN, infinity or"),
    "too large for FP32": (lambda t: t.double() + 1e300, "NaN, infinity or"),
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
        ([STUDENT + "backbone.model.features.0.0.c.weight"], "EfficientSAM3's.*--tracker sam3.pt"),
        (["student_trunk.backbone.model.layers.0.x"], "EfficientSAM3's.*--tracker sam3.pt"),
        (["module.backbone.model.input_stem.x", "module.head.0.weight"], "EfficientSAM3's"),
        (["base_model.model.x.lora_A.weight"], "LoRA"),
        (["fc.weight", "fc.bias"], r"neither.*'fc\.weight', 'fc\.bias'"),
        ([], "no tensors"),
    ],
)
def test_what_is_no_sam3_is_said_to_be_what_it_is(names: list[str], message: str) -> None:
    assert re.search(message, describe_names(names))


def test_a_detector_alone_is_refused_as_such(tensors: Tensors) -> None:
    state = {name: t for name, t in tensors.items() if name.startswith("detector.")}
    with pytest.raises(CheckpointError, match=r"without the tracker.*--tracker sam3\.pt.*accepted"):
        canonical_tensors(state, "finetuned.pt")


# --- EfficientSAM3, and models of two files -------------------------------------------------------


@pytest.fixture(scope="module")
def student() -> Tensors:
    """A small EfficientSAM3."""
    return tiny_student("efficientvit")


def without_counts(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}


def of_encoder(tensors: Tensors) -> Tensors:
    """What a file holds that was fine-tuned by the official trainer: no neck and no tracker."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(TRUNK)}


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


STUDENT_NAMINGS: dict[str, Callable[[str], str]] = {
    "merged": lambda name: name,
    "DistributedDataParallel": lambda name: "module." + name,
    "the trainer's": renamed(("detector.", "")),
    "a student by itself": renamed((STUDENT, "student_trunk.")),
    "the encoder's training": renamed((STUDENT, "")),
    "the same, parallel": renamed((STUDENT, "module.")),
}


@pytest.mark.parametrize("rename", STUDENT_NAMINGS.values(), ids=list(STUDENT_NAMINGS))
def test_every_naming_of_a_student_gives_the_same_tensors(
    student: Tensors, rename: Callable[[str], str]
) -> None:
    state = {rename(name): tensor for name, tensor in student.items()}
    assert family_of(state) == "sam3"
    parts = interactive_parts(state, "test")
    assert (parts.student, parts.multiplex, parts.notes) == (True, False, ())
    assert same(parts.tensors, without_counts(student))


def test_a_student_wins_over_the_image_encoder_beside_it_and_that_is_said(
    student: Tensors, tensors: Tensors
) -> None:
    parts = interactive_parts(tensors | student, "test")
    assert same(parts.tensors, without_counts(student))
    (note,) = parts.notes
    assert re.search("two image encoders.*EfficientSAM3's", note)


def test_a_student_of_sam_3_1(student: Tensors) -> None:
    parts = interactive_parts(as_multiplex(student), "test")
    assert (parts.student, parts.multiplex) == (True, True)
    coarsest = {n for n in student if n.startswith(NECK + "3.")}
    assert parts.tensors.keys() == without_counts(student).keys() - coarsest


@pytest.mark.parametrize("multiplex", [False, True])
def test_a_tracker_completes_a_fine_tuned_encoder(tensors: Tensors, multiplex: bool) -> None:
    tuned = {name: tensor + 1.0 for name, tensor in of_encoder(tensors).items()}
    stock = as_multiplex(tensors) if multiplex else tensors
    parts = interactive_parts(tuned, "tuned.pt", tracker_parts(stock, "sam3.pt"))
    expected = canonical_tensors(stock, "test") | tuned
    assert same(parts.tensors, expected)
    assert parts.multiplex == multiplex
    assert parts.notes == ("the decoder for clicks and its neck: from the tracker's file",)


def test_a_necks_own_weights_are_kept(tensors: Tensors) -> None:
    tuned = {n: t + 1.0 for n, t in tensors.items() if n.startswith((TRUNK, NECK))}
    parts = interactive_parts(tuned, "tuned.pt", tracker_parts(tensors, "sam3.pt"))
    assert same(parts.tensors, tensors | tuned)
    assert parts.notes == ("the decoder for clicks: from the tracker's file",)


@pytest.mark.parametrize("multiplex", [False, True])
def test_a_tracker_of_another_version_than_the_neck_is_refused(
    tensors: Tensors, multiplex: bool
) -> None:
    of_3_1 = as_multiplex(tensors)
    tuned, stock = (of_3_1, tensors) if multiplex else (tensors, of_3_1)
    tuned = {name: t for name, t in tuned.items() if name.startswith("detector.")}
    said = "is SAM 3's, the neck in x.pt SAM 3.1's"
    with pytest.raises(CheckpointError, match=said if multiplex else r"is SAM 3\.1's.* SAM 3's"):
        interactive_parts(tuned, "x.pt", tracker_parts(stock, "sam3.pt"))


def test_a_prompt_encoder_of_its_own_is_not_replaced(tensors: Tensors) -> None:
    tuned = {name: t + 1.0 for name, t in tensors.items() if name.startswith((TRUNK, PROMPT))}
    with pytest.raises(CheckpointError, match=r"tracker: x\.pt has 'tracker\.sam_prompt.* own"):
        interactive_parts(tuned, "x.pt", tracker_parts(tensors, "sam3.pt"))


def test_a_student_under_a_neck_that_never_saw_it(student: Tensors, tensors: Tensors) -> None:
    parts = interactive_parts(of_encoder(student), "ft.pt", tracker_parts(tensors, "sam3.pt"))
    assert same(parts.tensors, without_counts(student))
    assert any("never trained on this encoder" in note for note in parts.notes)


def test_a_second_decoder_is_refused(tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match=r"tracker: whole\.pt has a decoder.*of its own"):
        interactive_parts(tensors, "whole.pt", tracker_parts(tensors, "sam3.pt"))


def test_a_tracker_without_a_decoder_is_refused(tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match=r"tracker: tuned\.pt: it holds SAM 3's detector"):
        tracker_parts(of_encoder(tensors), "tuned.pt")


def test_a_tracker_does_not_make_a_model_of_something_else(tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match="SAM 1"):
        interactive_parts(
            {"image_encoder.blocks.0.x": torch.zeros(1)}, "x.pt", tracker_parts(tensors, "sam3.pt")
        )


def test_types_are_noted_as_they_are_stored(tensors: Tensors) -> None:
    halved = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in tensors.items()
        if name.startswith(TRUNK) and tensor.is_floating_point()
    }
    state = tensors | halved
    unused = {"optimizer.state": torch.zeros(1, dtype=torch.float64)}
    assert interactive_parts(state | unused, "test").stored == {"bfloat16", "float32"}
