"""Bundles in C++ beyond the vectors: links, folders, huge and nested manifests, and graphs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cpp_driver import Build, Step
from tests.support.helpers import (
    edit_manifest,
    flip,
    noise,
    read_document,
    relist,
    sign,
    tiny_bundle,
)
from tests.support.runnable_bundle import runnable_bundle

from sam3rt import open_bundle
from sam3rt.bundle import NO_FINGERPRINT
from sam3rt.bundle.default import default_bundle_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid bundle, one per test."""
    tiny_bundle(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def raw(folder: Path) -> bytes:
    """The bytes of a valid manifest."""
    return (folder / "bundle.json").read_bytes()


def check_refused(build: Build, texts: list[bytes], tmp_path: Path) -> None:
    """Assert that none of the texts is taken for a manifest."""
    steps = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.json"
        path.write_bytes(text)
        steps.append({"op": "parse_manifest", "path": path})
    for result in build.run(steps):
        result.refusal("BundleError", "bundle.json")


# --- valid bundles --------------------------------------------------------------------------------


def test_manifest_is_read_as_in_python(cpp_build: Build, folder: Path, tiny_sam3: Path) -> None:
    for path in (folder, tiny_sam3, default_bundle_path()):
        manifest = open_bundle(path, check_files=False).manifest
        # Hashing tens of megabytes takes the build without optimization long.
        check_files = path != default_bundle_path()
        found = cpp_build.one(op="open_bundle", path=path, check_files=check_files).value
        assert found["name"] == manifest.name
        assert found["fingerprint"] == manifest.fingerprint
        assert found["export_id"] == manifest.export_id
        assert (found["model_type"], found["weights"]) == (manifest.model_type, manifest.weights)
        assert found["license"] == manifest.source.license
        assert found["source_weights"] == manifest.source.weights
        assert tuple(found["notes"]) == manifest.source.notes
        assert found["files"] == [[e.file, e.sha256, e.bytes] for e in manifest.files()]
        assert tuple(found["image_size"]) == manifest.image.size
        assert found["mean"] == pytest.approx(manifest.image.mean)
        assert found["std"] == pytest.approx(manifest.image.std)
        assert found["pad_value"] == manifest.image.pad_value
        assert tuple(found["mask_size"]) == manifest.prompts.mask_size
        assert tuple(found["low_res_size"]) == manifest.masks.low_res_size
        assert found["multimask"] == manifest.masks.multimask
        assert found["max_hole_area"] == manifest.masks.max_hole_area
        assert found["mask_iou"] == manifest.parity.limits.mask_iou
        assert found["producer"] == manifest.producer


def test_links(cpp_build: Build, tmp_path: Path) -> None:
    """A link may stay inside of the bundle, and the bundle itself may be one."""
    inside = tmp_path / "inside"
    tiny_bundle(inside)
    (inside / "decoder.onnx").rename(inside / "blob")
    (inside / "decoder.onnx").symlink_to("blob")
    (tmp_path / "linked").symlink_to(inside, target_is_directory=True)
    outside = tmp_path / "outside"
    tiny_bundle(outside)
    (outside / "decoder.onnx").rename(tmp_path / "away")
    (outside / "decoder.onnx").symlink_to(Path("..", "away"))
    *taken, left = cpp_build.run(
        [{"op": "open_bundle", "path": path} for path in (inside, tmp_path / "linked", outside)]
    )
    assert not [result.error for result in taken if result.error]
    assert "link that leaves" in left.refusal("BundleError", "decoder.onnx")


def test_hub_cache(cpp_build: Build, tmp_path: Path) -> None:
    """A snapshot of a hub's cache links to the blobs of its own repository, and to no others."""
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    tiny_bundle(snapshot)
    blobs, others = tmp_path / "models--x" / "blobs", tmp_path / "models--y" / "blobs"
    step = {"op": "open_bundle", "path": snapshot}
    for folder in (blobs, others):
        folder.mkdir(parents=True)
        path = snapshot / "decoder.onnx"
        path.resolve().rename(folder / "0123")
        path.unlink(missing_ok=True)
        path.symlink_to(Path("..", "..", "..", folder.parent.name, "blobs", "0123"))
        result = cpp_build.run([step])[0]
        if folder == blobs:
            assert result.error is None
        else:
            assert "cp -rL" in result.refusal("BundleError", "decoder.onnx")


def test_relative_folder(cpp_build: Build, tiny_sam3: Path, tmp_path: Path) -> None:
    """What is opened later is found even where the process has another current folder by then."""
    results = cpp_build.run(
        [
            {"op": "chdir", "path": tiny_sam3.parent},
            {"op": "load_model", "model": "m", "path": tiny_sam3.name},
            {"op": "chdir", "path": tmp_path},
            {"op": "prepare", "model": "m"},
        ]
    )
    assert not [result.error for result in results if result.error]


# --- files ----------------------------------------------------------------------------------------


def test_no_bundle_there(cpp_build: Build, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    places = (tmp_path / "nowhere", folder / "LICENSE", tmp_path / "empty")
    results = cpp_build.run([{"op": "open_bundle", "path": path} for path in places])
    assert "no bundle folder" in results[0].refusal("BundleError", "")
    assert "no bundle folder" in results[1].refusal("BundleError", "")
    assert "not a sam3rt bundle" in results[2].refusal("BundleError", "bundle.json")


def test_files_are_not_hashed_unless_asked(cpp_build: Build, folder: Path) -> None:
    (folder / "encoder.onnx").write_bytes(b"damaged")
    assert cpp_build.one(op="open_bundle", path=folder, check_files=False).error is None
    cpp_build.one(op="load_model", model="m", path=folder).refusal("BundleError", "encoder.onnx")


def test_expected_fingerprint(cpp_build: Build, folder: Path) -> None:
    fingerprint = open_bundle(folder).manifest.fingerprint
    step = {"op": "load_model", "model": "m", "path": folder}
    good, *bad = cpp_build.run(
        [
            {**step, "expected_fingerprint": text}
            for text in (fingerprint, "", fingerprint.upper(), fingerprint[:-1], "0" * 64)
        ]
    )
    assert good.error is None
    for result in bad:
        assert fingerprint in result.refusal("BundleError")


# --- the manifest ---------------------------------------------------------------------------------


def test_cut_and_flipped_manifests(cpp_build: Build, raw: bytes, tmp_path: Path) -> None:
    texts = [b"\xef\xbb\xbf" + raw, raw + b"\n", b" " + raw, raw.replace(b"MIT", b"GPL")]
    texts += [raw[:length] for length in range(0, len(raw), 7)]
    texts += [flip(raw, index * 8 + index % 8) for index in range(0, len(raw), 3)]
    assert len(texts) > 1000
    check_refused(cpp_build, texts, tmp_path)


def test_huge_manifest(cpp_build: Build, folder: Path, raw: bytes) -> None:
    (folder / "bundle.json").write_bytes(raw + b" " * (1 << 20))
    message = cpp_build.one(op="open_bundle", path=folder).refusal("BundleError", "bundle.json")
    assert "larger" in message


@pytest.mark.parametrize("field", ["name", "format", "format_version", "extra", "producer"])
def test_deep_nesting(cpp_build: Build, raw: bytes, tmp_path: Path, field: str) -> None:
    text = json.dumps({**json.loads(raw), field: "@"})
    nested = [
        text.replace('"@"', start * depth + "1" + end * depth).encode()
        for start, end in (("[", "]"), ('{"a":', "}"))
        for depth in (10, 1000, 100_000)
    ]
    check_refused(cpp_build, nested, tmp_path)


def test_what_python_cannot_write(cpp_build: Build, raw: bytes, tmp_path: Path) -> None:
    """Numbers beyond every type, and lone surrogates, with a fitting fingerprint."""
    texts = []
    for constant in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
        document = json.loads(raw)
        document["image"]["pad_value"] = "@"
        document["fingerprint"] = NO_FINGERPRINT
        text = json.dumps(document).replace('"@"', constant)
        digest = hashlib.sha256(text.encode()).hexdigest()
        texts.append(text.replace(NO_FINGERPRINT, digest, 1).encode())
    for field, value in (("name", "\ud800"), ("format_version", 1 << 64)):
        texts.append(sign({**json.loads(raw), field: value}))
    check_refused(cpp_build, texts, tmp_path)


def test_names_in_a_file_move_no_cursor(cpp_build: Build, tiny_sam3: Path, tmp_path: Path) -> None:
    """A message and a line of the log are one line each, whatever somebody called things."""
    name = "one\ntwo\x1b[2J"
    bundle = shutil.copytree(tiny_sam3, tmp_path / "named")
    edit_manifest(bundle, lambda document: document.update(name=name))
    odd = tmp_path / "odd.json"
    odd.write_bytes(sign({**read_document(bundle), name: 1}))
    load = {"op": "load_model", "model": "m", "path": bundle}
    refused, other, _, loaded, _, lines = cpp_build.run(
        [
            {"op": "parse_manifest", "path": odd},
            {**load, "expected_fingerprint": "0" * 64},
            {"op": "log", "level": 1},
            load,
            {"op": "prepare", "model": "m"},
            {"op": "log_lines"},
        ]
    )
    assert loaded.error is None
    texts = [line for _, line in lines.value]
    for message in (refused.refusal("BundleError"), other.refusal("BundleError"), *texts):
        assert message.isprintable(), message
    assert any("of one two [2J loaded" in text for text in texts)


# --- graphs ---------------------------------------------------------------------------------------


def prepared(build: Build, path: Path, check_files: bool = True) -> Any:
    """Load a model and both graphs; the result of the step that failed, or of the last."""
    results = build.run(
        [
            {"op": "load_model", "model": "m", "path": path, "check_files": check_files},
            {"op": "prepare", "model": "m"},
        ]
    )
    assert results[0].error is None
    return results[1]


@pytest.fixture
def copied(tiny_sam3: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SAM 3's bundle, to be changed."""
    shutil.copytree(tiny_sam3, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
@pytest.mark.parametrize("export_id", ["0" * 64, None])
def test_graph_of_another_export(
    cpp_build: Build, copied: Path, name: str, export_id: str | None
) -> None:
    import onnx

    graph = onnx.load(copied / name)
    kept = {p.key: p.value for p in graph.metadata_props}
    assert kept.pop("sam3rt.export_id") == read_document(copied)["export_id"]
    if export_id is not None:
        kept["sam3rt.export_id"] = export_id
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, kept)
    onnx.save(graph, copied / name)
    relist(copied)
    assert "mixed" in prepared(cpp_build, copied).refusal("BundleError", name)


def test_graphs_that_are_not_the_right_ones(cpp_build: Build, copied: Path) -> None:
    decoder = (copied / "decoder.onnx").read_bytes()
    shutil.copy(copied / "encoder.onnx", copied / "decoder.onnx")
    relist_error = prepared(cpp_build, copied, check_files=False)
    relist_error.refusal("BundleError", "decoder.onnx")  # it is not what was hashed
    relist(copied)
    prepared(cpp_build, copied).refusal("BundleError", "decoder.onnx")
    for content in (b"", b"not ONNX", b"\0" * 1000):
        (copied / "decoder.onnx").write_bytes(content)
        relist(copied)
        result = prepared(cpp_build, copied)
        assert result.error["class"] in ("BundleError", "BackendError")
        assert "decoder.onnx" in result.error["message"]
    (copied / "decoder.onnx").write_bytes(decoder)
    relist(copied)
    assert prepared(cpp_build, copied).error is None


def test_weights_beside_a_graph(cpp_build: Build, tmp_path: Path) -> None:
    """Whatever happens to their file, nothing is served but what was hashed."""
    import onnx

    whole = runnable_bundle(tmp_path / "whole").path
    bundle = tmp_path / "bundle"
    shutil.copytree(whole, bundle)
    weights = bundle / "decoder.data"
    onnx.save(
        onnx.load(bundle / "decoder.onnx"),
        bundle / "decoder.onnx",
        save_as_external_data=True,
        location=weights.name,
        size_threshold=1024,
    )
    entry = {"file": weights.name, "sha256": "0" * 64, "bytes": 0}
    edit_manifest(bundle, lambda d: d["decoder"].update(external_data=[entry]))
    relist(bundle)
    content = weights.read_bytes()
    for name, changed in (
        ("kept", content),
        ("flipped", flip(content, 800)),
        ("zeros", bytes(len(content))),
        ("empty", b""),
    ):
        (tmp_path / name).write_bytes(changed)

    def exchange(name: str) -> Step:
        return {"op": "copy_file", "from": tmp_path / name, "to": weights}

    load = {"op": "load_model", "path": bundle}
    click = {"point_coords": np.float32([[4, 4]]), "point_labels": np.array([1])}
    encode = {"op": "encode", "embedding": "e", "image": noise(9, 9)}
    decode = {"op": "decode", "embedding": "e", "prompts": click}
    results = cpp_build.run(
        [
            {**load, "model": "whole", "path": whole},
            {**encode, "model": "whole"},
            {**decode, "model": "whole"},
            {**load, "model": "mapped", "map_weights": True},
            {**encode, "model": "mapped"},
            {**decode, "model": "mapped"},
            {**load, "model": "m"},
            exchange("flipped"),
            {"op": "prepare", "model": "m"},
            exchange("kept"),
            {"op": "prepare", "model": "m"},
            {**encode, "model": "m"},
            {**decode, "model": "m"},
            exchange("zeros"),
            {**decode, "model": "m"},
            exchange("empty"),
            {**decode, "model": "m"},
        ]
    )
    results[8].refusal("BundleError", "decoder.data")
    assert not [r.error for i, r in enumerate(results) if r.error and i != 8]
    for index in (5, 12, 14, 16):
        found = results[index].arrays["low_res"]
        np.testing.assert_array_equal(found, results[2].arrays["low_res"])
    cpp_build.one(op="open_bundle", path=bundle).refusal("BundleError", "decoder.data")


def test_failed_load_is_not_tried_again_by_every_call(cpp_build: Build, copied: Path) -> None:
    """Requests to a service fail at once with the same error, until somebody prepares the model."""
    good, bad = copied.with_name("good"), copied.with_name("bad")
    for path in (good, bad):
        shutil.copy(copied / "encoder.onnx", path)
    bad.write_bytes(flip(good.read_bytes(), 0))
    encode = {"op": "encode_view", "model": "m", "embedding": "e", "height": 1, "width": 1}
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": copied},
            {"op": "copy_file", "from": bad, "to": copied / "encoder.onnx"},
            encode,
            {"op": "copy_file", "from": good, "to": copied / "encoder.onnx"},
            encode,
            {"op": "encoder_loaded", "model": "m"},
            {"op": "prepare", "model": "m"},
            encode,
        ]
    )
    message = results[2].refusal("BundleError", "encoder.onnx")
    assert results[4].refusal("BundleError", "encoder.onnx") == message
    assert results[5].value is False
    assert not [result.error for result in results[6:] if result.error]
