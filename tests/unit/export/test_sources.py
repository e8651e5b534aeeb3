"""Checkpoints of every kind: what opens, what is refused, and that nothing in a file is run."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from tests.support.export_helpers import (
    DECODER,
    NECK,
    NO_MEMORY,
    TRUNK,
    Exploit,
    ReferenceTracker,
    as_multiplex,
    canonical_tensors,
    random_mobile_sam,
    relative,
    tiny_tensors,
)
from tests.support.helpers import tiny_bundle
from torch import Tensor, nn

from sam3rt.bundle.files import sha256_file
from sam3rt.errors import InvalidInputError
from sam3rt_export import sources
from sam3rt_export.errors import CheckpointError, tensors_of
from sam3rt_export.references.transformers_sam3 import Sam3TrackerModel, build_tracker_model
from sam3rt_export.source import ExportSource
from sam3rt_export.sources import SourceOptions, open_source, transformers_model
from sam3rt_export.sources.sam3 import source_from_tensors
from sam3rt_export.sources.sam3_architecture import read_architecture


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A tiny SAM 3."""
    return tiny_tensors()


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SAM 3 as a file."""
    path = tmp_path_factory.mktemp("tiny") / "sam3_tiny.pt"
    torch.save(tensors, path)
    return path


@pytest.fixture
def model(tensors: dict[str, Tensor]) -> Any:
    """The tiny SAM 3 as a transformers model that shares nothing with other tests."""
    return tracker_model({name: tensor.clone() for name, tensor in tensors.items()})


def tracker_model(tensors: dict[str, Tensor]) -> Any:
    """A model as transformers itself makes it: ``save_pretrained`` wants no shared tensors."""
    model = build_tracker_model(read_architecture(tensors), tensors)
    positions = model.shared_image_embedding
    positions.positional_embedding = positions.positional_embedding.clone()
    return model


@torch.no_grad()
def outputs(source: ExportSource) -> list[Tensor]:
    """Everything the graphs of a source yield for one image and three objects."""
    generator = torch.Generator().manual_seed(0)
    side = source.image.size[0]
    rows, columns = source.masks.low_res_size
    features = source.encoder(torch.randn(1, 3, side, side, generator=generator))
    points = side * torch.rand(1, 3, 2, 2, generator=generator)
    labels = torch.tensor([[[1, 0], [2, 3], [1, -1]]])
    masks = 5 * torch.randn(1, 1, rows, columns, generator=generator)
    decoded = source.decoder(features, points, labels, masks, torch.ones(1))
    return [*features, *decoded]


def differences(one: ExportSource, other: ExportSource) -> list[float]:
    return [relative(a, b) for a, b in zip(outputs(other), outputs(one), strict=True)]


# --- checkpoint files -----------------------------------------------------------------------------


def test_a_sam3_file(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    source = open_source(checkpoint)
    assert (source.model_type, source.kind, source.name) == ("sam3", "sam3.pt", "sam3")
    assert source.origin == "sam3_tiny.pt"
    assert source.sha256 == sha256_file(checkpoint)
    assert (source.stored, source.notes) == ("float32", ())
    assert source.license == "SAM License"
    assert source.image.size == (8, 8)
    assert (source.image.resize, source.image.resize_dtype) == ("stretch", "float32")
    assert source.image.mean == source.image.std == (127.5, 127.5, 127.5)
    assert (source.prompts.box_position, source.prompts.padding_point) == (
        "before_points",
        "always",
    )
    assert source.prompts.mask_size == source.masks.low_res_size == (16, 16)
    assert (source.masks.multimask, source.masks.low_res_limit) == (3, 32.0)
    assert (source.masks.upsampling, source.masks.max_hole_area) == ("direct", 256.0)
    assert source.feature_shapes == [(4, 16, 16), (8, 8, 8), (32, 4, 4)]
    assert not source.encoder.training
    assert not source.decoder.training
    assert set(source.versions) == {"transformers"}


def test_the_graphs_are_those_of_the_reference(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pairs = zip(source.encoder(pixels), source.reference.encode(pixels), strict=True)
    assert max(relative(a, b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("as_string", [False, True])
def test_a_path_or_its_text(checkpoint: Path, as_string: bool) -> None:
    assert open_source(str(checkpoint) if as_string else checkpoint).kind == "sam3.pt"


def test_an_unreadable_path(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pt", tmp_path / "no folder" / "x.pt"):
        with pytest.raises(CheckpointError, match=r"no file, no folder and no hub id"):
            open_source(path)


@pytest.mark.parametrize("value", [None, 5, b"sam3.pt", {"model": {}}, ["sam3.pt"]])
def test_values_that_are_no_checkpoint(value: Any) -> None:
    with pytest.raises(CheckpointError, match=type(value).__name__):
        open_source(value)


@pytest.mark.parametrize("text", ["facebook/sam3", "org-1/model.v2"])
def test_two_names_with_a_slash_are_a_hub_id(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(transformers_model, "open_pretrained", lambda n, *_: asked.append(n))
    open_source(text)
    assert asked == [text]


@pytest.mark.parametrize(
    "text",
    [
        *("sam3", "/a", "a/", "./a", "a/b/c", "../sam3", "~/sam3", "weights/sam3.pt"),
        *("x/y.safetensors", "x/y.ONNX", "x/model.safetensors.index.json", "x\\y", "x/y z"),
        *("here/sam3", "", "/"),
    ],
)
def test_other_names_are_not_looked_up(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A mistyped path must not become a request to a server."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    asked: list[str] = []
    monkeypatch.setattr(transformers_model, "open_pretrained", lambda n, *_: asked.append(n))
    with pytest.raises(CheckpointError, match=r"no file, no folder and no hub id|no config\.json"):
        open_source(text)
    with pytest.raises(CheckpointError, match=r"no file, no folder and no hub id|no config\.json"):
        open_source(Path(text))
    assert asked == []


@pytest.mark.parametrize("there", [True, False])
def test_a_repository_of_sam_3_1_holds_metas_file(
    tensors: dict[str, Tensor], there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "sam3.1_multiplex.pt"
    torch.save(as_multiplex(tensors), path)
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if not there:
            raise OSError("not found")
        return str(path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no file named model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(transformers_model.PreTrainedConfig, "get_config_dict", fail)
    if there:
        assert open_source("facebook/sam3.1").name == "sam3.1"
    else:
        with pytest.raises(CheckpointError, match=r"no file named model\.safetensors"):
            open_source("facebook/sam3.1")
    assert asked == [("facebook/sam3.1", "sam3.1_multiplex.pt")]


def test_a_path_is_never_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(transformers_model, "open_pretrained", lambda n, *_: asked.append(n))
    with pytest.raises(CheckpointError, match="no hub id"):
        open_source(Path("facebook/sam3"))
    assert asked == []


# --- foreign exceptions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("x"),
        KeyError("x"),
        MemoryError(),
        NotImplementedError("x"),
        OSError(5, "Input/output error"),
        ImportError("x"),
        RecursionError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("kind", ["a file", "a live model", "a folder"])
def test_whatever_libraries_raise_is_a_checkpoint_error(
    checkpoint: Path,
    tensors: dict[str, Tensor],
    error: Exception,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sources, "read_state", fail)
    monkeypatch.setattr(sources, "interactive_parts", fail)
    monkeypatch.setattr(transformers_model.Sam3TrackerModel, "from_pretrained", fail)
    (tmp_path / "config.json").write_text('{"model_type": "sam3_tracker"}')
    given: Any = {
        "a file": checkpoint,
        "a live model": ReferenceTracker(tensors),
        "a folder": tmp_path,
    }[kind]
    with pytest.raises(CheckpointError, match=type(error).__name__) as caught:
        open_source(given)
    assert caught.value.__cause__ is error


def test_a_missing_library_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sam3rt_export.sources.sam3", None)
    with pytest.raises(CheckpointError, match=r"needs sam3rt_export.*sam3rt\[export\]"):
        open_source(checkpoint)


# --- damaged tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "scalar", "longer", "shorter", "flat"])
def test_a_model_with_one_wrong_tensor_is_refused(tensors: dict[str, Tensor], damage: str) -> None:
    """Whichever tensor it is, the answer is a refusal and neither a crash nor a wrong model."""
    change: dict[str, Any] = {
        "missing": lambda t: None,
        "scalar": lambda t: torch.zeros((), dtype=t.dtype),
        "longer": lambda t: torch.cat([t, t[:1]]),
        "shorter": lambda t: t[:-1],
        "flat": lambda t: t.flatten(),
    }
    opened, crashed = [], []
    # One of each kind: blocks, layers and MLPs are alike.
    repeated = re.compile(r"(blocks|transformer\.layers|mlps|point_embeddings)\.[1-9]")
    for name, tensor in tensors.items():
        if repeated.search(name) or (damage == "flat" and tensor.ndim == 1):
            continue
        changed = dict(tensors) | {name: change[damage](tensor)}
        if changed[name] is None:
            del changed[name]
        try:
            with tensors_of("test"):
                source_from_tensors(changed)
            opened.append(name)
        except CheckpointError:
            pass
        except Exception as error:
            crashed.append(f"{name}: {type(error).__name__}: {error}")
    # The neck's coarsest level is not used, and may be absent; a wrong shape of it is refused.
    if damage == "missing":
        opened = [name for name in opened if not name.startswith(NECK + "3.")]
    assert (opened, crashed) == ([], [])


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        (DECODER, "transformer.layers.1.", "transformer.layers.2."),
        (DECODER, "transformer.layers.1.", "transformer.layers.7."),
        (DECODER, "iou_prediction_head.layers.1.", "iou_prediction_head.layers.3."),
        (DECODER, "output_hypernetworks_mlps.0.", "output_hypernetworks_mlps.4."),
        (NECK, "2.conv_1x1.", "4.conv_1x1."),
    ],
)
def test_more_layers_than_the_model_has_are_refused(
    tensors: dict[str, Tensor], part: str, old: str, new: str
) -> None:
    more = {n.replace(old, new): t for n, t in tensors.items() if n.startswith(part + old)}
    assert more
    with pytest.raises(CheckpointError), tensors_of("test"):
        source_from_tensors(canonical_tensors(tensors | more, "test"))


# --- transformers ---------------------------------------------------------------------------------


def test_a_transformers_folder_is_the_same_model(
    checkpoint: Path, model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "sam3-hf"
    model.save_pretrained(folder)
    source = open_source(folder)
    assert (source.kind, source.origin, source.sha256) == ("transformers", "sam3-hf", "")
    assert source.model_type == "sam3"
    reference = open_source(checkpoint)
    assert source.image == reference.image
    assert source.prompts == reference.prompts
    assert source.masks == reference.masks
    assert source.feature_shapes == reference.feature_shapes
    assert max(differences(reference, source)) < 1e-5


@pytest.mark.parametrize("as_string", [False, True])
def test_a_folder_given_with_a_trailing_slash_or_as_a_path(
    model: Any, as_string: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "sam3-hf"
    model.save_pretrained(folder)
    assert open_source(f"{folder}/" if as_string else folder).origin == "sam3-hf"


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "change",
    [{"image_mean": [0.4, 0.5, 0.5]}, {"image_std": 0.2}, {"do_normalize": False}],
    ids=str,
)
def test_a_folder_whose_images_are_normalized_otherwise_is_refused(
    model: Any, file: str, change: dict[str, Any], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    for processor in ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True}, change):
        written = {"image_processor": processor} if file.startswith("processor") else processor
        (tmp_path / file).write_text(json.dumps(written))
        if processor is not change:
            assert open_source(tmp_path).kind == "transformers"
    with pytest.raises(CheckpointError, match=f"image processor's {next(iter(change))} is"):
        open_source(tmp_path)


def test_a_folder_that_was_saved_twice_in_two_forms_is_refused(model: Any, tmp_path: Path) -> None:
    """transformers would read the file, however old, and not the shards."""
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"holds both model\.safetensors and .*older one"):
        open_source(tmp_path)


def test_a_folder_in_half_precision_is_read_as_fp32(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    model.half().save_pretrained(folder)
    source = open_source(folder)
    assert {p.dtype for p in source.encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "name",
    [
        "vision_encoder.backbone.layers.1.mlp.fc1.weight",
        "mask_decoder.conv_s0.bias",
        "no_memory_embedding",
        "prompt_encoder.point_embed.weight",
    ],
)
def test_a_folder_with_a_parameter_missing(model: Any, name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "sam3-hf"
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    # Folders hold the names of the whole video model, of which this is a part.
    (stored,) = (key for key in state if key.endswith(name))
    del state[stored]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    assert name in str(caught.value)


def test_pickled_weights_of_a_folder_are_not_read(model: Any, tmp_path: Path) -> None:
    folder, trace = tmp_path / "sam3-hf", tmp_path / "executed"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Exploit(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded by transformers"):
        open_source(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no config.json and no checkpoint"),
        ({"config.json": "{"}, "valid JSON"),
        ({"config.json": "[]"}, "model_type None"),
        ({"config.json": "{}"}, "model_type None"),
        ({"config.json": '{"model_type": "bert"}'}, "model_type 'bert', expected one of SAM 3's"),
        ({"config.json": '{"model_type": "sam3_tracker"}'}, r"no file named model\.safetensors"),
    ],
    ids=str,
)
def test_folders_that_hold_no_sam3(content: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_a_folder_with_a_parameter_of_another_shape(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("fpn_layers.0.proj1.weight"))
    state[name] = state[name][:, :3].contiguous()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"fpn_layers\.0\.proj1\.weight' is \(.*3, 1, 1\), expected"
    ) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vision_encoder.backbone.layers.0.attention.q_proj.lora_A.weight", "LoRA.*merge"),
        ("mask_decoder.iou_prediction_head.weight_scale", "quantized"),
        ("prompt_encoder.extra", "another model"),
        ("base_model.model.x", "LoRA.*merge"),
    ],
)
def test_a_folder_with_a_parameter_too_many(
    model: Any, name: str, message: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors") | {name: torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path)
    assert name in str(caught.value)


def test_other_models_in_a_folder_are_left_alone(model: Any, tmp_path: Path) -> None:
    """Folders of SAM 3 hold its detector and its video model as well."""
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("detector_model.text_encoder.x", "tracker_model.memory_attention.x", "other.x"):
        state[name] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_source(tmp_path).kind == "transformers"


def test_a_live_model_with_adapters_is_refused(model: Any) -> None:
    layer = model.vision_encoder.backbone.layers[0].attention
    layer.q_proj.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight.*LoRA.*merge"):
        open_source(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_live_model_is_refused(model: Any) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(CheckpointError, match="quantized"):
        open_source(quantized)


def test_a_live_model_without_data_is_refused(model: Any) -> None:
    with pytest.raises(CheckpointError, match="meta device"):
        open_source(model.to("meta"))


def test_a_live_model_that_is_not_finite_is_refused(model: Any) -> None:
    with torch.no_grad():
        model.mask_decoder.conv_s0.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"conv_s0\.bias.*NaN"):
        open_source(model)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_live_model(checkpoint: Path, model: Any, wrap: Any) -> None:
    source = open_source(wrap(model))
    assert source.kind == "Sam3TrackerModel"
    assert max(differences(open_source(checkpoint), source)) < 1e-5


def test_a_live_model_with_a_compiled_part_is_refused(model: Any) -> None:
    model.vision_encoder = torch.compile(model.vision_encoder)
    with pytest.raises(CheckpointError, match="compiled model"):
        open_source(model)


def test_a_live_model(checkpoint: Path, model: Any) -> None:
    source = open_source(model)
    assert (source.kind, source.origin) == ("Sam3TrackerModel", "live model")
    assert max(differences(open_source(checkpoint), source)) < 1e-5


def test_a_live_model_keeps_its_own_epsilon(tensors: dict[str, Tensor]) -> None:
    architecture = dataclasses.replace(read_architecture(tensors), layer_norm_eps=0.25)
    source = open_source(build_tracker_model(architecture, tensors))
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pairs = zip(source.encoder(pixels), source.reference.encode(pixels), strict=True)
        assert max(relative(a, b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("backbone", "hidden_act", "relu", "GELU"),
        ("backbone", "image_size", [8, 16], "square"),
        ("backbone", "patch_size", [2, 2], "square"),
        ("backbone", "layer_scale_init_value", 0.1, "layer scale"),
        ("backbone", "window_size", 3, "do not tile"),
        ("decoder", "hidden_act", "relu", "GELU"),
        ("prompt", "hidden_act", "relu", "GELU"),
        ("prompt", "layer_norm_eps", 1e-5, "layer_norm_eps"),
        ("decoder", "num_multimask_outputs", 4, "three mask outputs"),
        ("decoder", "dynamic_multimask_via_stability", False, "stability"),
        ("decoder", "dynamic_multimask_stability_delta", 0.1, "stability"),
        ("decoder", "dynamic_multimask_stability_thresh", 0.9, "stability"),
    ],
)
def test_configurations_that_the_graphs_cannot_express(
    model: Any, part: str, name: str, value: Any, message: str
) -> None:
    config = model.config
    parts = {
        "backbone": config.vision_config.backbone_config,
        "decoder": config.mask_decoder_config,
        "prompt": config.prompt_encoder_config,
    }
    setattr(parts[part], name, value)
    with pytest.raises(CheckpointError, match=message):
        open_source(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_model_is_left_as_it_is(model: Any, training: bool, dtype: torch.dtype) -> None:
    model.to(dtype).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    open_source(model)
    after = model.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.training == training
    assert all(module.training == training for module in model.modules())


def test_the_callers_parameters_stay_trainable(model: Any) -> None:
    open_source(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- the reference's own tracker ------------------------------------------------------------------


def test_the_references_tracker(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    source = open_source(ReferenceTracker(tensors))
    assert (source.kind, source.origin) == ("live model", "ReferenceTracker")
    assert source.model_type == "sam3"
    assert max(differences(open_source(checkpoint), source)) == 0.0


@pytest.mark.parametrize("training", [False, True])
def test_the_references_tracker_is_left_as_it_is(
    tensors: dict[str, Tensor], training: bool
) -> None:
    tracker = ReferenceTracker(tensors).half().train(training)
    before = {name: tensor.clone() for name, tensor in tracker.state_dict().items()}
    open_source(tracker)
    after = tracker.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert tracker.training == training


def test_the_references_tracker_without_its_backbone(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="built with its backbone"):
        open_source(ReferenceTracker(tensors, backbone=False))


def test_the_references_tracker_with_a_parameter_missing(tensors: dict[str, Tensor]) -> None:
    name = DECODER + "conv_s1.weight"
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=r"conv_s1"):
        open_source(ReferenceTracker(rest))


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.Sequential(), nn.Module()])
def test_other_modules_are_refused(other: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=type(other).__name__):
        open_source(other)


def test_the_class_of_a_model_is_no_model() -> None:
    with pytest.raises(CheckpointError):
        open_source(Sam3TrackerModel)


# --- SAM 3.1 --------------------------------------------------------------------------------------


def test_sam_3_1_is_sam_3_with_log_odds_for_scores(
    checkpoint: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(as_multiplex(tensors), tmp_path / "sam3.1_multiplex.pt")
    sam3, multiplex = open_source(checkpoint), open_source(tmp_path / "sam3.1_multiplex.pt")
    assert (multiplex.name, multiplex.kind) == ("sam3.1", "sam3.1_multiplex.pt")
    assert not multiplex.decoder.architecture.sigmoid_iou
    assert (multiplex.image, multiplex.prompts) == (sam3.image, sam3.prompts)
    assert (multiplex.masks, multiplex.feature_shapes) == (sam3.masks, sam3.feature_shapes)
    *maps, masks, iou, single, single_iou, score = outputs(sam3)
    *same_maps, same_masks, odds, same_single, single_odds, same_score = outputs(multiplex)
    pairs = zip(
        [*same_maps, same_masks, same_single, same_score],
        [*maps, masks, single, score],
        strict=True,
    )
    assert all(torch.equal(actual, expected) for actual, expected in pairs)
    assert relative(odds, torch.logit(iou)) < 1e-5
    assert relative(single_odds, torch.logit(single_iou)) < 1e-5


def test_the_reference_of_sam_3_1_has_no_sigmoid_either(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(as_multiplex(tensors), tmp_path / "sam3.1_multiplex.pt")
    source = open_source(tmp_path / "sam3.1_multiplex.pt")
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    points, labels = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[1]])
    features = source.reference.encode(pixels)
    said = source.reference.decode(features, points, labels, None)
    with torch.no_grad():
        _, iou, _, single_iou, _ = source.decoder(
            features, points[None], labels[None], torch.zeros(1, 1, 16, 16), torch.zeros(1)
        )
    assert relative(torch.cat([iou[0], single_iou[0]], dim=1), said.iou) < 1e-5
    assert float(said.iou.min()) < 0.0


# --- other input sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("kind", ["a file", "a folder", "a live model"])
def test_another_image_size(
    kind: str, size: int, checkpoint: Path, model: Any, tmp_path: Path
) -> None:
    given: Any = checkpoint
    if kind == "a folder":
        model.save_pretrained(tmp_path)
        given = tmp_path
    elif kind == "a live model":
        given = model
    source = open_source(given, SourceOptions(image_size=size))
    assert source.image.size == (size, size)
    assert source.masks.low_res_size == source.prompts.mask_size == (2 * size, 2 * size)
    assert source.decoder.architecture.image_size == size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = source.encoder(pixels)
    assert [tuple(m.shape[1:]) for m in maps] == source.feature_shapes
    for actual, expected in zip(maps, source.reference.encode(pixels), strict=True):
        assert relative(actual, expected) < 1e-5
    said = [note for note in source.notes if "instead of 8" in note]
    assert len(said) == (size != 8)


def test_a_live_sam_3_1_is_one_at_another_size_too(model: Any) -> None:
    model.mask_decoder.iou_prediction_head.sigmoid_output = False
    names = {open_source(model, SourceOptions(image_size=size)).name for size in (4, 8)}
    assert names == {"sam3.1"}


def test_a_live_models_other_size_leaves_it_as_it_is(model: Any) -> None:
    before = copy.deepcopy(model.config)
    open_source(model, SourceOptions(image_size=4))
    assert model.config.to_dict() == before.to_dict()


@pytest.mark.parametrize("size", [0, -4, 2, 6, 7, 12, 1008])
def test_an_image_size_that_is_none_of_the_models(checkpoint: Path, size: int) -> None:
    with pytest.raises(CheckpointError, match=rf"image_size: got {size}, expected one of 4, 8$"):
        open_source(checkpoint, SourceOptions(image_size=size))


# --- models of two files --------------------------------------------------------------------------


@pytest.fixture
def tuned(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    """A file of the official trainer: the trunk, under its names, and nothing for clicks."""
    prefix = "detector."
    state = {
        name.removeprefix(prefix): tensor + 0.1
        for name, tensor in tensors.items()
        if name.startswith(prefix + "backbone.vision_backbone.trunk.") and "freqs" not in name
    }
    tables = {n.removeprefix(prefix): t for n, t in tensors.items() if "freqs" in n}
    torch.save({"model": state | tables, "optimizer": {}}, tmp_path / "tuned.pt")
    return tmp_path / "tuned.pt"


def test_a_fine_tuned_file_needs_the_decoder_of_another(tuned: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"without the tracker.*--tracker sam3\.pt"):
        open_source(tuned)
    source = open_source(tuned, SourceOptions(tracker=checkpoint))
    assert (source.name, source.origin, source.kind) == ("sam3", "tuned.pt", "sam3.pt")
    assert source.notes[1] == f"tracker's file: sam3_tiny.pt, SHA-256 {sha256_file(checkpoint)}"
    stock = open_source(checkpoint)
    weights = source.decoder.state_dict()
    assert all(torch.equal(weights[name], t) for name, t in stock.decoder.state_dict().items())
    assert differences(stock, source)[0] > 0.01


@pytest.mark.parametrize("tracker", ["missing.pt", "."])
def test_a_tracker_that_is_no_file(tuned: Path, tracker: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tracker"):
        open_source(tuned, SourceOptions(tracker=tmp_path / "none" / tracker))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": 4.0}, CheckpointError, "image_size: got 4.0, expected a whole number"),
        ({"image_size": True}, CheckpointError, "image_size: got True"),
        ({"lora_alpha": 4.0}, CheckpointError, "lora_alpha: there is no adapter"),
        ({"lora": Path("x"), "lora_alpha": float("nan")}, InvalidInputError, "lora_alpha: got nan"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(
    checkpoint: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_source(checkpoint, SourceOptions(**options))


UNUSABLE: dict[str, tuple[str, Tensor, str]] = {
    "another shape": (
        DECODER + "output_upscaling.0.weight",
        torch.zeros(8, 32, 2, 2),
        r"'tracker.*output_upscaling\.0\.weight' is \(8, 32, 2, 2\), expected \(32, 8, 2, 2\)",
    ),
    "no trunk": (TRUNK + "pos_embed", torch.zeros(1, 4, 16), "not a square"),
    "NaN": (NO_MEMORY, torch.full((1, 1, 32), float("nan")), "no_mem_embed.*NaN"),
    "beyond FP32": (NO_MEMORY, torch.full((1, 1, 32), 1e300, dtype=torch.float64), "beyond FP32"),
    "whole numbers": (NO_MEMORY, torch.zeros(1, 1, 32, dtype=torch.int8), "torch.int8"),
    "one too many": (DECODER + "extra.weight", torch.zeros(2), "1 unknown tensors.*extra"),
}


@pytest.mark.parametrize(("name", "tensor", "message"), UNUSABLE.values(), ids=list(UNUSABLE))
def test_what_is_wrong_with_a_tensor_is_said_of_its_file_in_one_line(
    tensors: dict[str, Tensor], name: str, tensor: Tensor, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd name\n.pt"
    torch.save(tensors | {name: tensor}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said.removeprefix(str(path))


@pytest.mark.parametrize(("prefix", "found"), [("model.", "'model'"), ("ema.module.", "'ema'")])
def test_a_prefix_of_somebodys_own_is_said(
    tensors: dict[str, Tensor], prefix: str, found: str, tmp_path: Path
) -> None:
    torch.save({prefix + n: t for n, t in tensors.items()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"stand below {found}.*remove"):
        open_source(tmp_path / "x.pt")


def test_a_bundle_is_no_checkpoint(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "made")
    with pytest.raises(CheckpointError, match="is a bundle, which is what an export makes"):
        open_source(tmp_path / "made")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_path_that_is_not_utf_8(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "x")
    path = (tmp_path / "x").rename(tmp_path / os.fsdecode(b"\xff.pt"))
    with pytest.raises(CheckpointError, match=r"not UTF-8.*rename it"):
        open_source(path)


@pytest.mark.parametrize("option", ["tracker", "lora", "weights_key"])
def test_options_of_files_are_not_passed_over_for_live_models(model: Any, option: str) -> None:
    with pytest.raises(CheckpointError, match=f"{option}: a live model takes none"):
        open_source(model, SourceOptions(**{option: Path("x")}))


def test_a_folder_takes_no_tracker(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tracker: .*has a decoder for clicks.*takes none"):
        open_source(tmp_path, SourceOptions(tracker=checkpoint))


# --- MobileSAM ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mobile_sam() -> dict[str, Tensor]:
    """A random MobileSAM."""
    return random_mobile_sam().state_dict()


def test_a_mobile_sam_file(mobile_sam: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mobile_sam.pt"
    torch.save(mobile_sam, path)
    source = open_source(path)
    assert (source.model_type, source.kind) == ("mobile_sam", "mobile_sam.pt")
    assert source.license == "Apache-2.0"
    assert source.sha256 == sha256_file(path)
    assert source.image.size == (1024, 1024)
    assert (source.image.resize, source.image.resize_dtype) == ("longest_side", "uint8")
    assert source.image.mean == (123.675, 116.28, 103.53)
    assert source.image.std == (58.395, 57.12, 57.375)
    assert (source.prompts.box_position, source.prompts.padding_point) == (
        "after_points",
        "without_box",
    )
    assert source.prompts.mask_size == source.masks.low_res_size == (256, 256)
    assert (source.masks.low_res_limit, source.masks.upsampling) == (None, "unpad")
    assert source.masks.max_hole_area == 0.0
    assert source.feature_shapes == [(256, 64, 64)]


def test_a_live_mobile_sam() -> None:
    source = open_source(random_mobile_sam())
    assert (source.model_type, source.kind, source.origin) == ("mobile_sam", "live model", "Sam")


def test_a_mobile_sam_with_a_tensor_too_many(mobile_sam: dict[str, Tensor], tmp_path: Path) -> None:
    name = "image_encoder.layers.1.blocks.0.attn.qkv.lora_A.weight"
    torch.save(mobile_sam | {name: torch.zeros(2, 2)}, tmp_path / "mobile_sam.pt")
    with pytest.raises(CheckpointError, match=r"lora_A\.weight.*LoRA.*merge"):
        open_source(tmp_path / "mobile_sam.pt")


@pytest.mark.parametrize("option", [{"image_size": 1024}, {"tracker": Path("x")}])
def test_a_mobile_sam_takes_no_options_of_sam_3(
    mobile_sam: dict[str, Tensor], option: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(mobile_sam, tmp_path / "mobile_sam.pt")
    with pytest.raises(CheckpointError, match=r": MobileSAM takes none"):
        open_source(tmp_path / "mobile_sam.pt", SourceOptions(**option))


@pytest.mark.parametrize(
    "name",
    [
        "image_encoder.layers.1.blocks.0.attn.qkv.weight",
        "image_encoder.neck.3.bias",
        "prompt_encoder.no_mask_embed.weight",
        "mask_decoder.iou_prediction_head.layers.1.weight",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_mobile_sam_with_a_wrong_tensor(
    mobile_sam: dict[str, Tensor], name: str, damage: str, tmp_path: Path
) -> None:
    wrong = dict(mobile_sam)
    if damage == "missing":
        del wrong[name]
    else:
        wrong[name] = torch.zeros(3)
    torch.save(wrong, tmp_path / "mobile_sam.pt")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_source(tmp_path / "mobile_sam.pt")


def test_mobile_sam_without_its_code_says_what_to_install(
    mobile_sam: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save(mobile_sam, tmp_path / "mobile_sam.pt")
    monkeypatch.setitem(sys.modules, "mobile_sam", None)
    with pytest.raises(CheckpointError, match=r"sam3rt\[mobile-sam\]"):
        open_source(tmp_path / "mobile_sam.pt")


def test_torchvision_can_be_imported_beside_the_references() -> None:
    import torchvision

    import sam3rt_export.references  # noqa: F401

    assert torchvision.__version__
