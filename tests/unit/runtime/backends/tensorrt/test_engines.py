"""The rule that chooses among engines: what fits, in which order, and what to say of the rest."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.helpers import tiny_bundle
from tests.support.tensorrt_helpers import SIDECAR

from sam3rt.backends.table import ENGINES
from sam3rt.backends.tensorrt.driver import Gpu
from sam3rt.backends.tensorrt.engines import (
    RECIPE_ORDER,
    EngineFile,
    EngineTarget,
    candidates,
    find_engines,
    recipe_of,
    subject_of,
)
from sam3rt.backends.tensorrt.sidecar import sidecar_path, write_sidecar
from sam3rt.bundle import Bundle, FileEntry
from sam3rt.errors import BackendError

L4 = Gpu("NVIDIA L4", "8.9")
TARGET = EngineTarget(L4, "tensorrt", "10.16.0", "580.65")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    manifest = tiny_bundle(tmp_path / "bundle")
    return Bundle(tmp_path / "bundle", manifest)


def add(bundle: Bundle, role: str, recipe: str = "fp32", **changes: Any) -> EngineFile:
    folder = f"{changes.get('gpu', L4)} {changes.get('targets', ())} {recipe}"
    path = bundle.path / ENGINES / folder / f"{role}.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = f"{role} {recipe}".encode()
    path.write_bytes(content)
    fields = {
        "role": role,
        "engine": FileEntry(path.name, hashlib.sha256(content).hexdigest(), len(content)),
        "bundle_fingerprint": bundle.manifest.fingerprint,
        "gpu": L4,
        "tensorrt_version": "10.16.0",
        "recipe": recipe,
        "features_dtype": "float32",
        "paired_with": None,
    }
    sidecar = msgspec.structs.replace(SIDECAR, **(fields | changes))
    write_sidecar(path, sidecar)
    return EngineFile(path, sidecar)


def add_pair(bundle: Bundle, recipe: str, **changes: Any) -> tuple[EngineFile, EngineFile]:
    encoder = add(bundle, "encoder", recipe, **changes)
    decoder = add(bundle, "decoder", recipe, paired_with=encoder.sidecar.engine.sha256, **changes)
    return encoder, decoder


def test_sets_come_fastest_first(bundle: Bundle) -> None:
    for recipe in ("fp32", "fp16"):
        add_pair(bundle, recipe)
    names = [engines.precision for engines in candidates(bundle, TARGET)]
    assert names == ["fp16", "fp16+fp32", "fp32+fp16", "fp32"]
    for recipe in RECIPE_ORDER:
        add_pair(bundle, recipe)
    found = candidates(bundle, TARGET)
    assert len(found) == len(RECIPE_ORDER) ** 2
    same = [e.precision for e in found if e.encoder.sidecar.recipe == e.decoder.sidecar.recipe]
    assert same == list(RECIPE_ORDER)


@pytest.mark.parametrize("state", ["proven", "unproven"])
def test_a_proof_in_a_sidecar_makes_no_difference(bundle: Bundle, state: str) -> None:
    add_pair(bundle, "fp16", state=state)
    add_pair(bundle, "fp32")
    assert candidates(bundle, TARGET)[0].precision == "fp16"


def test_a_verdict_is_about_everything_that_its_outcome_depends_on(bundle: Bundle) -> None:
    encoder, decoder = add_pair(bundle, "fp16")
    (engines,) = candidates(bundle, TARGET)
    recipe = recipe_of(engines, TARGET)
    assert (recipe.name, recipe.encoder) == ("fp16", encoder.sidecar.engine.sha256)
    subject = subject_of(engines, TARGET)
    assert recipe.subject == subject
    assert encoder.sidecar.engine.sha256 in subject.files
    assert decoder.sidecar.engine.sha256 in subject.files
    for other in (
        dataclasses.replace(TARGET, gpu=Gpu("NVIDIA L40", "8.9")),
        dataclasses.replace(TARGET, gpu=Gpu("NVIDIA L4", "9.0")),
        dataclasses.replace(TARGET, backend="tensorrt-rtx"),
        dataclasses.replace(TARGET, tensorrt_version="10.16.1"),
        dataclasses.replace(TARGET, driver_version="581.0"),
    ):
        assert subject_of(engines, other) != subject
    add(bundle, "decoder", "fp32")
    assert subject_of(candidates(bundle, TARGET)[1], TARGET) != subject


def test_encoder_and_decoder_must_agree_on_the_features(bundle: Bundle) -> None:
    add(bundle, "encoder", "fp16", features_dtype="float16")
    add(bundle, "decoder", "fp32")
    with pytest.raises(
        BackendError, match=r"features_dtype is \['float16'\] for encoders and \['float32'\]"
    ):
        candidates(bundle, TARGET)
    add(bundle, "decoder", "fp16", features_dtype="float16")
    assert [c.precision for c in candidates(bundle, TARGET)] == ["fp16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": Gpu("NVIDIA A9", "8.9")}, "gpu.name is NVIDIA A9, here it is NVIDIA L4"),
        ({"gpu": Gpu("NVIDIA L4", "7.5")}, "gpu.compute_capability is 7.5, here it is 8.9"),
        ({"tensorrt_version": "10.3.0"}, "tensorrt_version is 10.3.0, here it is 10.16.0"),
        ({"bundle_fingerprint": "77" * 32}, "bundle_fingerprint is 7777777777777777..."),
        ({"state": "refused", "driver_version": TARGET.driver_version}, "state is refused"),
        ({"backend": "tensorrt-rtx"}, "backend is tensorrt-rtx, here it is tensorrt"),
        (
            {"gpu": None, "targets": ("8.6", "12.0"), "state": "unproven"},
            "targets are 8.6, 12.0, the compute capability here is 8.9",
        ),
    ],
)
def test_the_field_that_differs_is_named(
    change: dict[str, Any], message: str, bundle: Bundle
) -> None:
    add_pair(bundle, "fp16", **change)
    with pytest.raises(BackendError) as caught:
        candidates(bundle, TARGET)
    text = str(caught.value)
    assert message in text
    assert f"sam3rt build {bundle.path} --backend tensorrt" in text
    # Only what differs is named.
    assert text.count("here it is") <= 1


def test_the_nearest_engine_is_the_one_explained(bundle: Bundle) -> None:
    add_pair(bundle, "fp16", gpu=Gpu("NVIDIA T4", "7.5"), tensorrt_version="9.0.0")
    add_pair(bundle, "fp32", tensorrt_version="10.3.0")
    with pytest.raises(BackendError, match=r"none of 2 encoder engines.*nearest.*10\.3\.0"):
        candidates(bundle, TARGET)


def test_a_cut_engine_does_not_fit(bundle: Bundle) -> None:
    encoder, _ = add_pair(bundle, "fp16")
    encoder.path.write_bytes(b"cut")
    with pytest.raises(BackendError, match=r"engine\.bytes is 12, here it is 3"):
        candidates(bundle, TARGET)


def test_no_engines_at_all(bundle: Bundle) -> None:
    assert find_engines(bundle) == ()
    with pytest.raises(BackendError, match=r"has no tensorrt encoder engine.*sam3rt build"):
        candidates(bundle, TARGET)


def test_engines_without_a_readable_sidecar_are_passed_over(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, decoder = add_pair(bundle, "fp16")
    sidecar_path(encoder.path).write_text("{}")
    assert [engine.path for engine in find_engines(bundle)] == [decoder.path]
    assert "is passed over" in caplog.text


@pytest.mark.parametrize("what", ["engines", "folder", "engine", "sidecar"])
def test_engines_behind_a_link_that_leaves_the_bundle_are_passed_over(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    encoder, decoder = add_pair(bundle, "fp16")
    place = {
        "engines": bundle.path / "engines",
        "folder": encoder.path.parent,
        "engine": encoder.path,
        "sidecar": sidecar_path(encoder.path),
    }[what]
    outside = tmp_path / "elsewhere" / place.name
    outside.parent.mkdir()
    place.rename(outside)
    place.symlink_to(outside)
    left = [decoder.path] if what in ("engine", "sidecar") else []
    assert [engine.path for engine in find_engines(bundle)] == left
    assert "leaves the bundle" in caplog.text


def test_engines_behind_a_link_inside_the_bundle_are_found(bundle: Bundle) -> None:
    encoder, decoder = add_pair(bundle, "fp16")
    kept = bundle.path / "kept"
    encoder.path.parent.rename(kept)
    encoder.path.parent.symlink_to(kept)
    assert {engine.path for engine in find_engines(bundle)} == {encoder.path, decoder.path}


def test_a_loop_of_links_is_passed_over(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    encoder, decoder = add_pair(bundle, "fp16")
    encoder.path.unlink()
    encoder.path.symlink_to(encoder.path.name)
    assert [engine.path for engine in find_engines(bundle)] == [decoder.path]
    assert "encoder.engine is passed over" in caplog.text


def test_a_recipe_can_be_insisted_on(bundle: Bundle) -> None:
    for recipe in ("fp16", "fp32"):
        add_pair(bundle, recipe)
    assert candidates(bundle, TARGET, "fp32")[0].precision == "fp32"
    assert candidates(bundle, TARGET, "fp32+fp16")[0].precision == "fp32+fp16"
    with pytest.raises(BackendError, match="recipe is fp16, bf16 was asked for"):
        candidates(bundle, TARGET, "bf16")
