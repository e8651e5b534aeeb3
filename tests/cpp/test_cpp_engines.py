"""Which TensorRT engines the C++ runtime uses, beyond the vectors: links, wrappers, several pairs.

Nothing here runs an engine: that needs a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.cpp_driver import Build, Result
from tests.support.helpers import tiny_bundle
from tests.support.vectors import add_engine, load

from sam3rt.bundle import file_entry

FP16 = "nvidia-l4-sm89-tensorrt-10.3.0-fp16"
FP32 = "nvidia-l4-sm89-tensorrt-10.3.0-fp32"


class Engines:
    """A bundle to put engines into.

    Args:
        folder: where to make it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        tiny_bundle(folder)

    def add(self, name: str, role: str, **changes: Any) -> Path:
        """Add an engine with a sidecar that fits, but for the changes."""
        patch = [
            {"op": "replace", "path": f"/{field}", "value": value}
            for field, value in changes.items()
        ]
        return add_engine(self.path, name, role, patch)

    def pair(self, name: str, **changes: Any) -> None:
        """Add an encoder and a decoder proven with it."""
        self.add(name, "encoder", **changes)
        self.add(name, "decoder", **changes)

    def choose(self, build: Build, engine_folder: Path | str = "", backend: str = "") -> Result:
        """Let the C++ runtime choose for the machine of the vectors."""
        machine = load("engines")["machine"]
        return build.one(
            op="choose_engines",
            path=self.path,
            backend=backend or machine["backend"],
            gpu=machine["gpu"][0],
            compute_capability=machine["gpu"][1],
            engine_folder=engine_folder,
        )


@pytest.fixture
def engines(tmp_path: Path) -> Engines:
    """A bundle without engines."""
    return Engines(tmp_path / "bundle")


def test_the_only_pair_is_chosen(cpp_build: Build, engines: Engines) -> None:
    engines.pair(FP16, features_dtype="float16")
    folder = engines.path / "engines" / FP16
    assert engines.choose(cpp_build).value == {
        "encoder": str(folder / "encoder_ctx.onnx"),
        "decoder": str(folder / "decoder_ctx.onnx"),
        "features_dtype": "float16",
    }


def test_no_engines(cpp_build: Build, engines: Engines) -> None:
    message = engines.choose(cpp_build).refusal("BackendError")
    assert f"sam3rt build {engines.path} --backend tensorrt" in message
    engines.pair(FP16)
    message = engines.choose(cpp_build, backend="tensorrt-rtx").refusal("BackendError")
    assert "--backend tensorrt-rtx" in message


def test_unproven_engines(cpp_build: Build, engines: Engines) -> None:
    engines.pair(FP16, state="unproven")
    message = engines.choose(cpp_build).refusal("BackendError")
    assert f"sam3rt verify {engines.path} --backend tensorrt" in message
    # One that nobody has run anywhere, from an ahead-of-time build.
    engines.pair(FP16, state="unproven", gpu=None, targets=["8.9"])
    assert "sam3rt verify" in engines.choose(cpp_build).refusal("BackendError")
    engines.pair(FP16, state="refused")
    assert "sam3rt build" in engines.choose(cpp_build).refusal("BackendError")


def test_engines_proven_apart_from_each_other(cpp_build: Build, engines: Engines) -> None:
    engines.add(FP16, "encoder")
    engines.add(FP16, "decoder", paired_with="e" * 64)
    assert "sam3rt verify" in engines.choose(cpp_build).refusal("BackendError")
    engines.add(FP16, "decoder", features_dtype="float16")
    assert "sam3rt verify" in engines.choose(cpp_build).refusal("BackendError")
    engines.add(FP16, "decoder")
    assert engines.choose(cpp_build).error is None


def test_several_pairs(cpp_build: Build, engines: Engines) -> None:
    engines.pair(FP16)
    engines.pair(FP32)
    message = engines.choose(cpp_build).refusal("BackendError")
    assert FP16 in message
    assert FP32 in message
    assert "engine_folder" in message
    folder = engines.path / "engines" / FP32
    for name in (FP32, folder):
        chosen = engines.choose(cpp_build, name)
        assert chosen.value["encoder"] == str(folder / "encoder_ctx.onnx")
        assert chosen.value["decoder"] == str(folder / "decoder_ctx.onnx")
    for wrong in ("nowhere", engines.path):
        assert FP16 in engines.choose(cpp_build, wrong).refusal("BackendError")


def test_encoder_and_decoder_of_two_folders(cpp_build: Build, engines: Engines) -> None:
    encoder = engines.add(FP16, "encoder")
    engines.add(FP32, "decoder", paired_with=file_entry(encoder).sha256)
    for folder in ("", FP16, FP32):
        chosen = engines.choose(cpp_build, folder).value
        assert FP16 in chosen["encoder"]
        assert FP32 in chosen["decoder"]


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_changed_engine(cpp_build: Build, engines: Engines, role: str) -> None:
    engines.pair(FP16)
    engine = engines.path / "engines" / FP16 / f"{role}.engine"
    content = engine.read_bytes()
    for damaged in (content[:-1], content[:-1] + b"x"):
        engine.write_bytes(damaged)
        engines.choose(cpp_build).refusal("BundleError", f"{role}.engine")
    engine.unlink()
    engines.choose(cpp_build).refusal("BundleError", f"{role}.engine")
    (engines.path / "outside").write_bytes(content)
    engine.symlink_to(engines.path / "outside")
    assert "link" in engines.choose(cpp_build).refusal("BundleError", f"{role}.engine")


@pytest.mark.parametrize("linked", ["engines", f"engines/{FP16}", "engines/{}/encoder.engine.json"])
def test_engines_behind_a_link_that_leaves_the_bundle_are_passed_over(
    cpp_build: Build, engines: Engines, tmp_path: Path, linked: str
) -> None:
    engines.pair(FP16)
    assert FP16 in engines.choose(cpp_build).value["encoder"]
    inside = engines.path / linked.format(FP16)
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert "sam3rt build" in engines.choose(cpp_build).refusal("BackendError")


def test_engines_behind_a_link_inside_the_bundle_are_used(
    cpp_build: Build, engines: Engines
) -> None:
    engines.pair(FP16)
    folder = engines.path / "engines" / FP16
    folder.rename(engines.path / "kept")
    folder.symlink_to(engines.path / "kept")
    assert FP16 in engines.choose(cpp_build).value["encoder"]


def test_missing_wrapper(cpp_build: Build, engines: Engines) -> None:
    engines.pair(FP16)
    wrapper = engines.path / "engines" / FP16 / "decoder_ctx.onnx"
    wrapper.unlink()
    engines.choose(cpp_build).refusal("BundleError", "decoder_ctx.onnx")
    wrapper.symlink_to("encoder_ctx.onnx")
    engines.choose(cpp_build).refusal("BundleError", "decoder_ctx.onnx")
