"""Bundles in C++: what the Python runtime opens or refuses, with the same file at fault.

The broken bundles are those of tests/runtime/test_bundle.py. Each is opened by both runtimes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.cpp_driver import Build
from tests.support.helpers import edit_manifest, read_document, relist, sign, tiny_bundle
from tests.unit.runtime.bundle import test_manifest as test_bundle
from tests.unit.runtime.bundle.test_manifest import FILES, at, damages, objects, places, put

from sam3rt import BundleError, open_bundle
from sam3rt.bundle import NO_FINGERPRINT, parse_manifest
from sam3rt.bundle.default import default_bundle_path

Document = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid bundle, one per test."""
    tiny_bundle(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def raw(folder: Path) -> bytes:
    """The bytes of a valid manifest."""
    return (folder / "bundle.json").read_bytes()


def parameters(test: Any, name: str) -> list[Any]:
    """The values a test of the Python runtime is run with."""
    for mark in test.pytestmark:
        if mark.name == "parametrize" and mark.args[0] in (name, tuple(name.split(","))):
            return list(mark.args[1])
    raise AssertionError(f"{test.__name__} has no parameters {name}")


def python_outcome(action: Callable[[], Any]) -> str | None:
    """The file a BundleError names, or ``None`` where nothing is refused."""
    try:
        action()
    except BundleError as error:
        return error.file
    return None


def check_folders(build: Build, folders: list[Path]) -> list[str]:
    """Open bundles in both runtimes; return the C++ runtime's messages."""
    results = build.run([{"op": "open_bundle", "path": path} for path in folders])
    messages = []
    for path, result in zip(folders, results, strict=True):
        expected = python_outcome(lambda path=path: open_bundle(path))
        if expected is None:
            assert result.error is None, (path, result.error)
            messages.append("")
        else:
            messages.append(result.refusal("BundleError", expected))
    return messages


def check_manifests(build: Build, texts: list[bytes], tmp_path: Path) -> int:
    """Parse manifests in both runtimes; return how many were refused."""
    steps = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.json"
        path.write_bytes(text)
        steps.append({"op": "parse_manifest", "path": path})
    refused = 0
    for text, result in zip(texts, build.run(steps), strict=True):
        expected = python_outcome(lambda text=text: parse_manifest(text))
        if expected is None:
            assert result.error is None, (text[:300], result.error)
        else:
            result.refusal("BundleError", expected)
            refused += 1
    return refused


# --- valid bundles --------------------------------------------------------------------------------


def test_manifest_is_read_as_in_python(cpp_build: Build, folder: Path, small_bundle: Path) -> None:
    for path in (folder, small_bundle, default_bundle_path()):
        manifest = open_bundle(path).manifest
        found = cpp_build.one(op="open_bundle", path=path).value
        assert found["name"] == manifest.name
        assert found["fingerprint"] == manifest.fingerprint
        assert found["export_id"] == manifest.export_id
        assert (found["model_type"], found["weights"]) == (manifest.model_type, manifest.weights)
        assert found["license"] == manifest.source.license
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
    def link(name: str, target: Callable[[Path], Any]) -> Path:
        path = tmp_path / name
        tiny_bundle(path)
        shutil.move(path / "decoder.onnx", tmp_path / f"{name}-outside")
        (path / "decoder.onnx").symlink_to(target(path))
        return path

    inside = tmp_path / "inside"
    tiny_bundle(inside)
    (inside / "decoder.onnx").rename(inside / "blob")
    (inside / "decoder.onnx").symlink_to("blob")
    (tmp_path / "linked").symlink_to(inside, target_is_directory=True)
    messages = check_folders(
        cpp_build,
        [
            inside,
            tmp_path / "linked",
            link("absolute", lambda path: tmp_path / "absolute-outside"),
            link("relative", lambda path: Path("..", "relative-outside")),
            link("dangling", lambda path: "nothing"),
            link("loop", lambda path: "decoder.onnx"),
        ],
    )
    assert messages[:2] == ["", ""]
    assert "link that leaves" in messages[2]
    assert "link that leaves" in messages[3]
    assert all(messages[4:])


# --- files ----------------------------------------------------------------------------------------


def test_damaged_files(cpp_build: Build, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "other", seed=1)
    folders = []
    for name in (*FILES, "bundle.json"):
        for number, damage in enumerate(damages(b"x", b"y")):
            path = tmp_path / f"{name}-{number}"
            tiny_bundle(path)
            content = (path / name).read_bytes()
            other = (tmp_path / "other" / name).read_bytes()
            (path / name).write_bytes(damages(content, other)[damage])
            folders.append(path)
        for kind in ("missing", "folder", "pipe"):
            path = tmp_path / f"{name}-{kind}"
            tiny_bundle(path)
            (path / name).unlink()
            if kind == "folder":
                (path / name).mkdir()
            elif kind == "pipe":
                os.mkfifo(path / name)
            folders.append(path)
    assert all(check_folders(cpp_build, folders))
    assert len(folders) == 66


def test_no_bundle_there(cpp_build: Build, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    messages = check_folders(
        cpp_build, [tmp_path / "nowhere", folder / "LICENSE", tmp_path / "empty"]
    )
    assert "no bundle folder" in messages[0]
    assert "no bundle folder" in messages[1]
    assert "not a sam3rt bundle" in messages[2]


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


def test_what_is_no_manifest(cpp_build: Build, raw: bytes, tmp_path: Path) -> None:
    texts = parameters(test_bundle.test_manifest_that_is_no_manifest_is_refused, "text")
    texts += [b"\xef\xbb\xbf" + raw]
    texts += [raw[:length] for length in range(0, len(raw), 7)]
    texts += [test_bundle.flip(raw, index * 8 + index % 8) for index in range(0, len(raw), 3)]
    assert check_manifests(cpp_build, texts, tmp_path) == len(texts) > 1000


def test_huge_manifest(cpp_build: Build, folder: Path, raw: bytes) -> None:
    (folder / "bundle.json").write_bytes(raw + b" " * (1 << 20))
    assert "larger" in check_folders(cpp_build, [folder])[0]


def test_deep_nesting(cpp_build: Build, raw: bytes, tmp_path: Path) -> None:
    texts = []
    for place in parameters(test_bundle.test_deep_nesting_is_refused, "place"):
        text = json.dumps(put(json.loads(raw), place, "@"))
        for start, end in (("[", "]"), ('{"a":', "}")):
            for depth in (10, 1000, 100_000):
                texts.append(text.replace('"@"', start * depth + "1" + end * depth).encode())
    assert check_manifests(cpp_build, texts, tmp_path) == len(texts)


def test_numbers_out_of_range(cpp_build: Build, raw: bytes, tmp_path: Path) -> None:
    texts = []
    test = test_bundle.test_numbers_out_of_range_are_refused
    for place in parameters(test, "place"):
        for constant in parameters(test, "constant"):
            document = put(json.loads(raw), place, "@")
            document["fingerprint"] = NO_FINGERPRINT
            text = json.dumps(document).replace('"@"', constant)
            digest = hashlib.sha256(text.encode()).hexdigest()
            texts.append(text.replace(NO_FINGERPRINT, digest, 1).encode())
    assert check_manifests(cpp_build, texts, tmp_path) == len(texts)


def changed_documents(raw: bytes) -> Iterator[tuple[Document, bool]]:
    """Manifests with one change each, and whether to sign them."""

    def fresh() -> Document:
        document: Document = json.loads(raw)
        return document

    for value, _ in parameters(test_bundle.test_format_version, "value,message"):
        yield put(fresh(), ("format_version",), value), True
    for value in parameters(test_bundle.test_wrong_format, "value"):
        yield put(fresh(), ("format",), value), True
    for place, value in parameters(test_bundle.test_broken_rule_is_refused, "place,value"):
        yield put(fresh(), place, value), True
    for value in parameters(test_bundle.test_fingerprint_of_wrong_type_or_form_is_refused, "value"):
        yield put(fresh(), ("fingerprint",), value), False
    for place in objects(raw):
        document = fresh()
        at(document, place)["surprise"] = 1
        yield document, True
        for key in at(fresh(), place):
            document = fresh()
            del at(document, place)[key]
            yield document, key != "fingerprint"
    for place in places(fresh()):
        for value in (None, True, False, 7, 1.5, "text", [], [1], {}, {"file": "x"}, 1 << 64, -1):
            yield put(fresh(), place, value), place[-1] != "fingerprint"
    names = parameters(test_bundle.test_unsafe_file_name_is_refused, "name")
    for place in parameters(test_bundle.test_unsafe_file_name_is_refused, "place"):
        for name in names:
            yield put(fresh(), (*place, "file"), name), True
    yield put(fresh(), ("decoder", "model"), fresh()["encoder"]["model"]), True


def test_changed_documents(cpp_build: Build, raw: bytes, tmp_path: Path) -> None:
    texts = [
        sign(document) if signed else json.dumps(document).encode()
        for document, signed in changed_documents(raw)
    ]
    # Python's parser takes lone surrogates and, as whole numbers, what fits no machine word; C++
    # refuses both, whatever the place.
    lone = [text for text in texts if b"\\ud800" in text]
    large = [text for text in texts if str(1 << 64).encode() in text]
    special = {*lone, *large}
    common = [text for text in texts if text not in special]
    assert check_manifests(cpp_build, common, tmp_path) > 1000
    paths = []
    for number, text in enumerate(special):
        paths.append(tmp_path / f"special{number}.json")
        paths[-1].write_bytes(text)
    for result in cpp_build.run([{"op": "parse_manifest", "path": path} for path in paths]):
        # Such numbers are still numbers where a fraction may stand.
        assert result.error is None or result.error["class"] == "BundleError"


def test_edited_manifest_with_its_old_fingerprint(
    cpp_build: Build, raw: bytes, tmp_path: Path
) -> None:
    changes = parameters(
        test_bundle.test_edited_manifest_with_its_old_fingerprint_is_refused, "change"
    )
    texts = [change(raw) for change in changes]
    assert check_manifests(cpp_build, texts, tmp_path) == len(texts)


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
def copied(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the small SAM 3's bundle, to be changed."""
    shutil.copytree(small_bundle, tmp_path / "copy")
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


def test_signature_other_than_the_manifests(cpp_build: Build, copied: Path) -> None:
    from tests.unit.runtime.backends.test_onnxruntime import SIGNATURES

    original = (copied / "bundle.json").read_bytes()
    assert len(SIGNATURES) > 12
    for file, change in SIGNATURES.values():
        (copied / "bundle.json").write_bytes(original)
        edit_manifest(copied, change)
        message = prepared(cpp_build, copied, check_files=False).refusal("BundleError", file)
        assert "the manifest says" in message


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


def test_weights_beside_the_graph(cpp_build: Build, copied: Path) -> None:
    import onnx

    graph = onnx.load(copied / "decoder.onnx")
    (copied / "decoder.onnx").unlink()
    onnx.save_model(
        graph,
        copied / "decoder.onnx",
        save_as_external_data=True,
        location="decoder.data",
        size_threshold=1024,
    )
    entry = {"file": "decoder.data", "sha256": "0" * 64, "bytes": 0}
    edit_manifest(copied, lambda d: d["decoder"].update(external_data=[entry]))
    relist(copied)
    assert prepared(cpp_build, copied).error is None
    (copied / "decoder.data").write_bytes(b"changed")
    cpp_build.one(op="open_bundle", path=copied).refusal("BundleError", "decoder.data")
