"""The rule that chooses among engines: what fits, in which order, and what to say of the rest."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.helpers import tiny_bundle
from tests.unit.runtime.backends.tensorrt.test_sidecar import SIDECAR

from sam3rt.backends.tensorrt.engines import (
    RECIPE_ORDER,
    EngineFile,
    Gpu,
    Machine,
    candidates,
    choose,
    engine_path,
    find_engines,
    folder_name,
    sidecar_path,
    write_sidecar,
)
from sam3rt.bundle import Bundle, FileEntry
from sam3rt.errors import BackendError

L4 = Gpu("NVIDIA L4", "8.9")
MACHINE = Machine(L4, "tensorrt", "10.16.0", "580.65")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    manifest = tiny_bundle(tmp_path / "bundle")
    return Bundle(tmp_path / "bundle", manifest)


def add(bundle: Bundle, role: str, recipe: str = "fp32", **changes: Any) -> EngineFile:
    folder = folder_name(
        changes.get("gpu", L4), changes.get("targets", ()), "tensorrt", "10.16.0", recipe
    )
    path = engine_path(bundle.path, folder, role)
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


def test_folder_names_are_for_people() -> None:
    gpu = Gpu("NVIDIA GeForce RTX 4090", "8.9")
    assert (
        folder_name(gpu, (), "tensorrt", "10.16.0.72", "fp16")
        == "nvidia-geforce-rtx-4090-sm89-tensorrt-10.16.0.72-fp16"
    )
    assert (
        folder_name(None, ("8.6", "12.0"), "tensorrt-rtx", "1.7.1.116", "bf16")
        == "any-sm86-sm120-tensorrt-rtx-1.7.1.116-bf16"
    )
    assert "/" not in folder_name(Gpu("../A/B", "8.9"), (), "tensorrt", "1", "fp16")


def test_the_fastest_proven_set_is_chosen(bundle: Bundle) -> None:
    for recipe in reversed(RECIPE_ORDER):
        add_pair(bundle, recipe)
    assert choose(bundle, MACHINE).precision == RECIPE_ORDER[0]
    proven = [c for c in candidates(bundle, MACHINE) if c.proven]
    assert [c.precision for c in proven] == list(RECIPE_ORDER)


def test_proven_sets_come_before_faster_ones_that_are_not(bundle: Bundle) -> None:
    add_pair(bundle, "fp16", state="unproven")
    add_pair(bundle, "fp32")
    sets = candidates(bundle, MACHINE)
    assert [(c.precision, c.proven) for c in sets] == [
        ("fp32", True),
        ("fp16", False),
        ("fp16+fp32", False),
        ("fp32+fp16", False),
    ]


def test_engines_that_were_not_proven_together_are_not_proven(bundle: Bundle) -> None:
    add(bundle, "encoder", "fp16")
    add(bundle, "decoder", "fp32", paired_with="12" * 32)
    (only,) = candidates(bundle, MACHINE)
    assert (only.precision, only.proven) == ("fp16+fp32", False)


def test_ahead_of_time_engines_fit_their_targets_and_are_unproven(bundle: Bundle) -> None:
    add_pair(bundle, "fp16", gpu=None, targets=("8.6", "8.9"), state="unproven")
    (only,) = candidates(bundle, MACHINE)
    assert not only.proven
    other = dataclasses.replace(MACHINE, gpu=Gpu("NVIDIA B200", "10.0"))
    with pytest.raises(
        BackendError, match=r"targets are 8\.6, 8\.9, the compute capability here is 10\.0"
    ):
        choose(bundle, other)


def test_a_proof_on_another_kind_of_gpu_is_none_here(bundle: Bundle) -> None:
    add_pair(bundle, "fp16", gpu=Gpu("NVIDIA RTX 4000 Ada", "8.9"), targets=("8.9",))
    (only,) = candidates(bundle, MACHINE)
    assert not only.proven


def test_refused_engines_are_never_offered(bundle: Bundle) -> None:
    add_pair(bundle, "fp16", state="refused")
    add_pair(bundle, "fp32")
    assert [c.precision for c in candidates(bundle, MACHINE)] == ["fp32"]


def test_encoder_and_decoder_must_agree_on_the_features(bundle: Bundle) -> None:
    add(bundle, "encoder", "fp16", features_dtype="float16")
    add(bundle, "decoder", "fp32")
    with pytest.raises(
        BackendError, match=r"features_dtype is \['float16'\] for encoders and \['float32'\]"
    ):
        choose(bundle, MACHINE)
    add(bundle, "decoder", "fp16", features_dtype="float16")
    assert [c.precision for c in candidates(bundle, MACHINE)] == ["fp16"]


def test_imaging_engines_come_along(bundle: Bundle) -> None:
    add_pair(bundle, "fp16")
    assert choose(bundle, MACHINE).preprocess is None
    add(bundle, "preprocess", gpu=Gpu("NVIDIA A2", "8.6"))
    post = add(bundle, "postprocess")
    chosen = choose(bundle, MACHINE)
    assert chosen.preprocess is None
    assert chosen.postprocess == post


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": Gpu("NVIDIA A9", "8.9")}, "gpu.name is NVIDIA A9, here it is NVIDIA L4"),
        ({"gpu": Gpu("NVIDIA L4", "7.5")}, "gpu.compute_capability is 7.5, here it is 8.9"),
        ({"tensorrt_version": "10.3.0"}, "tensorrt_version is 10.3.0, here it is 10.16.0"),
        ({"bundle_fingerprint": "77" * 32}, "bundle_fingerprint is 7777777777777777..."),
        ({"state": "refused"}, "state is refused"),
        ({"backend": "tensorrt-rtx"}, "backend is tensorrt-rtx, here it is tensorrt"),
    ],
)
def test_the_field_that_differs_is_named(
    change: dict[str, Any], message: str, bundle: Bundle
) -> None:
    add_pair(bundle, "fp16", **change)
    with pytest.raises(BackendError) as caught:
        choose(bundle, MACHINE)
    text = str(caught.value)
    assert message in text
    assert f"sam3rt build {bundle.path} --backend tensorrt" in text
    # Only what differs is named.
    assert text.count("here it is") <= 1


def test_the_nearest_engine_is_the_one_explained(bundle: Bundle) -> None:
    add_pair(bundle, "fp16", gpu=Gpu("NVIDIA T4", "7.5"), tensorrt_version="9.0.0")
    add_pair(bundle, "fp32", tensorrt_version="10.3.0")
    with pytest.raises(BackendError, match=r"none of 2 encoder engines.*nearest.*10\.3\.0"):
        choose(bundle, MACHINE)


def test_a_cut_engine_does_not_fit(bundle: Bundle) -> None:
    encoder, _ = add_pair(bundle, "fp16")
    encoder.path.write_bytes(b"cut")
    with pytest.raises(BackendError, match=r"engine\.bytes is 12, here it is 3"):
        choose(bundle, MACHINE)


def test_no_engines_at_all(bundle: Bundle) -> None:
    assert find_engines(bundle) == ()
    with pytest.raises(BackendError, match=r"has no tensorrt encoder engine.*sam3rt build"):
        choose(bundle, MACHINE)


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


def test_a_build_at_work_is_passed_over_in_silence(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    place = bundle.path / "engines" / ".build-x1"
    place.mkdir(parents=True)
    (place / "encoder.engine").write_bytes(b"half")
    assert find_engines(bundle) == ()
    assert caplog.text == ""


def test_a_recipe_can_be_insisted_on(bundle: Bundle) -> None:
    for recipe in ("fp16", "fp32"):
        add_pair(bundle, recipe)
    assert choose(bundle, MACHINE, "fp32").precision == "fp32"
    assert choose(bundle, MACHINE, "fp32+fp16").precision == "fp32+fp16"
    with pytest.raises(BackendError, match="recipe is fp16, bf16 was asked for"):
        choose(bundle, MACHINE, "bf16")


def test_unknown_recipes_come_last(bundle: Bundle) -> None:
    add_pair(bundle, "experimental")
    add_pair(bundle, "fp32")
    assert choose(bundle, MACHINE).precision == "fp32"
