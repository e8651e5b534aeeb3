"""Tests of `sam3rt.backends.openvino.backend`, of its precisions and of remembered verdicts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from tests.support.helpers import edit_manifest, noise, tiny_bundle

from sam3rt import (
    BackendError,
    BundleError,
    ImageEmbedding,
    Prompts,
    SegmentationModel,
    VerificationError,
    load_model,
    open_bundle,
)
from sam3rt.accuracy import select
from sam3rt.accuracy.metrics import Measurement
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.backends import create
from sam3rt.backends.openvino import backend as backend_module
from sam3rt.backends.openvino.hidden_layers import split_hidden_layers
from sam3rt.cli import main

CLICK = Prompts(point_coords=[[30, 25]], point_labels=[1])
PROMPTS = {
    "click": CLICK,
    "nothing": Prompts(),
    "box and clicks": Prompts([[30, 25], [5, 5]], [1, 0], box=[3, 4, 60, 40]),
    "three boxes": Prompts(box=[[1, 2, 20, 18], [3, 4, 25, 15], [30, 20, 60, 45]]),
    "mask": Prompts([[30, 25]], [1], mask_input=np.linspace(-9, 9, 288 * 288).reshape(1, 288, 288)),
}
REDUCED = ["bf16", "bf16-encoder", "bf16-mixed"]
HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no BF16")
WRONG = Measurement("click", "masks", "least IoU", 0.5, 0.9, at_least=True)
RIGHT = Measurement("click", "masks", "least IoU", 0.999, 0.9, at_least=True)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A bundle that opens but whose graphs are not loaded."""
    tiny_bundle(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder for the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def ov_model(small_bundle: Path) -> SegmentationModel:
    """The small SAM 3 in OpenVINO, in FP32."""
    return load_model(small_bundle, backend="openvino", precision="fp32", check_files=False)


@pytest.fixture(scope="module")
def embedding(ov_model: SegmentationModel) -> ImageEmbedding:
    """An image of 50 x 70 pixels, encoded."""
    return ov_model.encode(noise(50, 70))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Decides what the gate measures of each recipe, and counts how often it is asked."""
    plan: dict[str, Any] = dict.fromkeys(REDUCED, RIGHT) | {"asked": []}

    def measure(runner: Any, manifest: Any, record: Any, limits: Any) -> Iterator[Measurement]:
        plan["asked"].append(runner.precision)
        yield plan[runner.precision]

    monkeypatch.setattr(select, "verify", measure)
    monkeypatch.setattr(backend_module, "_has_bf16", lambda core: True)
    return plan


def close(actual: NDArray[np.float32], expected: NDArray[np.float32], limit: float) -> None:
    """Assert that the largest difference is within a share of the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= limit * np.abs(expected).max()


# --- choosing it ----------------------------------------------------------------------------------


def test_auto_takes_openvino_on_a_cpu_where_it_is_installed(
    tiny: Path, auto_order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "AUTO_ORDER", auto_order)
    monkeypatch.setattr(backend_module, "_has_bf16", lambda core: False)
    assert load_model(tiny, device="cpu").backend.name == "openvino"
    assert auto_order.index(("openvino", "cpu")) < auto_order.index(("onnxruntime", "cpu"))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_other_devices_are_refused(tiny: Path, device: str) -> None:
    with pytest.raises(BackendError, match="runs on the CPU"):
        load_model(tiny, backend="openvino", device=device)


@pytest.mark.parametrize("precision", ["", "fp16", "FP32", "bf16-", "-unproven", "fp32-unproven"])
def test_unknown_precisions_are_refused(tiny: Path, precision: str) -> None:
    with pytest.raises(BackendError, match="bf16-encoder-unproven"):
        load_model(tiny, backend="openvino", precision=precision)


@pytest.mark.parametrize("prefix", ["ONEDNN", "DNNL"])
def test_fp32_that_would_be_rounded_is_refused(
    tiny: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("auto", "fp32"):
        monkeypatch.setenv(f"{prefix}_DEFAULT_FPMATH_MODE", "BF16")
        with pytest.raises(BackendError, match=rf"{prefix}_DEFAULT_FPMATH_MODE=BF16 .*unset it"):
            load_model(tiny, backend="openvino", precision=precision)
        monkeypatch.setenv(f"{prefix}_DEFAULT_FPMATH_MODE", "strict")
    assert load_model(tiny, backend="openvino", precision="fp32").backend.precision == "fp32"


def test_without_bf16_auto_is_fp32_and_bf16_is_refused(
    tiny_sam3: Path, monkeypatch: pytest.MonkeyPatch, judged: dict[str, Any]
) -> None:
    monkeypatch.setattr(backend_module, "_has_bf16", lambda core: False)
    assert load_model(tiny_sam3, backend="openvino", check_files=False).backend.precision == (
        "fp32"
    )
    for precision in ("bf16", "bf16-encoder", "bf16-unproven"):
        with pytest.raises(BackendError, match="no BF16"):
            load_model(tiny_sam3, backend="openvino", precision=precision, check_files=False)
    assert judged["asked"] == []


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_reach_the_graphs(
    tiny_sam3: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    made: list[Any] = []
    original = backend_module.CompiledGraph

    def spy(compiled: Any, loaded: Any) -> Any:
        made.append(compiled)
        return original(compiled, loaded)

    monkeypatch.setattr(backend_module, "CompiledGraph", spy)
    model = load_model(
        tiny_sam3, backend="openvino", precision="fp32", threads=threads, check_files=False
    )
    assert not made
    model.backend.prepare()
    model.backend.prepare()
    # The encoder, and the decoder's three parts.
    assert [graph.get_property("INFERENCE_NUM_THREADS") for graph in made] == [threads] * 4


# --- what it computes -----------------------------------------------------------------------------


def test_fp32_is_within_the_bundles_own_limits(ov_model: SegmentationModel) -> None:
    limits = ov_model.manifest.parity.limits
    record = load_record(ov_model.bundle)
    measured = verify(ov_model.backend, ov_model.manifest, record, limits)
    assert [m for m in measured if not m.passed] == []


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("multimask", [True, False])
def test_fp32_agrees_with_onnxruntime(
    ov_model: SegmentationModel,
    small_model: SegmentationModel,
    embedding: ImageEmbedding,
    name: str,
    multimask: bool,
) -> None:
    features = small_model.backend.upload(list(embedding.numpy().values()))
    theirs = ImageEmbedding(features, embedding.geometry, embedding.fingerprint, embedding.names)
    actual = ov_model.decode(embedding, PROMPTS[name], multimask)
    expected = small_model.decode(theirs, PROMPTS[name], multimask)
    close(actual.low_res_masks, expected.low_res_masks, 1e-3)
    close(actual.iou_predictions, expected.iou_predictions, 1e-3)
    assert actual.object_score_logits is not None
    assert expected.object_score_logits is not None
    close(actual.object_score_logits, expected.object_score_logits, 1e-3)


def test_the_bundled_model_agrees_with_onnxruntime(
    default_model: SegmentationModel, chelsea: NDArray[np.uint8]
) -> None:
    model = load_model(backend="openvino", precision="fp32", check_files=False)
    said, expected = (
        m.decode(m.encode(chelsea), Prompts([[225, 150]], [1])) for m in (model, default_model)
    )
    assert said.object_score_logits is None
    assert ((said.low_res_masks > 0) != (expected.low_res_masks > 0)).mean() < 2e-3


@needs_bf16
@pytest.mark.parametrize("recipe", REDUCED)
def test_bf16_is_near_fp32_and_float32_at_the_boundary(
    small_bundle: Path,
    embedding: ImageEmbedding,
    ov_model: SegmentationModel,
    tmp_path: Path,
    recipe: str,
) -> None:
    model = load_model(
        small_bundle, backend="openvino", precision=f"{recipe}-unproven", check_files=False
    )
    assert model.backend.precision == recipe
    mine = model.encode(noise(50, 70))
    for name, array in mine.numpy().items():
        close(array, embedding.numpy()[name], 0.05)
        assert not np.array_equal(array, embedding.numpy()[name])
    mine.save(tmp_path / "a.emb")
    again = ov_model.load_embedding(tmp_path / "a.emb")
    close(
        model.decode(mine, CLICK).low_res_masks,
        ov_model.decode(again, CLICK).low_res_masks,
        0.1,
    )


@needs_bf16
@pytest.mark.parametrize("tiles", [True, False])
def test_hidden_layers_come_in_parts_where_there_are_tiles(
    small_bundle: Path,
    embedding: ImageEmbedding,
    monkeypatch: pytest.MonkeyPatch,
    tiles: bool,
) -> None:
    counts: list[int] = []

    def count(model: Any, width: int, exact: re.Pattern[str]) -> int:
        counts.append(split_hidden_layers(model, width, exact))
        return counts[-1]

    monkeypatch.setattr(backend_module, "processor_has", lambda flag: tiles and flag == "amx_bf16")
    monkeypatch.setattr(backend_module, "split_hidden_layers", count)
    monkeypatch.setattr(backend_module, "_PART_WIDTH", 64)
    model = load_model(
        small_bundle, backend="openvino", precision="bf16-encoder-unproven", check_files=False
    )
    mine = model.encode(noise(50, 70))
    assert [n > 0 for n in counts] == [True] * tiles
    for name, array in mine.numpy().items():
        close(array, embedding.numpy()[name], 0.05)


# --- graphs that are not what the manifest says ---------------------------------------------------


def test_signature_other_than_the_manifests_is_refused(tiny_copy: Path) -> None:
    edit_manifest(tiny_copy, lambda d: d["decoder"]["inputs"][4].update(dtype="int32"))
    with pytest.raises(BundleError, match="the manifest says"):
        load_model(tiny_copy, backend="openvino", precision="fp32").backend.prepare()


# --- the gate -------------------------------------------------------------------------------------


def test_the_first_recipe_that_passes_is_used_and_remembered(
    tiny_copy: Path, judged: dict[str, Any], caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    judged["bf16"] = WRONG
    with caplog.at_level(logging.INFO, "sam3rt"):
        model = load_model(tiny_copy, backend="openvino", check_files=False)
        assert model.backend.precision == "bf16-encoder"
    assert (
        "bf16 fails the gate on this machine: click masks: least IoU 0.5, at least 0.9 allowed"
        in caplog.text
    )
    again = load_model(tiny_copy, backend="openvino", check_files=False)
    assert again.backend.precision == "bf16-encoder"
    assert judged["asked"] == ["bf16", "bf16-encoder"]
    names = sorted(
        path.name.rsplit("-", 1)[0] for path in (cache / "sam3rt" / "verdicts").iterdir()
    )
    assert names == ["openvino-bf16", "openvino-bf16-encoder"]
    open_bundle(tiny_copy)


def test_a_verdict_on_graphs_in_parts_is_not_one_on_whole_ones(
    tiny_copy: Path, judged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual machine may hide the tiles of a processor that has the same name elsewhere."""
    for tiles in (True, False, True):
        monkeypatch.setattr(backend_module, "processor_has", lambda flag, found=tiles: found)
        model = load_model(tiny_copy, backend="openvino", precision="bf16", check_files=False)
        assert model.backend.precision == "bf16"
    assert judged["asked"] == ["bf16", "bf16"]


def test_where_all_fail_auto_is_fp32_and_insisting_raises(
    tiny_copy: Path, judged: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    judged |= dict.fromkeys(REDUCED, WRONG)
    assert load_model(tiny_copy, backend="openvino", check_files=False).backend.precision == "fp32"
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"least IoU 0\.5, at least 0\.9"):
            load_model(tiny_copy, backend="openvino", precision="bf16", check_files=False)
    assert judged["asked"] == REDUCED
    unproven = load_model(
        tiny_copy, backend="openvino", precision="bf16-unproven", check_files=False
    )
    assert unproven.backend.precision == "bf16"
    assert "without proof" in caplog.text
    assert judged["asked"] == REDUCED


def test_where_the_feature_maps_fail_no_recipe_with_that_encoder_is_tried(
    tiny_copy: Path, judged: dict[str, Any]
) -> None:
    judged["bf16"] = Measurement("image 0", "features 0", "cosine", 0.5, 0.999, at_least=True)
    model = load_model(tiny_copy, backend="openvino", check_files=False)
    assert model.backend.precision == "bf16-mixed"
    assert judged["asked"] == ["bf16", "bf16-mixed"]


def test_auto_does_not_try_what_is_known_to_fail(judged: dict[str, Any]) -> None:
    assert load_model(backend="openvino", check_files=False).backend.precision == "fp32"
    assert judged["asked"] == []


@needs_bf16
def test_the_gate_really_runs_the_reduced_graphs(tiny_copy: Path, cache: Path) -> None:
    model = load_model(tiny_copy, backend="openvino", check_files=False)
    used = model.backend.precision
    figures = {
        path.name.rsplit("-", 1)[0]: json.loads(path.read_text())
        for path in (cache / "sam3rt" / "verdicts").iterdir()
    }
    cosine = figures["openvino-bf16"]["figures"]["features 2 cosine"]
    assert 0.99 < cosine < 1 - 1e-7
    assert figures["openvino-bf16"]["passed"] == (used == "bf16")


def test_info_tells_what_is_remembered(
    tiny_copy: Path, judged: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    judged["bf16"] = WRONG
    assert load_model(tiny_copy, backend="openvino", check_files=False).backend.precision
    assert main(["info", str(tiny_copy), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["packages"]["openvino"]
    assert said["openvino_recipes"]["bf16"].startswith("failed: click masks: least IoU 0.5")
    assert said["openvino_recipes"]["bf16-encoder"].startswith("passed")
