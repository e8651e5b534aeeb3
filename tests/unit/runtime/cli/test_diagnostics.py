"""Logging, health, timing hooks and `sam3rt info`: what a service and a bug report need."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.helpers import noise, tiny_bundle, wrapped

import sam3rt
from sam3rt import BackendError, Prompts, SegmentationModel
from sam3rt.backends.base import timed
from sam3rt.cli import main

CLICK = Prompts(point_coords=[[5.0, 4.0]], point_labels=[1])

# --- logging --------------------------------------------------------------------------------------

IMPORT = """
import logging, sys
before = set(logging.root.manager.loggerDict)
records = []
class Catch(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.root.addHandler(Catch())
logging.root.setLevel(0)
handlers = len(logging.root.handlers)
import sam3rt, sam3rt.cli
assert not records, records
assert len(logging.root.handlers) == handlers
assert logging.root.level == 0
names = set(logging.root.manager.loggerDict) - before
ours = {n for n in names if n.split(".")[0] == "sam3rt"}
assert all(not logging.getLogger(n).handlers for n in ours), ours
libraries = "numpy PIL onnxruntime openvino torch tensorrt onnx transformers"
heavy = set(libraries.split()) & set(sys.modules)
assert not heavy, heavy
print("quiet")
"""


def test_importing_says_and_sets_up_nothing() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "quiet\n", "")


def test_everything_is_logged_under_sam3rt(
    tiny_sam3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(0):
        model = sam3rt.load_model(tiny_sam3, device="cpu")
        model.decode(model.encode(noise(9, 9)), CLICK)
    names = {record.name for record in caplog.records}
    assert names
    assert all(name.startswith("sam3rt.") for name in names)


# --- health ---------------------------------------------------------------------------------------


def test_a_right_model_is_healthy(default_model: SegmentationModel) -> None:
    start = time.perf_counter()
    health = default_model.health()
    seconds = time.perf_counter() - start
    assert health.healthy
    assert health.problem == ""
    assert (health.backend, health.device, health.precision) == ("onnxruntime", "cpu", "fp32")
    assert health.fingerprint == default_model.manifest.fingerprint
    assert health.encode_seconds > 0
    assert health.decode_seconds > 0
    # The click is decoded twice.
    assert health.encode_seconds + 2 * health.decode_seconds < seconds


def louder(maps: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    return [array * np.float32(1.5) for array in maps]


def negative(outputs: dict[str, NDArray[np.float32]]) -> None:
    for name in outputs:
        if name.endswith("masks"):
            outputs[name] *= -1


def broken(outputs: dict[str, NDArray[np.float32]]) -> None:
    outputs["iou_scores" if "iou_scores" in outputs else "single_iou_scores"][:] = np.nan


def failing(_: Any) -> Any:
    raise BackendError("out of memory")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"on_encode": louder}, "features"),
        ({"on_decode": negative}, "masks"),
        ({"on_decode": broken}, "IoU nan"),
        ({"on_encode": failing}, "BackendError: out of memory"),
        ({"on_decode": failing}, "BackendError: out of memory"),
    ],
)
def test_a_wrong_model_is_not_healthy(
    tiny_model: SegmentationModel, changes: dict[str, Any], said: str
) -> None:
    health = wrapped(tiny_model, **changes).health()
    assert not health.healthy
    assert said.split()[0] in health.problem


def test_a_model_without_its_record_is_not_healthy(tiny_copy: Path) -> None:
    model = sam3rt.load_model(tiny_copy, device="cpu")
    (tiny_copy / "parity.npz").unlink()
    health = model.health()
    assert not health.healthy
    assert "parity.npz" in health.problem


# --- timing hooks ---------------------------------------------------------------------------------


@pytest.fixture
def listened(tiny_model: SegmentationModel) -> SegmentationModel:
    """The tiny model with its own hook, over the same backend."""
    return SegmentationModel(tiny_model.bundle, tiny_model.backend)


def test_stages_are_told_in_order(listened: SegmentationModel) -> None:
    told: list[tuple[str, float]] = []
    listened.on_stage = lambda name, seconds: told.append((name, seconds))
    predictor = sam3rt.SAM3InteractiveImagePredictor(listened)
    predictor.set_image(noise(40, 60))
    predictor.predict(point_coords=[[30, 20]], point_labels=[1])
    names = ["preprocess", "encode", "pack prompts", "decode", "postprocess"]
    assert [name for name, _ in told] == names
    assert all(0 < seconds < 100 for _, seconds in told)
    listened.on_stage = None
    predictor.predict(point_coords=[[30, 20]], point_labels=[1])
    assert len(told) == len(names)


def test_a_stage_that_fails_is_not_told() -> None:
    told: list[str] = []

    def work() -> None:
        with timed("encode", lambda name, seconds: told.append(name)):
            raise BackendError("x")

    with pytest.raises(BackendError):
        work()
    assert told == []


def test_stages_are_told_on_the_callers_thread(listened: SegmentationModel) -> None:
    embedding = listened.encode(noise(9, 9))
    told: list[tuple[str, int]] = []
    listened.on_stage = lambda name, seconds: told.append((name, threading.get_ident()))
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(threading.get_ident).result()
        pool.submit(listened.decode, embedding, CLICK).result()
    assert told == [("pack prompts", thread), ("decode", thread)]


# --- what a bug report needs ----------------------------------------------------------------------


def test_info_has_what_a_bug_report_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["info", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["sam3rt"] == sam3rt.__version__
    assert Path(document["installed_at"]) == Path(sam3rt.__file__).resolve().parent
    machine = document["machine"]
    assert machine["python"] == sys.version.split()[0]
    assert 1 <= machine["usable_cores"] <= machine["cores"]
    assert machine["memory_gb"] > 0.1
    assert machine["processor"]
    assert document["environment"]["OMP_NUM_THREADS"] == "3"
    assert document["backends"]["onnxruntime"] == "can be imported"
    assert set(document["backends"]) == set(sam3rt.backends.BACKENDS)
    assert "CPUExecutionProvider" in document["onnxruntime_providers"]
    assert "numpy" in document["packages"]
    assert document["bundle"]["name"] == "mobile_sam"
    assert document["bundle"]["files"] == "match their hashes"


def test_info_is_text_that_says_things_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sam3rt.cli.info._VARIABLES", ())
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "environment: none" in lines
    assert "  source: mobile_sam.pt" in lines


def test_info_of_a_damaged_bundle_shows_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "encoder.onnx").write_bytes(b"x")
    assert main(["info", "--json", str(tmp_path / "bundle")]) == 0
    assert "encoder.onnx" in json.loads(capsys.readouterr().out)["bundle"]["files"]
    (tmp_path / "bundle" / "bundle.json").write_text("{")
    assert main(["info", "--json", str(tmp_path / "bundle")]) == 1
    document = json.loads(capsys.readouterr().out)
    assert "not valid JSON" in document["bundle"]["problem"]
    assert document["packages"]["numpy"] == np.__version__
