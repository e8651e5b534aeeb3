"""EfficientSAM3: its encoders as graphs, on small models, against a plain rebuild."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.golden.efficientsam3 import synthetic as golden_students
from tests.support.export_helpers import (
    NECK,
    STUDENT,
    STUDENTS,
    as_multiplex,
    relative,
    run_onnx,
    tiny_student,
    tiny_tensors,
)
from torch import Tensor

import sam3rt
from sam3rt.accuracy.metrics import cosine
from sam3rt.bundle import Bundle, open_bundle
from sam3rt_build.graph_files import load_graph
from sam3rt_build.recipes import RECIPES, SIMULATED_RECIPES, Recipe, recipe_named
from sam3rt_build.simulated import SimulatedBackend
from sam3rt_build.typed_graph import FLOAT, apply_recipe, node_types, scope_of
from sam3rt_export import SourceOptions, export_bundle
from sam3rt_export.errors import CheckpointError, tensors_of
from sam3rt_export.exporter import ExportOptions
from sam3rt_export.graphs.efficient_sam3 import EfficientSam3EncoderGraph
from sam3rt_export.graphs.efficient_vit import LinearAttention
from sam3rt_export.graphs.tiny_vit import TinyViTArchitecture
from sam3rt_export.parity_inputs import default_images
from sam3rt_export.source import ExportSource
from sam3rt_export.sources import open_source
from sam3rt_export.sources.efficient_sam3 import open_efficient_sam3, read_student

SMALL = 336
BACKBONE = STUDENT + "backbone.model."


def opened(tensors: dict[str, Tensor], image_size: int = SMALL) -> ExportSource:
    tensors = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    with tensors_of("x.pt"):
        return open_efficient_sam3(tensors, image_size=image_size)


# --- parts ----------------------------------------------------------------------------------------


def test_linear_attention_is_its_definition_and_zero_where_nothing_is_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3 * 3 * 4, 5, 5, generator=generator)
    qkv[1, :4] = -1.0  # all queries of a group are cut off: 0 / 0
    mixed = LinearAttention(4)(qkv, 25)
    assert mixed.shape == (2, 3, 4, 25)
    groups = qkv.reshape(2, 3, 12, 25)
    q, k, v = groups[:, :, :4].relu(), groups[:, :, 4:8].relu(), groups[:, :, 8:]
    weights = torch.einsum("bgdn,bgdm->bgnm", q, k)
    expected = torch.einsum("bgnm,bgdm->bgdn", weights, v) / (weights.sum(-1) + 1e-15)[:, :, None]
    assert relative(mixed, expected) < 1e-5
    assert not mixed[1, 0].any()


def test_grids_of_tiny_vit_are_rounded_up() -> None:
    assert TinyViTArchitecture(1008, last_stride=2).sides == (252, 126, 63, 32)
    assert TinyViTArchitecture().sides == (256, 128, 64, 64)
    assert TinyViTArchitecture(336, last_stride=2).sides == (84, 42, 21, 11)


# --- reading checkpoints --------------------------------------------------------------------------


# Tensors of the trunk and the parameters in them, as counted in the authors' own models.
COUNTS = {
    "repvit_m0_9": (707, 14_551_264),
    "repvit_m1_1": (653, 17_739_408),
    "repvit_m2_3": (1463, 32_499_848),
    "tinyvit_5m": (300, 14_839_060),
    "tinyvit_11m": (300, 20_446_084),
    "tinyvit_21m": (300, 30_650_496),
    "efficientvit_b0": (194, 10_253_936),
    "efficientvit_b1": (269, 14_346_336),
    "efficientvit_b2": (362, 24_810_480),
}


@pytest.mark.parametrize("model", golden_students.MODELS)
def test_the_rule_for_sizes_gives_the_authors_own_keys(model: str) -> None:
    assert golden_students.keys_of(model) == golden_students.keys(model)


@pytest.mark.parametrize("model", golden_students.SIZES)
@torch.no_grad()
def test_every_published_size_is_recognized_and_fits_together(model: str) -> None:
    sizes, shapes = golden_students.SIZES[model], golden_students.keys_of(model)
    shapes |= golden_students.keys("head")
    # Without values, running a model tells in no time whether its shapes fit together.
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        student = read_student(tensors, 1008)
        encoder = EfficientSam3EncoderGraph(student, tensors)
        maps = [tuple(level.shape) for level in encoder(torch.empty(2, 3, 1008, 1008))]
    assert maps == [(2, 32, 288, 288), (2, 64, 144, 144), (2, 256, 72, 72)]
    assert (student.variant, student.image_size, student.grid) == (model, 1008, 72)
    if student.tiny_vit is not None:
        assert student.tiny_vit.depths == sizes.depths
        assert student.tiny_vit.heads[1:] == sizes.heads[1:]
        assert student.tiny_vit.windows[1:] == (7, 14, 7)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(STUDENT)}
    parameters = sum(t.numel() for n, t in own.items() if t.ndim and "running_" not in n)
    assert (len(own), parameters) == COUNTS[model]


@pytest.mark.parametrize("family", STUDENTS)
@torch.no_grad()
def test_a_student_equals_its_plain_rebuild(family: str) -> None:
    source = opened(tiny_student(family))
    assert (source.model_type, source.name) == ("efficient_sam3", f"efficient_sam3_{family}")
    assert source.license == "SAM License"
    assert source.image.size == (SMALL, SMALL)
    pixels = torch.randn(2, 3, SMALL, SMALL, generator=torch.Generator().manual_seed(0))
    maps = source.encoder(pixels)
    assert [tuple(m.shape[1:]) for m in maps] == source.feature_shapes
    for actual, expected in zip(maps, source.reference.encode(pixels), strict=True):
        assert relative(actual, expected) < 2e-5


@pytest.mark.parametrize("family", STUDENTS)
@torch.no_grad()
def test_every_parameter_of_a_student_reaches_the_features(family: str) -> None:
    tensors = tiny_student(family)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference: Any = opened(tensors).reference
    plain = reference.model.vision_encoder.backbone
    before = plain(pixels).last_hidden_state
    generator = torch.Generator().manual_seed(1)
    for name, parameter in plain.parameters_by_name.items():
        kept = parameter.clone()
        # Not the same for all: a softmax does not see what all its scores have in common.
        parameter += torch.rand(parameter.shape, generator=generator)
        after = plain(pixels).last_hidden_state
        parameter.copy_(kept)
        assert not torch.equal(before, after), name


@pytest.mark.parametrize(
    "name",
    [
        "features.4.token_mixer.0.conv.bn.running_var",
        "features.3.token_mixer.2.c.weight",
        "features.1.channel_mixer.m.0.bn.bias",
    ],
)
def test_a_missing_parameter_is_named(name: str) -> None:
    tensors = tiny_student("repvit")
    del tensors[BACKBONE + name]
    with pytest.raises(CheckpointError, match=rf"{name}.*missing"):
        opened(tensors)


@pytest.mark.parametrize(("family", "name"), [(f, STUDENT + "head.3.weight") for f in STUDENTS])
def test_a_parameter_of_the_wrong_shape_is_refused(family: str, name: str) -> None:
    tensors = tiny_student(family)
    tensors[name] = torch.zeros(16, 12, 3, 3)
    with pytest.raises(CheckpointError, match=r"x\.pt: tensors do not fit together"):
        opened(tensors)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (BACKBONE + "layers.1.blocks.0.attn.qkv.lora_A.weight", "LoRA"),
        (BACKBONE + "norm_head.weight", "another model"),
        (STUDENT + "something", "another model"),
    ],
)
def test_a_parameter_too_many_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tiny_student("tinyvit") | {name: torch.zeros(2)})
    assert name in str(caught.value)


def test_another_trunk_is_refused() -> None:
    tensors = {n: t for n, t in tiny_student("repvit").items() if not n.startswith(BACKBONE)}
    with pytest.raises(CheckpointError, match=r"RepViT.*TinyViT.*EfficientViT.*'.*blocks\.0\.x'"):
        opened({BACKBONE + "blocks.0.x": torch.zeros(2)} | tensors)


@pytest.mark.parametrize("size", [0, 224, 500, 1344])
def test_an_image_size_of_no_student(size: int) -> None:
    with pytest.raises(CheckpointError, match=r"image_size: .*one of 336, 672, 1008"):
        opened(tiny_student("repvit"), size)


def test_a_student_of_sam_3_1_predicts_log_odds(tmp_path: Path) -> None:
    torch.save(as_multiplex(tiny_student("efficientvit")), tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt", SourceOptions(image_size=SMALL))
    assert source.name == "efficient_sam3.1_efficientvit"
    assert source.decoder.architecture.predicts_log_odds


# --- exported -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def notes_said() -> list[str]:
    """What the export said."""
    return []


@pytest.fixture(scope="module")
def bundle(notes_said: list[str], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small EfficientViT student, which lay beside a ViT in FP16, exported for real."""
    folder = tmp_path_factory.mktemp("student")
    tensors = tiny_tensors() | tiny_student("efficientvit")
    halved = {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}
    torch.save({"model": halved}, folder / "student.pt")
    options = ExportOptions(
        source=SourceOptions(image_size=SMALL), parity_images=default_images()[:1]
    )
    return export_bundle(folder / "student.pt", folder / "bundle", options, notes_said.append)


@pytest.mark.slow
def test_the_bundle_says_how_it_came_about(bundle: Bundle, notes_said: list[str]) -> None:
    manifest = open_bundle(bundle.path).manifest
    assert (manifest.model_type, manifest.name) == (
        "efficient_sam3",
        "efficient_sam3_efficientvit",
    )
    assert manifest.image.size == (SMALL, SMALL)
    assert (manifest.weights, manifest.source.weights) == ("float32", "float16")
    assert manifest.source.kind == "EfficientSAM3"
    encoders, size = manifest.source.notes
    assert "two image encoders" in encoders
    assert "336 pixels instead of 1008" in size
    assert all(any(note in line for line in notes_said) for note in manifest.source.notes)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_runs(bundle: Bundle, backend: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    precision = "fp32" if backend == "openvino" else "auto"
    model = sam3rt.load_model(bundle.path, backend=backend, device="cpu", precision=precision)
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    predictor.set_image(image)
    masks, scores, low_res = predictor.predict(np.array([[40, 30]]), np.array([1]))
    assert (masks.shape, scores.shape, low_res.shape) == ((3, 60, 80), (3,), (3, 96, 96))
    assert np.isfinite(low_res).all()


@pytest.mark.slow
def test_batches(bundle: Bundle) -> None:
    pixels = np.random.default_rng(0).standard_normal((3, 3, SMALL, SMALL), dtype=np.float32)
    path = bundle.path / "encoder.onnx"
    together = run_onnx(path, {"pixel_values": pixels})
    for index in range(3):
        alone = run_onnx(path, {"pixel_values": pixels[index : index + 1]})
        for all_maps, one in zip(together, alone, strict=True):
            assert relative(all_maps[index : index + 1], one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIMULATED_RECIPES, ids=lambda recipe: recipe.name)
def test_linear_attention_is_fp32_in_every_recipe(bundle: Bundle, recipe: Recipe) -> None:
    types = node_types(load_graph(bundle, "encoder"), recipe)
    own = [node for node in types if scope_of(node).endswith("linear_attention")]
    assert {"MatMul", "ReduceSum", "Clip", "Div"} <= {node.op_type for node in own}
    assert {types[node] for node in own} == {FLOAT}
    if recipe.factors == "float16":
        assert any(types[node] != FLOAT for node in types)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_fits_an_encoder_without_attention(bundle: Bundle, recipe: Recipe) -> None:
    apply_recipe(load_graph(bundle, "encoder"), recipe, recipe.features_dtype)


def features(model: sam3rt.SegmentationModel) -> list[Any]:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    return list(model.encode(image).numpy().values())


@pytest.mark.slow
def test_fp16_keeps_the_features_because_linear_attention_is_fp32(bundle: Bundle) -> None:
    recipe = recipe_named("fp16-activations")
    exact = features(sam3rt.load_model(bundle.path, backend="onnxruntime", device="cpu"))
    rounded = features(sam3rt.SegmentationModel(bundle, SimulatedBackend(bundle, recipe, recipe)))
    # Where hardly any query is above zero, rounding decides which are: single pixels differ.
    assert min(map(cosine, rounded, exact)) > 0.999
    rules = tuple(rule for rule in recipe.rules if "linear_attention" not in rule.scope)
    assert len(rules) == len(recipe.rules) - 1
    everywhere = dataclasses.replace(recipe, rules=rules)
    spoilt = features(
        sam3rt.SegmentationModel(bundle, SimulatedBackend(bundle, everywhere, recipe))
    )
    assert not all(np.isfinite(level).all() for level in spoilt)


def test_all_of_the_necks_own_levels_are_optional_but_the_finest_three() -> None:
    tensors = {n: t for n, t in tiny_student("repvit").items() if not n.startswith(NECK + "3.")}
    assert opened(tensors).feature_shapes == [(4, 96, 96), (8, 48, 48), (32, 24, 24)]
    del tensors[NECK + "1.conv_1x1.bias"]
    with pytest.raises(CheckpointError, match="missing"):
        opened(tensors)
