"""Whole exports: what a bundle says and computes, and that it appears whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from tests.support.export_helpers import (
    DECODER,
    NO_MEMORY,
    TRUNK,
    as_multiplex,
    copied_graphs,
    leftovers,
    parity_images,
    random_mobile_sam,
    relative,
    run_onnx,
    tiny_tensors,
)
from tests.support.golden_calls import sam3_golden
from torch import Tensor

import sam3rt
import sam3rt_export
from sam3rt.accuracy.record import load_record
from sam3rt.bundle import GraphSpec, file_entry, open_bundle
from sam3rt.bundle.files import sha256_file
from sam3rt.cli import main
from sam3rt.errors import BundleError
from sam3rt_export import ExportError, ExportOptions, export_bundle, exporter, tracing
from sam3rt_export.errors import SelfCheckError
from sam3rt_export.exporter import LIMITS, self_check
from sam3rt_export.parity_inputs import default_images
from sam3rt_export.references.transformers_sam3 import TransformersReference, build_tracker_model
from sam3rt_export.source import Reference
from sam3rt_export.sources import open_source
from sam3rt_export.sources.sam3 import sam3_source
from sam3rt_export.sources.sam3_architecture import read_architecture
from sam3rt_export.tracing import FORBIDDEN, TraceRequest

FILES = ["bundle.json", "decoder.onnx", "encoder.onnx", "parity.npz"]


@pytest.fixture(scope="module")
def tiny_checkpoint(tiny_export: Path) -> Path:
    """A tiny SAM 3 as a file."""
    return tiny_export / "sam3_tiny.pt"


@pytest.fixture(scope="module")
def tiny_bundle(tiny_sam3: Path) -> Path:
    """The tiny SAM 3 exported for real."""
    return tiny_sam3


Spoil = Callable[[str, Path], None]


@pytest.fixture
def spoil() -> dict[str, Spoil]:
    """Holds, under "graph", what a test does to each graph after it was traced."""
    return {}


def instead_of_tracing(
    traced: Path,
    spoil: dict[str, Spoil],
    monkeypatch: pytest.MonkeyPatch,
    roles: tuple[str, ...] = ("encoder", "decoder"),
) -> None:
    """Take graphs from a bundle, to save five seconds each."""
    copy, trace = copied_graphs(traced), exporter.trace_to_file

    def copy_and_spoil(request: TraceRequest, path: Path) -> GraphSpec:
        role = request.metadata["sam3rt.role"]
        if role not in roles:
            return trace(request, path)
        spec = copy(request, path)
        if "graph" not in spoil:
            return spec
        spoil["graph"](role, path)
        return msgspec.structs.replace(spec, model=file_entry(path))

    monkeypatch.setattr(exporter, "trace_to_file", copy_and_spoil)


@pytest.fixture
def quick(tiny_bundle: Path, spoil: dict[str, Spoil], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the graphs from the tiny bundle instead of tracing them."""
    instead_of_tracing(tiny_bundle, spoil, monkeypatch)


# --- what a bundle says ---------------------------------------------------------------------------


def test_manifest_of_the_small_model(small_bundle: Path, small_checkpoint: Path) -> None:
    manifest = open_bundle(small_bundle).manifest
    assert leftovers(small_bundle) == FILES
    assert (manifest.name, manifest.model_type, manifest.weights) == ("sam3", "sam3", "float32")
    assert manifest.source.kind == "sam3.pt"
    assert manifest.source.reference == small_checkpoint.name
    assert manifest.source.sha256 == sha256_file(small_checkpoint)
    assert (manifest.source.license, manifest.source.license_file) == ("SAM License", None)
    assert manifest.image.size == (1008, 1008)
    assert manifest.image.mean == manifest.image.std == (127.5, 127.5, 127.5)
    assert manifest.prompts.mask_size == manifest.masks.low_res_size == (288, 288)
    assert manifest.masks.multimask == 3
    assert manifest.parity.limits == LIMITS["float32"]
    assert set(manifest.producer) == {"sam3rt", "torch", "onnx", "transformers"}
    assert manifest.producer["sam3rt"] == sam3rt.__version__
    for graph in (manifest.encoder, manifest.decoder):
        assert graph.opset == 18
        assert graph.external_data == ()


def described(specs: Any) -> list[tuple[str, str, tuple[int | str, ...]]]:
    return [(spec.name, spec.dtype, tuple(spec.shape)) for spec in specs]


def test_tensors_of_the_small_model(small_bundle: Path) -> None:
    manifest = open_bundle(small_bundle).manifest
    sizes = [(32, 288, 288), (64, 144, 144), (256, 72, 72)]
    features = [f"image_embeddings.{level}" for level in range(3)]
    assert described(manifest.encoder.inputs) == [
        ("pixel_values", "float32", ("batch", 3, 1008, 1008))
    ]
    assert described(manifest.encoder.outputs) == [
        (name, "float32", ("batch", *size)) for name, size in zip(features, sizes, strict=True)
    ]
    assert described(manifest.decoder.inputs) == [
        *((n, "float32", ("num_images", *s)) for n, s in zip(features, sizes, strict=True)),
        ("input_points", "float32", (1, "num_objects", "num_points", 2)),
        ("input_labels", "int64", (1, "num_objects", "num_points")),
        ("input_masks", "float32", (1, "num_masks", 288, 288)),
        ("has_input_masks", "float32", (1,)),
    ]
    assert described(manifest.decoder.outputs) == [
        ("pred_masks", "float32", (1, "num_objects", 3, 288, 288)),
        ("iou_scores", "float32", (1, "num_objects", 3)),
        ("single_pred_masks", "float32", (1, "num_objects", 1, 288, 288)),
        ("single_iou_scores", "float32", (1, "num_objects", 1)),
        ("object_score_logits", "float32", (1, "num_objects", 1)),
    ]


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_graphs_keep_the_rules(bundle: Path, role: str) -> None:
    opened = open_bundle(bundle)
    spec: GraphSpec = getattr(opened.manifest, role)
    path = bundle / spec.model.file
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert spec.nodes == len(model.graph.node) < 1500
    assert not FORBIDDEN & {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} == {""}
    assert [(e.domain, e.version) for e in model.opset_import] == [("", 18)]
    assert {p.key: p.value for p in model.metadata_props} == {
        "sam3rt.export_id": opened.manifest.export_id,
        "sam3rt.role": role,
    }
    for values, specs in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        found = [
            (v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
            for v in values
        ]
        assert found == [(s.name, s.shape) for s in specs]


def test_the_parity_record_holds_the_default_images(tiny_bundle: Path) -> None:
    images = load_record(open_bundle(tiny_bundle)).images()
    for actual, expected in zip(images, default_images(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_progress_is_told_in_lines(tiny_export: Path) -> None:
    progress_lines: list[str] = json.loads((tiny_export / "progress.json").read_text())
    text = "\n".join(progress_lines)
    for step in ("reading the checkpoint", "parity image 1 of 2", "parity image 2 of 2"):
        assert step in text
    for step in ("traced the encoder", "traced the decoder", "comparing"):
        assert step in text
    assert re.search(r"wrote /.+/sam3_tiny\b", text)
    assert all(line.startswith("[") and "\n" not in line for line in progress_lines)


# --- what a bundle computes -----------------------------------------------------------------------


def feeds(path: Path, arrays: list[Any]) -> dict[str, np.ndarray]:
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    return {name: np.asarray(a) for name, a in zip(names, arrays, strict=True)}


@pytest.fixture(scope="module")
def tiny_reference() -> Reference:
    """The tiny SAM 3 in transformers' code."""
    tensors = tiny_tensors()
    return TransformersReference(build_tracker_model(read_architecture(tensors), tensors))


def test_batches_of_any_size(tiny_bundle: Path) -> None:
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    path = tiny_bundle / "encoder.onnx"
    alone = [run_onnx(path, {"pixel_values": image[None].numpy()}) for image in pixels]
    for count in (2, 3, 5):
        together = run_onnx(path, {"pixel_values": pixels[:count].numpy()})
        for level, maps in enumerate(together):
            assert maps.shape[0] == count
            for i in range(count):
                assert relative(maps[i : i + 1], alone[i][level]) < 1e-5


def test_the_encoder_equals_the_reference(tiny_bundle: Path, tiny_reference: Reference) -> None:
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = run_onnx(tiny_bundle / "encoder.onnx", {"pixel_values": pixels.numpy()})
    for actual, expected in zip(maps, tiny_reference.encode(pixels), strict=True):
        assert relative(actual, expected) < 1e-4


def prompts(
    seed: int, objects: int, count: int, masks: int, size: int, side: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    points = size * torch.rand(objects, count, 2, generator=generator)
    labels = torch.randint(-1, 4, (objects, count), generator=generator)
    given = 8 * torch.randn(masks, side, side, generator=generator) if masks else None
    return points, labels, given


def decode(
    path: Path, features: tuple[Tensor, ...], asked: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points, labels, given = asked
    side = 4 * features[-1].shape[-1]
    masks = torch.zeros(1, side, side) if given is None else given
    flag = np.array([given is not None], np.float32)
    arrays = [*features, points[None], labels[None], masks[None], flag]
    multi, iou, single, single_iou, score = run_onnx(path, feeds(path, arrays))
    logits = np.concatenate([multi[0], single[0]], axis=1)
    return logits, np.concatenate([iou[0], single_iou[0]], axis=1), score[0, :, 0]


@pytest.mark.parametrize("objects", [1, 2, 3, 4])
@pytest.mark.parametrize("masks", ["none", "one", "each"])
def test_the_decoder_takes_every_count(
    tiny_bundle: Path, tiny_reference: Reference, objects: int, masks: str
) -> None:
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    features = tiny_reference.encode(pixels)
    given = {"none": 0, "one": 1, "each": objects}[masks]
    for count in range(7):
        asked = prompts(7 * objects + count, objects, count, given, 8, 16)
        logits, iou, score = decode(tiny_bundle / "decoder.onnx", features, asked)
        said = tiny_reference.decode(features, *asked)
        assert said.object_score is not None
        assert relative(logits, said.logits) < 1e-4
        assert relative(iou, said.iou) < 1e-4
        assert relative(score, said.object_score) < 1e-4


@pytest.mark.parametrize("value", [1e4, float("inf"), float("nan")])
def test_a_mask_that_does_not_count_does_not_matter(
    tiny_bundle: Path, tiny_reference: Reference, value: float
) -> None:
    features = tiny_reference.encode(torch.zeros(1, 3, 8, 8))
    points, labels, _ = prompts(0, 2, 3, 0, 8, 16)
    path = tiny_bundle / "decoder.onnx"
    results = []
    for content in (0.0, value):
        masks = np.full((1, 1, 16, 16), content, np.float32)
        arrays = [*features, points[None], labels[None], masks, np.zeros(1, np.float32)]
        results.append(run_onnx(path, feeds(path, arrays)))
    for blank, filled in zip(*results, strict=True):
        np.testing.assert_array_equal(filled, blank)


def test_the_runtime_loads_and_runs_it(tiny_bundle: Path) -> None:
    model = sam3rt.load_model(tiny_bundle, device="cpu")
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    predictor.set_image(default_images()[0])
    masks, scores, low_res = predictor.predict(
        point_coords=np.array([[100.0, 60.0]]), point_labels=np.array([1])
    )
    assert masks.shape == (3, 168, 224)
    assert (scores.shape, low_res.shape) == ((3,), (3, 16, 16))


# --- the same model again -------------------------------------------------------------------------


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bundle(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    first, second = open_bundle(tiny_bundle), export_bundle(tiny_checkpoint, again)
    assert second.manifest.export_id == first.manifest.export_id
    for name in FILES:
        assert (again / name).read_bytes() == (tiny_bundle / name).read_bytes(), name


def export_id(tensors: dict[str, Tensor], tmp_path: Path, **options: Any) -> str:
    path = tmp_path / "sam3.pt"
    torch.save(tensors, path)
    return exporter._export_id(open_source(path), ExportOptions(**options))


@pytest.mark.parametrize(
    "name",
    [
        NO_MEMORY,
        TRUNK + "pos_embed",
        TRUNK + "patch_embed.proj.weight",
        TRUNK + "blocks.1.attn.qkv.weight",
        DECODER + "conv_s0.bias",
        DECODER + "mask_tokens.weight",
        DECODER + "transformer.layers.1.norm2.bias",
        "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "tracker.sam_prompt_encoder.no_mask_embed.weight",
    ],
)
def test_models_that_differ_in_one_tensor_have_different_ids(name: str, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    changed = tensors | {name: tensors[name] + 0.5}
    assert export_id(tensors, tmp_path) != export_id(changed, tmp_path)


def test_storage_is_part_of_the_id(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    ids = {export_id(tensors, tmp_path, weights=weights) for weights in ("float32", "float16")}
    assert len(ids) == 2


@pytest.mark.parametrize(
    "change", [{"layer_norm_eps": 1e-3}, {"global_blocks": (0,)}, {"rope_theta": 500.0}]
)
def test_sizes_that_are_no_tensors_are_part_of_the_id(change: dict[str, Any]) -> None:
    tensors = tiny_tensors()
    one = read_architecture(tensors)
    other = dataclasses.replace(one, **change)
    model = build_tracker_model(one, tensors)
    ids = {
        exporter._export_id(sam3_source(arch, tensors, model), ExportOptions())
        for arch in (one, other)
    }
    assert len(ids) == 2


def test_names_and_licences_are_no_part_of_the_id(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    ids = {export_id(tensors, tmp_path, **o) for o in ({}, {"name": "x", "license": "MIT"})}
    assert len(ids) == 1


# --- options --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_name_licence_and_images_are_the_callers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "terms.txt"
    text.write_text("Do as you please.\n")
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    options = ExportOptions(
        name="kestrel", license="Terms-1.0", license_path=text, parity_images=[image]
    )
    bundle = export_bundle(tiny_checkpoint, tmp_path / "out", options)
    source = bundle.manifest.source
    assert bundle.manifest.name == "kestrel"
    assert source.license == "Terms-1.0"
    assert source.license_file is not None
    assert source.license_file.file == "LICENSE"
    assert source.license_file.sha256 == sha256_file(text)
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you please.\n"
    (stored,) = load_record(bundle).images()
    np.testing.assert_array_equal(stored, image)
    open_bundle(tmp_path / "out")
    assert leftovers(tmp_path / "out") == sorted(["LICENSE", *FILES])


@pytest.mark.parametrize("path", ["missing.txt", "."])
def test_a_licence_that_cannot_be_read_is_refused_at_once(tmp_path: Path, path: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    options = ExportOptions(license_path=out / path)
    with pytest.raises(ExportError, match="license_path"):
        export_bundle(tmp_path / "missing.pt", out / "bundle", options)
    assert leftovers(out) == []


@pytest.mark.usefixtures("quick")
def test_an_unknown_type_of_weights_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(weights="int4")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="int4"):
        export_bundle(tiny_checkpoint, tmp_path / "out", options)
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SAM 3 with its weights in FP16, and in files of their own."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        # The tiny model has hardly a weight large enough to be halved.
        monkeypatch.setattr(tracing, "MIN_FP16_VALUES", 64)
        monkeypatch.setattr(tracing, "EXTERNAL_DATA_BYTES", 1000)
        export_bundle(tiny_checkpoint, out, ExportOptions(weights="float16"))
    return out


def size_of(bundle: Path, role: str) -> int:
    return sum(path.stat().st_size for path in bundle.glob(f"{role}.onnx*"))


@pytest.mark.slow
def test_fp16_weights(
    half_bundle: Path,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    half = open_bundle(half_bundle)
    assert half.manifest.weights == "float16"
    # Its record expects the rounded weights, so that it finds what a machine adds to them.
    assert half.manifest.parity.limits == LIMITS["float32"]
    assert half.manifest.export_id != open_bundle(tiny_bundle).manifest.export_id
    for role in ("encoder", "decoder"):
        kinds = {t.data_type for t in onnx.load(half_bundle / f"{role}.onnx").graph.initializer}
        assert onnx.TensorProto.FLOAT16 in kinds
        assert size_of(half_bundle, role) < size_of(tiny_bundle, role)
    self_check(half_bundle, load_record(half), LIMITS["float32"])
    unrounded = load_record(open_bundle(tiny_bundle))
    self_check(half_bundle, unrounded, LIMITS["float16"])
    with pytest.raises(SelfCheckError):
        self_check(half_bundle, unrounded, LIMITS["float32"])

    # The export itself holds the rounded weights to the unrounded model, before the record does.
    instead_of_tracing(half_bundle, {}, monkeypatch)
    monkeypatch.setitem(exporter.LIMITS, "float16", LIMITS["float32"])
    with pytest.raises(SelfCheckError):
        export_bundle(tiny_checkpoint, tmp_path / "again", ExportOptions(weights="float16"))
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_weights_beside_the_graphs(half_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(half_bundle).manifest
    assert leftovers(half_bundle) == sorted(["decoder.onnx.data", "encoder.onnx.data", *FILES])
    assert [e.file for e in manifest.encoder.external_data] == ["encoder.onnx.data"]
    assert [e.file for e in manifest.decoder.external_data] == ["decoder.onnx.data"]
    for entry in manifest.files():
        assert entry == file_entry(half_bundle / entry.file)
        if entry.file.endswith(".onnx"):
            onnx.checker.check_model(str(half_bundle / entry.file))

    moved = Path(shutil.copytree(half_bundle, tmp_path / "moved"))
    assert self_check(moved, load_record(open_bundle(moved)), LIMITS["float32"])
    data = moved / "decoder.onnx.data"
    content = data.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
        data.unlink()
        if damaged is not None:
            data.write_bytes(damaged)
        with pytest.raises(BundleError) as caught:
            sam3rt.load_model(moved, device="cpu")
        assert caught.value.file == "decoder.onnx.data"
        data.write_bytes(content)
    sam3rt.load_model(moved, device="cpu")


# --- the self-check -------------------------------------------------------------------------------


def scale_weight(which: str, largest: int, factor: float) -> Spoil:
    """Spoil the ``largest``-th largest weight of one graph."""

    def spoil(role: str, path: Path) -> None:
        if role != which:
            return
        model = onnx.load(path)
        weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        weights.sort(key=lambda t: -int(np.prod(t.dims)))
        target = weights[largest]
        array = numpy_helper.to_array(target) * np.float32(factor)
        target.CopyFrom(numpy_helper.from_array(array, target.name))
        onnx.save(model, path)

    return spoil


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("role", ["encoder", "decoder"])
@pytest.mark.parametrize(("largest", "factor"), [(0, 1.1), (1, -1.0), (2, float("nan"))])
def test_a_graph_that_is_not_the_model_is_refused(
    tiny_checkpoint: Path,
    spoil: dict[str, Spoil],
    role: str,
    largest: int,
    factor: float,
    tmp_path: Path,
) -> None:
    spoil["graph"] = scale_weight(role, largest, factor)
    with pytest.raises(SelfCheckError, match="do not reproduce the model") as caught:
        export_bundle(tiny_checkpoint, tmp_path / "out")
    assert "allowed" in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name", [TRUNK + "blocks.1.attn.proj.weight", DECODER + "output_upscaling.3.weight"]
)
def test_another_model_than_the_graphs_is_noticed(
    tiny_checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = tiny_tensors()
    other = tensors | {name: 1.05 * tensors[name]}
    model = build_tracker_model(read_architecture(other), other)

    def changed(checkpoint: Any, _: None) -> Any:
        return dataclasses.replace(open_source(checkpoint), reference=TransformersReference(model))

    monkeypatch.setattr(exporter, "open_source", changed)
    with pytest.raises(SelfCheckError):
        export_bundle(tiny_checkpoint, tmp_path / "out")
    assert leftovers(tmp_path) == []


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_the_command(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = torch.load(tiny_checkpoint, weights_only=True)
    torch.save({"model": tensors, "ema": tensors}, tmp_path / "both.pt")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "both.pt"), "--output", str(out), "--name", "kestrel"]
    assert main(command) == 1
    assert "--weights-key" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--weights-key", "ema"]) == 0
    manifest = open_bundle(out).manifest
    assert manifest.name == "kestrel"
    said = capsys.readouterr()
    assert manifest.fingerprint in said.out
    assert f"next: sam3rt segment photo.jpg --point 225,150 --bundle {out} --output" in said.out
    assert "tracing the decoder" in said.err
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["", "--output", "--tracker", "--lora", "--license-file", "--parity-image"]
)
def test_an_empty_path_is_none(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["x.pt", "--output", "out", option, ""] if option else ["", "--output", "out"]
    with pytest.raises(SystemExit):
        main(["export", *given])
    assert "an empty path" in capsys.readouterr().err


def test_the_command_without_a_library_that_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(sam3rt_export, "__getattr__", broken)
    assert main(["export", "x.pt", "--output", "y"]) == 1
    assert "the export's libraries cannot be loaded" in capsys.readouterr().err


# --- SAM 3.1 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def multiplex_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SAM 3's weights as a SAM 3.1, exported. The encoder is SAM 3's; it is not traced."""
    folder = tmp_path_factory.mktemp("multiplex")
    torch.save(as_multiplex(tiny_tensors()), folder / "sam3.1_multiplex.pt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        instead_of_tracing(tiny_bundle, {}, monkeypatch, roles=("encoder",))
        export_bundle(folder / "sam3.1_multiplex.pt", folder / "bundle")
    return folder / "bundle"


@pytest.mark.slow
def test_a_bundle_of_sam_3_1(multiplex_bundle: Path, tiny_bundle: Path) -> None:
    manifest, other = (open_bundle(path).manifest for path in (multiplex_bundle, tiny_bundle))
    assert (manifest.name, manifest.model_type) == ("sam3.1", "sam3")
    assert manifest.source.kind == "sam3.1_multiplex.pt"
    # Limits are those of IoUs, whatever unit the model predicts them in.
    assert manifest.parity.limits == other.parity.limits
    assert load_record(open_bundle(multiplex_bundle)).log_odds
    assert not load_record(open_bundle(tiny_bundle)).log_odds
    # Weights and sizes are equal; the sigmoid alone makes it another graph.
    assert manifest.export_id != other.export_id
    assert described(manifest.decoder.outputs) == described(other.decoder.outputs)


@pytest.mark.slow
def test_sam_3_1_answers_every_golden_call_as_sam_3_with_log_odds_for_scores(
    multiplex_bundle: Path,
    tiny_model: sam3rt.SegmentationModel,
    golden_images: dict[int, NDArray[np.uint8]],
) -> None:
    """What SAM 3 answers is held to the reference's golden data elsewhere."""
    model = sam3rt.load_model(multiplex_bundle, backend="onnxruntime", device="cpu")
    sam3, multiplex = (sam3_golden(m, golden_images).expected for m in (tiny_model, model))
    assert sam3.keys() == multiplex.keys()
    for name, (masks, iou, low_res) in sam3.items():
        np.testing.assert_array_equal(multiplex[name][0], masks)
        np.testing.assert_array_equal(multiplex[name][2], low_res)
        np.testing.assert_allclose(multiplex[name][1], np.log(iou / (1 - iou)), atol=1e-4)


# --- MobileSAM ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_mobile_sam_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A MobileSAM with random weights, exported."""
    folder = tmp_path_factory.mktemp("mobile_sam")
    torch.save(random_mobile_sam(seed=3).state_dict(), folder / "mobile_sam.pt")
    options = ExportOptions(parity_images=parity_images(1))
    export_bundle(folder / "mobile_sam.pt", folder / "bundle", options)
    yield folder / "bundle"
    shutil.rmtree(folder)


@pytest.mark.slow
def test_mobile_sam_with_random_weights(random_mobile_sam_bundle: Path) -> None:
    manifest = open_bundle(random_mobile_sam_bundle).manifest
    assert (manifest.model_type, manifest.weights) == ("mobile_sam", "float32")
    assert manifest.image.size == (1024, 1024)
    assert described(manifest.encoder.outputs) == [
        ("image_embeddings.0", "float32", ("batch", 256, 64, 64))
    ]
    assert [spec.name for spec in manifest.decoder.outputs] == [
        "pred_masks",
        "iou_scores",
        "single_pred_masks",
        "single_iou_scores",
    ]


@pytest.mark.slow
def test_mobile_sam_in_batches(random_mobile_sam_bundle: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 1024, 1024), dtype=np.float32)
    path = random_mobile_sam_bundle / "encoder.onnx"
    (together,) = run_onnx(path, {"pixel_values": pixels})
    for i in range(2):
        (alone,) = run_onnx(path, {"pixel_values": pixels[i : i + 1]})
        assert relative(together[i : i + 1], alone) < 1e-5
