"""Tests of `sam3rt.bundle`: what opens, and that every kind of damage is refused by name.

Single damages of files and manifests, on which all runtimes agree, are in
``tests/conformance/bundle_files.json`` and ``manifests.json``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import ntpath
import posixpath
import shutil
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.helpers import (
    edit_manifest,
    examples,
    flip,
    read_document,
    relist,
    sign,
    tiny_bundle,
)

from sam3rt import Bundle, BundleError, InvalidInputError, Manifest, load_model, open_bundle
from sam3rt.bundle import NO_FINGERPRINT, file_entry, fingerprint_of, parse_manifest, write_manifest
from sam3rt.bundle.default import default_bundle_path
from sam3rt.bundle.manifest import _SAFE_NAME

FILES = ("encoder.onnx", "encoder.data", "decoder.onnx", "parity.npz", "LICENSE")
Document = dict[str, Any]
Place = tuple[str | int, ...]


@given(st.from_regex(_SAFE_NAME, fullmatch=True))
@example("a")
@example("console.onnx")
def test_an_allowed_name_is_a_file_of_the_folder_on_every_system(name: str) -> None:
    for rules, folder in ((ntpath, r"C:\bundles\x"), (posixpath, "/bundles/x")):
        path = rules.join(folder, name)
        assert rules.normpath(path) == path
        assert rules.split(path) == (folder, name)
    assert PureWindowsPath(name).drive == ""
    assert not PureWindowsPath(name).is_reserved()
    assert ":" not in name
    assert not name.endswith((".", " "))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid bundle, one per test."""
    tiny_bundle(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a valid manifest."""
    path = tmp_path_factory.mktemp("raw") / "tiny"
    tiny_bundle(path)
    return (path / "bundle.json").read_bytes()


def refused(path: Path, file: str, **options: Any) -> str:
    """Assert that a bundle is refused naming ``file``; return the message."""
    with pytest.raises(BundleError) as caught:
        open_bundle(path, **options)
    assert caught.value.file == file
    assert file in str(caught.value)
    return str(caught.value)


def at(document: Any, place: Place) -> Any:
    for step in place:
        document = document[step]
    return document


def put(document: Any, place: Place, value: Any) -> Any:
    """Replace a value; with no place, the document itself."""
    if not place:
        return value
    at(document, place[:-1])[place[-1]] = value
    return document


def places(value: Any, prefix: Place = ()) -> Iterator[Place]:
    """Every place in a JSON document below the root."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield (*prefix, key)
            yield from places(inner, (*prefix, key))


# --- valid bundles --------------------------------------------------------------------------------


def test_valid_bundle_opens(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert isinstance(bundle, Bundle)
    assert bundle.path == folder
    assert bundle.manifest.name == "tiny ☃"
    assert {entry.file for entry in bundle.manifest.files()} == set(FILES)
    assert bundle.file(bundle.manifest.decoder.model) == folder / "decoder.onnx"
    bundle.check_files()


def test_path_may_be_a_string_or_a_link_to_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    manifest = open_bundle(folder).manifest
    assert open_bundle(str(folder)).manifest == manifest
    assert open_bundle(tmp_path / "link").manifest == manifest


def test_exported_bundle_opens(small_bundle: Path) -> None:
    manifest = open_bundle(small_bundle).manifest
    assert manifest.model_type == "sam3"
    assert manifest.image.size == (1008, 1008)
    assert manifest.masks.low_res_limit == 32.0
    assert manifest.masks.max_hole_area == 256.0


def test_manifest_is_immutable(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    with pytest.raises(AttributeError, match="immutable"):
        manifest.name = "other"  # type: ignore[misc]
    assert isinstance(manifest.image.size, tuple)
    assert isinstance(manifest.encoder.inputs, tuple)


def test_files_beside_the_listed_ones_do_not_matter(folder: Path) -> None:
    (folder / "README.md").write_text("hello")
    (folder / "sub").mkdir()
    open_bundle(folder)


def test_link_inside_the_bundle_is_allowed(folder: Path) -> None:
    (folder / "decoder.onnx").rename(folder / "blob")
    (folder / "decoder.onnx").symlink_to("blob")
    open_bundle(folder)


# --- missing and damaged files --------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        open_bundle(tmp_path / "nowhere")


def test_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(BundleError, match="no bundle folder"):
        open_bundle(folder / "LICENSE")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "bundle.json")


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_bundle_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    tiny_bundle(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / name, folder / name)
    refused(folder, name)


def test_manifest_of_another_bundle_does_not_fit_the_files(folder: Path, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "bundle.json", folder / "bundle.json")
    assert open_bundle(folder, check_files=False)
    refused(folder, "encoder.onnx")


def test_without_check_files_only_the_manifest_is_read(folder: Path) -> None:
    (folder / "encoder.onnx").write_bytes(b"damaged")
    bundle = open_bundle(folder, check_files=False)
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        bundle.check_files()


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_relative_link_that_leaves_the_bundle_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(Path("..", "outside"))
    assert "link" in refused(folder, name)


def as_in_a_hubs_cache(folder: Path, repository: Path) -> Path:
    """The bundle as huggingface_hub lays it out: files are links to blobs named by their hash."""
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def test_a_snapshot_in_a_hubs_cache_opens(folder: Path, tmp_path: Path) -> None:
    snapshot = as_in_a_hubs_cache(folder, tmp_path / "models--x")
    assert open_bundle(snapshot).manifest == open_bundle(folder).manifest
    (tmp_path / "link").symlink_to(snapshot)
    open_bundle(tmp_path / "link")
    (snapshot / "sub").mkdir()
    for path in (*snapshot.glob("*.*"), snapshot / "LICENSE"):
        (snapshot / "sub" / path.name).symlink_to(Path("..", path.readlink()))
    open_bundle(snapshot / "sub")


@pytest.mark.parametrize("target", ["../../other", "../../../secret", "../../refs/blob"])
def test_a_link_out_of_a_hubs_cache_is_refused(folder: Path, tmp_path: Path, target: str) -> None:
    snapshot = as_in_a_hubs_cache(folder, tmp_path / "models--x")
    content = (snapshot / "decoder.onnx").read_bytes()
    (snapshot / target).resolve().parent.mkdir(exist_ok=True)
    (snapshot / target).write_bytes(content)
    (snapshot / "decoder.onnx").unlink()
    (snapshot / "decoder.onnx").symlink_to(target)
    assert f"cp -rL {snapshot} COPY" in refused(snapshot, "decoder.onnx")
    # A blob that is itself a link is followed before it is judged.
    (tmp_path / "models--x" / "blobs" / "linked").symlink_to((snapshot / target).resolve())
    (snapshot / "decoder.onnx").unlink()
    (snapshot / "decoder.onnx").symlink_to("../../blobs/linked")
    refused(snapshot, "decoder.onnx")


# --- the manifest as text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe{\0}\0",
        b"\xef\xbb\xbf{}",
        b'{"format": "sam3rt-bundle"}\xff',
        b"\0" * 100,
        b"1" * 10_000,
    ],
    ids=repr,
)
def test_manifest_that_is_no_text_is_refused(folder: Path, text: bytes) -> None:
    (folder / "bundle.json").write_bytes(text)
    refused(folder, "bundle.json")


def test_manifest_cut_anywhere_is_refused(raw: bytes) -> None:
    for length in range(len(raw)):
        with pytest.raises(BundleError):
            parse_manifest(raw[:length])


def test_manifest_with_a_bit_flipped_in_any_byte_is_refused(raw: bytes) -> None:
    for index in range(len(raw)):
        with pytest.raises(BundleError):
            parse_manifest(flip(raw, index * 8 + index % 8))


@given(data=st.binary(max_size=200))
@examples(100)
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(data)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize(
    "place", [("image", "pad_value"), ("parity", "limits", "mask_iou"), ("masks", "low_res_limit")]
)
def test_numbers_that_are_not_finite_are_refused(folder: Path, place: Place, constant: str) -> None:
    document = put(read_document(folder), place, "@")
    blank = put(document, ("fingerprint",), NO_FINGERPRINT)
    text = json.dumps(blank).replace('"@"', constant)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "bundle.json").write_text(text.replace(NO_FINGERPRINT, digest, 1))
    refused(folder, "bundle.json")


@pytest.mark.parametrize(
    "place",
    [
        ("name",),
        ("format",),
        ("format_version",),
        ("extra",),
        ("producer",),
        ("source", "license_file"),
        ("encoder", "inputs", 0, "shape", 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["list", "object"])
def test_deep_nesting_is_refused(raw: bytes, place: Place, kind: str) -> None:
    # Between what the parser and what repr() can still walk lies a narrow window: try it all.
    start, end = ("[", "]") if kind == "list" else ('{"a":', "}")
    text = json.dumps(put(json.loads(raw), place, "@"))
    for depth in (*range(600, 1010), 100_000):
        nested = text.replace('"@"', start * depth + "1" + end * depth)
        with pytest.raises(BundleError):
            parse_manifest(nested.encode())


def test_huge_manifest_is_refused(folder: Path, raw: bytes) -> None:
    (folder / "bundle.json").write_bytes(raw + b" " * (1 << 20))
    assert "larger" in refused(folder, "bundle.json")


# --- the manifest as a document -------------------------------------------------------------------


def test_signing_helper_agrees_with_the_format(raw: bytes) -> None:
    """Otherwise every refusal below would be one of the fingerprint."""
    document = json.loads(raw)
    assert parse_manifest(sign(document)).name == document["name"]


@pytest.mark.parametrize("value", [2, 10**30])
def test_newer_format_asks_for_a_newer_sam3rt(folder: Path, value: int) -> None:
    edit_manifest(folder, lambda d: d.update(format_version=value))
    with pytest.raises(BundleError, match=f"format version {value}.*update sam3rt"):
        open_bundle(folder)


def objects(raw: bytes) -> list[Place]:
    document = json.loads(raw)
    return [(), *(p for p in places(document) if isinstance(at(document, p), dict))]


def test_any_missing_field_is_refused(raw: bytes) -> None:
    optional = {
        ("producer",),
        ("image", "pad_value"),
        ("source", "license_file"),
    }
    checked = 0
    for place in objects(raw):
        for key in at(json.loads(raw), place):
            if (*place, key) in optional or place == ("producer",):
                continue
            document = json.loads(raw)
            del at(document, place)[key]
            # The signing helper would put a missing fingerprint back.
            text = json.dumps(document).encode() if key == "fingerprint" else sign(document)
            with pytest.raises(BundleError, match="format" if key == "format" else key):
                parse_manifest(text)
            checked += 1
    assert checked > 60


def test_unknown_field_is_refused_in_every_object(raw: bytes) -> None:
    for place in objects(raw):
        if place == ("producer",):
            continue
        document = json.loads(raw)
        at(document, place)["surprise"] = 1
        with pytest.raises(BundleError, match="surprise"):
            parse_manifest(sign(document))


LOOSE = {
    "feature_error": 0.2,
    "feature_cosine": 0.99,
    "logit_error": 1e30,
    "iou_error": 0.06,
    "mask_iou": -1.0,
}


@pytest.mark.parametrize("name", LOOSE)
def test_limits_that_everything_passes_are_refused(folder: Path, name: str) -> None:
    edit_manifest(folder, lambda d: put(d, ("parity", "limits", name), LOOSE[name]))
    assert f"parity.limits.{name}" in refused(folder, "bundle.json")


def test_the_limits_of_every_export_are_taken(folder: Path) -> None:
    from sam3rt_export.exporter import LIMITS

    for limits in LIMITS.values():
        text = msgspec.to_builtins(limits)
        edit_manifest(folder, functools.partial(put, place=("parity", "limits"), value=text))
        assert open_bundle(folder).manifest.parity.limits == limits


def test_file_name_that_is_no_unicode_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda d: put(d, ("decoder", "model", "file"), "\ud800"))
    assert "not valid JSON" in refused(folder, "bundle.json")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["sam3", "float32", "x.onnx", "0" * 64, "stretch", 1 << 40]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(data=st.data(), count=st.integers(1, 3), signed=st.booleans())
@examples(400)
def test_mutated_manifest_raises_only_bundle_errors(
    raw: bytes, data: st.DataObject, count: int, signed: bool
) -> None:
    document = json.loads(raw)
    for _ in range(count):
        place = data.draw(st.sampled_from([(), *places(document)]))
        action = data.draw(st.sampled_from(["replace", "delete", "add"]))
        value = data.draw(json_values)
        target = at(document, place)
        if action == "delete" and place:
            del at(document, place[:-1])[place[-1]]
        elif action == "add" and isinstance(target, dict):
            target[data.draw(st.text(max_size=5))] = value
        elif action == "add" and isinstance(target, list):
            target.append(value)
        else:
            document = put(document, place, value)
        if not isinstance(document, dict | list):
            break
    text = sign(document) if signed and isinstance(document, dict) else json.dumps(document)
    text = text if isinstance(text, bytes) else text.encode()
    try:
        manifest = parse_manifest(text)
    except BundleError as error:
        file = error.file
    else:
        # Only a manifest with a fitting fingerprint may pass.
        assert isinstance(manifest, Manifest)
        blank = text.replace(manifest.fingerprint.encode(), b"0" * 64, 1)
        assert hashlib.sha256(blank).hexdigest() == manifest.fingerprint
        return
    assert file == "bundle.json"


# --- the fingerprint ------------------------------------------------------------------------------


def test_fingerprint_is_the_documented_one(folder: Path) -> None:
    text = (folder / "bundle.json").read_bytes()
    fingerprint = json.loads(text)["fingerprint"]
    position = text.index(fingerprint.encode())
    blank = text[:position] + b"0" * 64 + text[position + 64 :]
    assert hashlib.sha256(blank).hexdigest() == fingerprint
    assert fingerprint_of(text, fingerprint) == fingerprint
    assert open_bundle(folder).manifest.fingerprint == fingerprint


def test_upper_case_fingerprint_is_refused(raw: bytes) -> None:
    fingerprint = json.loads(raw)["fingerprint"]
    with pytest.raises(BundleError, match="fingerprint"):
        parse_manifest(raw.replace(fingerprint.encode(), fingerprint.upper().encode()))


def test_fingerprint_depends_on_every_file(folder: Path) -> None:
    seen = {open_bundle(folder).manifest.fingerprint}
    for name in FILES:
        (folder / name).write_bytes(b"changed")
        relist(folder)
        seen.add(open_bundle(folder).manifest.fingerprint)
    assert len(seen) == len(FILES) + 1


def test_load_model_with_expected_fingerprint(folder: Path, tmp_path: Path) -> None:
    fingerprint = open_bundle(folder).manifest.fingerprint
    model = load_model(folder, device="cpu", expected_fingerprint=fingerprint)
    assert model.manifest.fingerprint == fingerprint
    tiny_bundle(tmp_path / "other", seed=1)
    with pytest.raises(BundleError, match=fingerprint):
        load_model(tmp_path / "other", device="cpu", expected_fingerprint=fingerprint)
    for wrong in ("", fingerprint.upper(), fingerprint[:-1], "0" * 64):
        with pytest.raises(BundleError, match="fingerprint"):
            load_model(folder, device="cpu", expected_fingerprint=wrong)


@pytest.mark.parametrize("value", [5, b"bytes", ["list"], 1.5])
def test_load_model_wants_a_path(value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_model(value)
    assert caught.value.argument == "bundle"


def test_load_model_checks_files_unless_told_otherwise(folder: Path) -> None:
    (folder / "decoder.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        load_model(folder, device="cpu")
    load_model(folder, device="cpu", check_files=False)


# --- writing --------------------------------------------------------------------------------------


def test_write_and_open_round_trip(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    changed = msgspec.structs.replace(manifest, name="renamed")
    written = write_manifest(folder, changed)
    assert written.fingerprint != manifest.fingerprint
    assert written == msgspec.structs.replace(changed, fingerprint=written.fingerprint)
    assert open_bundle(folder).manifest == written
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "bundle.json"])


def test_a_bundle_of_an_earlier_version_is_written_back_byte_for_byte(tmp_path: Path) -> None:
    bundle = open_bundle(default_bundle_path(), check_files=False)
    assert write_manifest(tmp_path, bundle.manifest) == bundle.manifest
    assert (tmp_path / "bundle.json").read_bytes() == (bundle.path / "bundle.json").read_bytes()


texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.just(NO_FINGERPRINT)
sizes = st.integers(1, 1 << 16)
numbers = st.floats(-1e30, 1e30)


@given(
    name=texts,
    producer=st.dictionaries(texts, texts, max_size=3),
    size=st.tuples(sizes, sizes),
    mean=st.tuples(numbers, numbers, numbers),
    limit=st.none() | st.floats(0, 1e30, exclude_min=True),
    export_id=st.just(NO_FINGERPRINT) | st.just("f" * 64),
    shape=st.lists(st.integers() | texts, max_size=5),
)
@examples(60)
def test_any_manifest_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    producer: dict[str, str],
    size: tuple[int, int],
    mean: tuple[float, float, float],
    limit: float | None,
    export_id: str,
    shape: list[int | str],
) -> None:
    path = tmp_path_factory.mktemp("round") / "tiny"
    manifest = tiny_bundle(path)
    spec = msgspec.structs.replace(manifest.encoder.inputs[0], shape=tuple(shape))
    manifest = msgspec.structs.replace(
        manifest,
        name=name,
        producer=producer,
        export_id=export_id,
        image=msgspec.structs.replace(manifest.image, size=size, mean=mean),
        masks=msgspec.structs.replace(manifest.masks, low_res_limit=limit),
        encoder=msgspec.structs.replace(manifest.encoder, inputs=(spec,)),
    )
    assert open_bundle(path).manifest != manifest
    written = write_manifest(path, manifest)
    assert open_bundle(path).manifest == written
    shutil.rmtree(path)


def test_file_entry_describes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    path.write_bytes(b"abc" * 1_000_000)
    entry = file_entry(path)
    assert (entry.file, entry.bytes) == ("some.bin", 3_000_000)
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- mixed bundles --------------------------------------------------------------------------------
