"""Whole exports: what a bundle says and computes, and that it appears whole or not at all."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tests.support.export_helpers import (
    DECODER,
    NO_MEMORY,
    TRUNK,
    TinySizes,
    leftovers,
    one_thread,
    random_mobile_sam,
    relative,
    run_onnx,
    small_tensors,
    tiny_tensors,
)
from torch import Tensor

import sam3rt
from sam3rt.accuracy.record import load_record
from sam3rt.bundle import GraphSpec, file_entry, open_bundle
from sam3rt.bundle.files import sha256_file
from sam3rt.errors import BundleError
from sam3rt_export import ExportError, ExportOptions, export_bundle, exporter, tracing, transaction
from sam3rt_export.errors import CheckpointError, SelfCheckError
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
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SAM 3 as a file."""
    path = tmp_path_factory.mktemp("tiny") / "sam3_tiny.pt"
    torch.save(tiny_tensors(), path)
    return path


@pytest.fixture(scope="module")
def progress_lines() -> list[str]:
    """What the export of the tiny bundle said."""
    return []


@pytest.fixture(scope="module")
def tiny_bundle(
    tiny_checkpoint: Path, progress_lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny SAM 3 exported for real."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    with one_thread():
        export_bundle(tiny_checkpoint, path, progress=progress_lines.append)
    return path


Spoil = Callable[[str, Path], None]


@pytest.fixture
def spoil() -> dict[str, Spoil]:
    """Holds, under "graph", what a test does to each graph after it was traced."""
    return {}


@pytest.fixture
def quick(
    tiny_bundle: Path, spoil: dict[str, Spoil], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Take the graphs from the tiny bundle instead of tracing them, to save ten seconds."""
    manifest = open_bundle(tiny_bundle).manifest

    def copy(request: TraceRequest, path: Path) -> GraphSpec:
        role = request.metadata["sam3rt.role"]
        shutil.copyfile(tiny_bundle / f"{role}.onnx", path)
        model = onnx.load(path)
        for entry in model.metadata_props:
            if entry.key == "sam3rt.export_id":
                entry.value = request.metadata[entry.key]
        onnx.save(model, path)
        if "graph" in spoil:
            spoil["graph"](role, path)
        spec = manifest.encoder if role == "encoder" else manifest.decoder
        return dataclasses.replace(spec, model=file_entry(path))

    monkeypatch.setattr(exporter, "trace_to_file", copy)
    with one_thread():
        yield


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
        *((name, "float32", (1, *size)) for name, size in zip(features, sizes, strict=True)),
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


def test_the_parity_record_holds_the_default_images(small_bundle: Path) -> None:
    images = load_record(open_bundle(small_bundle)).images()
    for actual, expected in zip(images, default_images(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_progress_is_told_in_lines(tiny_bundle: Path, progress_lines: list[str]) -> None:
    text = "\n".join(progress_lines)
    for step in ("reading the checkpoint", "parity image 1 of 2", "parity image 2 of 2"):
        assert step in text
    for step in ("traced the encoder", "traced the decoder", "comparing", f"wrote {tiny_bundle}"):
        assert step in text
    assert all(line.startswith("[") and "\n" not in line for line in progress_lines)


# --- what a bundle computes -----------------------------------------------------------------------


def feeds(path: Path, arrays: list[Any]) -> dict[str, np.ndarray]:
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
    return {name: np.asarray(a) for name, a in zip(names, arrays, strict=True)}


@pytest.fixture(scope="module")
def small_reference() -> Reference:
    """The small SAM 3 in transformers' code."""
    tensors = small_tensors()
    return TransformersReference(build_tracker_model(read_architecture(tensors), tensors))


@pytest.fixture(scope="module")
def small_pixels() -> Tensor:
    """Three images of the small SAM 3's size."""
    return torch.randn(3, 3, 1008, 1008, generator=torch.Generator().manual_seed(0))


def test_a_batch_of_images_is_each_image_alone(small_bundle: Path, small_pixels: Tensor) -> None:
    path = small_bundle / "encoder.onnx"
    pixels = small_pixels.numpy()
    alone = [run_onnx(path, {"pixel_values": pixels[i : i + 1]}) for i in range(3)]
    for count in (2, 3):
        together = run_onnx(path, {"pixel_values": pixels[:count]})
        for level, maps in enumerate(together):
            assert maps.shape[0] == count
            for i in range(count):
                assert relative(maps[i : i + 1], alone[i][level]) < 1e-5


def test_the_encoder_equals_the_reference(
    small_bundle: Path, small_reference: Reference, small_pixels: Tensor
) -> None:
    maps = run_onnx(small_bundle / "encoder.onnx", {"pixel_values": small_pixels[:1].numpy()})
    for actual, expected in zip(maps, small_reference.encode(small_pixels[:1]), strict=True):
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


@pytest.fixture(scope="module")
def small_features(small_reference: Reference, small_pixels: Tensor) -> tuple[Tensor, ...]:
    """Features of one image by the reference."""
    return small_reference.encode(small_pixels[:1])


@pytest.mark.parametrize(
    ("objects", "count", "masks"),
    [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 6, 2), (3, 2, 1), (3, 4, 0), (4, 3, 4), (4, 0, 0)],
)
def test_the_decoder_equals_the_reference(
    small_bundle: Path,
    small_reference: Reference,
    small_features: tuple[Tensor, ...],
    objects: int,
    count: int,
    masks: int,
) -> None:
    asked = prompts(7 * objects + count, objects, count, masks, 1008, 288)
    logits, iou, score = decode(small_bundle / "decoder.onnx", small_features, asked)
    said = small_reference.decode(small_features, *asked)
    assert said.object_score is not None
    assert logits.shape == (objects, 4, 288, 288)
    assert float(said.logits.abs().max()) > 1.0
    assert np.abs(logits - said.logits.numpy()).max() < 5e-3
    assert np.abs(iou - said.iou.numpy()).max() < 1e-3
    assert np.abs(score - said.object_score.numpy()).max() < 5e-3


@pytest.fixture(scope="module")
def tiny_reference() -> Reference:
    """The tiny SAM 3 in transformers' code."""
    tensors = tiny_tensors()
    return TransformersReference(build_tracker_model(read_architecture(tensors), tensors))


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


def test_exporting_twice_gives_the_same_bundle(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    again = tiny_bundle.with_name("again")
    with one_thread():
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
    ids = {
        exporter._export_id(
            sam3_source(arch, tensors, None, kind="test", origin="test"), ExportOptions()
        )
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


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("path", ["missing.txt", "."])
def test_a_licence_that_cannot_be_read_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, path: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    options = ExportOptions(license_path=out / path)
    with pytest.raises(ExportError, match="license_path"):
        export_bundle(tiny_checkpoint, out / "bundle", options)
    assert leftovers(out) == []


@pytest.mark.usefixtures("quick")
def test_an_unknown_type_of_weights_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(weights="int4")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="int4"):
        export_bundle(tiny_checkpoint, tmp_path / "out", options)
    assert leftovers(tmp_path) == []


def test_fp16_weights(
    tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The tiny model has hardly a weight large enough to be halved.
    monkeypatch.setattr(tracing, "MIN_FP16_VALUES", 64)
    with one_thread():
        half = export_bundle(tiny_checkpoint, tmp_path / "out", ExportOptions(weights="float16"))
    assert half.manifest.weights == "float16"
    # Its record expects the rounded weights, so that it finds what a machine adds to them.
    assert half.manifest.parity.limits == LIMITS["float32"]
    assert half.manifest.export_id != open_bundle(tiny_bundle).manifest.export_id
    for name in ("encoder.onnx", "decoder.onnx"):
        onnx.checker.check_model(str(tmp_path / "out" / name))
        kinds = {t.data_type for t in onnx.load(tmp_path / "out" / name).graph.initializer}
        assert onnx.TensorProto.FLOAT16 in kinds
        assert (tmp_path / "out" / name).stat().st_size < (tiny_bundle / name).stat().st_size
    self_check(tmp_path / "out", load_record(half), LIMITS["float32"])
    unrounded = load_record(open_bundle(tiny_bundle))
    self_check(tmp_path / "out", unrounded, LIMITS["float16"])
    with pytest.raises(SelfCheckError):
        self_check(tmp_path / "out", unrounded, LIMITS["float32"])


def test_rounded_weights_are_held_to_the_unrounded_model(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracing, "MIN_FP16_VALUES", 64)
    monkeypatch.setitem(exporter.LIMITS, "float16", LIMITS["float32"])
    with one_thread(), pytest.raises(SelfCheckError):
        export_bundle(tiny_checkpoint, tmp_path / "out", ExportOptions(weights="float16"))
    assert leftovers(tmp_path) == []


def test_weights_beside_the_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Of another geometry than the rest, which its own self-check covers on the way.
    sizes = TinySizes(grid=6, window=3, pretrain=4, depth=3, global_blocks=(0, 2))
    torch.save(tiny_tensors(sizes), tmp_path / "sam3.pt")
    monkeypatch.setattr(tracing, "EXTERNAL_DATA_BYTES", 1000)
    out = tmp_path / "out"
    with one_thread():
        manifest = export_bundle(tmp_path / "sam3.pt", out).manifest
    assert (manifest.image.size, manifest.masks.low_res_size) == ((12, 12), (24, 24))
    assert leftovers(out) == sorted(["decoder.onnx.data", "encoder.onnx.data", *FILES])
    assert [e.file for e in manifest.encoder.external_data] == ["encoder.onnx.data"]
    assert [e.file for e in manifest.decoder.external_data] == ["decoder.onnx.data"]
    for entry in manifest.files():
        assert entry == file_entry(out / entry.file)
        if entry.file.endswith(".onnx"):
            onnx.checker.check_model(str(out / entry.file))

    moved = out.rename(tmp_path / "moved")
    bundle = open_bundle(moved)
    assert self_check(moved, load_record(bundle), LIMITS["float32"])
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
def test_the_traced_graph_itself_passes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]
    open_bundle(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


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

    def changed(checkpoint: Any) -> Any:
        return dataclasses.replace(open_source(checkpoint), reference=TransformersReference(model))

    monkeypatch.setattr(exporter, "open_source", changed)
    with pytest.raises(SelfCheckError):
        export_bundle(tiny_checkpoint, tmp_path / "out")
    assert leftovers(tmp_path) == []


# --- whole or not at all --------------------------------------------------------------------------


class Boom(Exception):
    """Stands for a fault nobody foresaw."""


FAULTS: list[tuple[BaseException, type[BaseException]]] = [
    (Boom("x"), Boom),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(28, "No space left on device"), ExportError),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("raised", "seen"), FAULTS, ids=["fault", "interrupt", "full disk"])
@pytest.mark.parametrize("role", ["encoder", "decoder"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_fault_on_the_way_leaves_everything_as_it_was(
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    spoil: dict[str, Spoil],
    raised: BaseException,
    seen: type[BaseException],
    role: str,
    existing: bool,
    tmp_path: Path,
) -> None:
    def fail(which: str, path: Path) -> None:
        if which == role:
            raise raised

    spoil["graph"] = fail
    target = tmp_path / "out"
    if existing:
        shutil.copytree(tiny_bundle, target)
    with pytest.raises(seen):
        export_bundle(tiny_checkpoint, target, ExportOptions(overwrite=existing))
    assert leftovers(tmp_path) == (["out"] if existing else [])
    if existing:
        assert open_bundle(target).manifest == open_bundle(tiny_bundle).manifest


@pytest.mark.parametrize("kind", ["bundle", "folder", "file"])
def test_an_existing_output_is_refused_before_anything_is_read(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / ("bundle.json" if kind == "bundle" else "photo.jpg")).write_text("mine")
    before = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(ExportError, match="exists"):
        export_bundle(tmp_path / "missing.pt", target)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == before


@pytest.fixture
def old_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to be replaced, with a file of its own."""
    path = tmp_path / "place" / "out"
    shutil.copytree(tiny_bundle, path)
    (path / "engine.plan").write_text("old")
    return path


@pytest.mark.usefixtures("quick")
def test_overwriting_replaces_the_whole_bundle(tiny_checkpoint: Path, old_bundle: Path) -> None:
    options = ExportOptions(name="new", overwrite=True)
    export_bundle(tiny_checkpoint, old_bundle, options)
    assert leftovers(old_bundle.parent) == ["out"]
    assert leftovers(old_bundle) == FILES
    assert open_bundle(old_bundle).manifest.name == "new"


@pytest.mark.usefixtures("quick")
def test_overwriting_nothing_is_fine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "out", ExportOptions(overwrite=True))
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.usefixtures("quick")
def test_what_an_interrupted_overwrite_left_is_no_obstacle(
    tiny_checkpoint: Path, old_bundle: Path
) -> None:
    shutil.copytree(old_bundle, old_bundle.with_name(".out.old"))
    export_bundle(tiny_checkpoint, old_bundle, ExportOptions(name="new", overwrite=True))
    assert leftovers(old_bundle.parent) == ["out"]
    assert open_bundle(old_bundle).manifest.name == "new"


@pytest.mark.usefixtures("quick")
def test_the_old_bundle_comes_back_where_the_new_one_cannot_take_its_place(
    tiny_checkpoint: Path, old_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange two names in one step."""
    monkeypatch.setattr(transaction, "_exchange", lambda first, second: False)
    rename = Path.rename

    def refuse_the_new_one(self: Path, target: Any) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(ExportError):
        export_bundle(tiny_checkpoint, old_bundle, ExportOptions(name="new", overwrite=True))
    assert leftovers(old_bundle.parent) == ["out"]
    assert open_bundle(old_bundle).manifest.name == "sam3"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwriting_replaces_bundles_and_nothing_else(
    tiny_checkpoint: Path, kind: str, tmp_path: Path
) -> None:
    """A mistyped output must not delete somebody's folder."""
    target = tmp_path / "photos"
    mine = target
    if kind == "folder":
        target.mkdir()
        mine = target / "holiday.jpg"
    mine.write_text("mine")
    with pytest.raises(ExportError):
        export_bundle(tiny_checkpoint, target, ExportOptions(overwrite=True))
    assert mine.read_text() == "mine"
    assert leftovers(tmp_path) == ["photos"]


@pytest.mark.usefixtures("quick")
def test_overwriting_a_link_leaves_no_rubbish(
    tiny_checkpoint: Path, old_bundle: Path, tmp_path: Path
) -> None:
    link = tmp_path / "links" / "current"
    link.parent.mkdir()
    link.symlink_to(old_bundle, target_is_directory=True)
    export_bundle(tiny_checkpoint, link, ExportOptions(name="new", overwrite=True))
    assert leftovers(link.parent) == ["current"]
    assert open_bundle(link).manifest.name == "new"


@pytest.mark.usefixtures("quick")
def test_parents_are_made_and_relative_paths_work(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    export_bundle(tiny_checkpoint, "a/b/out")
    export_bundle(tiny_checkpoint, "out")
    assert leftovers(tmp_path) == ["a", "out"]
    assert leftovers(tmp_path / "a" / "b") == ["out"]


@pytest.mark.usefixtures("quick")
def test_a_parent_that_cannot_be_written_is_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(ExportError, match="output"):
            export_bundle(tiny_checkpoint, output)

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(transaction.tempfile, "mkdtemp", refuse)
    with pytest.raises(ExportError, match=r"cannot be written.*Permission denied"):
        export_bundle(tiny_checkpoint, tmp_path / "out")
    assert leftovers(tmp_path) == ["file"]


def test_a_checkpoint_that_is_none_is_refused_without_a_trace(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        export_bundle(tmp_path / "missing.pt", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_refused_export_leaves_no_parents(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        export_bundle(tmp_path / "missing.pt", tmp_path / "a" / "b" / "out")
    assert leftovers(tmp_path) == []


def test_a_checkpoint_that_cannot_be_read_is_not_the_outputs_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(exporter, "open_source", refuse)
    with pytest.raises(ExportError, match=r"^checkpoint: cannot be read.*Input/output error"):
        export_bundle(tmp_path / "x.pt", tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("quick")
def test_of_two_exports_to_one_place_the_first_wins(
    tiny_checkpoint: Path, tiny_bundle: Path, spoil: dict[str, Spoil], tmp_path: Path
) -> None:
    """Whoever comes second must not overwrite unasked, however long ago it looked."""
    target = tmp_path / "out"

    def be_faster(which: str, path: Path) -> None:
        if which == "decoder":
            shutil.copytree(tiny_bundle, target)

    spoil["graph"] = be_faster
    with pytest.raises(ExportError, match="exists"):
        export_bundle(tiny_checkpoint, target, ExportOptions(name="second"))
    assert leftovers(tmp_path) == ["out"]
    assert open_bundle(target).manifest == open_bundle(tiny_bundle).manifest


def test_of_two_whole_exports_at_once_one_wins(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In processes of their own, from the checkpoint to the bundle."""
    target = tmp_path / "out"

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sam3rt", "export", str(tiny_checkpoint)]
        return subprocess.Popen(
            [*command, "--output", str(target), "--name", name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    exports = {name: start(name) for name in ("one", "other")}
    said = {name: process.communicate(timeout=300)[1] for name, process in exports.items()}
    winners = [name for name, process in exports.items() if process.returncode == 0]
    assert len(winners) == 1, said
    (loser,) = exports.keys() - set(winners)
    assert "exists" in said[loser]
    assert leftovers(tmp_path) == ["out"]
    bundle = open_bundle(target)
    assert bundle.manifest.name == winners[0]
    assert not [
        m for m in self_check(target, load_record(bundle), LIMITS["float32"]) if not m.passed
    ]


# --- MobileSAM ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_mobile_sam_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A MobileSAM with random weights, exported."""
    folder = tmp_path_factory.mktemp("mobile_sam")
    torch.save(random_mobile_sam(seed=3).state_dict(), folder / "mobile_sam.pt")
    export_bundle(folder / "mobile_sam.pt", folder / "bundle")
    yield folder / "bundle"
    shutil.rmtree(folder)


def test_mobile_sam_with_random_weights(random_mobile_sam_bundle: Path) -> None:
    bundle = open_bundle(random_mobile_sam_bundle)
    manifest = bundle.manifest
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
    measured = self_check(random_mobile_sam_bundle, load_record(bundle), LIMITS["float32"])
    features = [m for m in measured if m.metric == "relative error" and "features" in m.subject]
    assert len(features) == len(default_images())
    assert max(m.value for m in features) < 1e-4


def test_mobile_sam_in_batches(random_mobile_sam_bundle: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 1024, 1024), dtype=np.float32)
    path = random_mobile_sam_bundle / "encoder.onnx"
    (together,) = run_onnx(path, {"pixel_values": pixels})
    for i in range(2):
        (alone,) = run_onnx(path, {"pixel_values": pixels[i : i + 1]})
        assert relative(together[i : i + 1], alone) < 1e-5
