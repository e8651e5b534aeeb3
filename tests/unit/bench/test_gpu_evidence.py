"""Tests of `benchmarks.gpu_evidence`: nothing that is found is lost, whatever a section does."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gpu_evidence
from benchmarks.gpu_evidence import SECTIONS, Section, markdown
from benchmarks.gpu_sections.record import Record, plain


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    given = {"output": folder, "device": "cpu", "small": True, "only": [], "seconds": 100.0}
    return argparse.Namespace(**(given | changes))


def sections(folder: Path) -> Any:
    return json.loads((folder / "evidence.json").read_text())["sections"]


@pytest.mark.slow
def test_one_that_crashes_or_hangs_loses_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu_evidence,
        "SECTIONS",
        (
            Section("crashes", "machine:nothing", 60, needs_model=False),
            Section("hangs", "machine:versions", 0.2, needs_model=False),
            Section("works", "machine:versions", 60, needs_model=False),
        ),
    )
    gpu_evidence.run(options(tmp_path / "out"), tmp_path)
    found = sections(tmp_path / "out")
    assert found["crashes"]["state"] == "failed with status 1"
    assert "no attribute 'nothing'" in found["crashes"]["said"]
    assert found["hangs"]["state"].startswith("stopped after")
    assert found["works"]["state"] == "done"
    assert found["works"]["figures"]["versions"]["torch"]
    text = (tmp_path / "out" / "evidence.md").read_text()
    assert "## crashes" in text
    assert "no attribute 'nothing'" in text


def test_what_a_stopped_section_had_found_is_kept(tmp_path: Path) -> None:
    record = Record(tmp_path / "slow.json")
    record.put("first", {"median_ms": 1.23456789})
    record.attempt("second", lambda: 1 / 0)
    assert record.attempt("third", lambda: {"x": 1}) == {"x": 1}
    found = json.loads((tmp_path / "slow.json").read_text())
    assert found == {
        "first": {"median_ms": 1.2346},
        "second": {"failed": "ZeroDivisionError: division by zero"},
        "third": {"x": 1},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["slow.json"]


def test_without_time_or_model_sections_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_evidence, "SECTIONS", (Section("one", "machine:versions", 60),))
    # The model is not among what was chosen, and is nowhere.
    monkeypatch.setattr(gpu_evidence, "MODEL", Section("model", "machine:nothing", 60))
    gpu_evidence.run(options(tmp_path / "a"), tmp_path)
    assert sections(tmp_path / "a")["one"]["state"] == "left out: the model could not be made"
    assert sections(tmp_path / "a")["model"]["state"] == "failed with status 1"
    gpu_evidence.run(options(tmp_path / "b", seconds=1.0), tmp_path)
    assert sections(tmp_path / "b")["one"]["state"] == "left out: there was no time left"


@pytest.mark.parametrize("is_made", [True, False])
def test_what_was_not_measured_yet_comes_first(
    is_made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what needs no model runs while that is being made."""
    ran: list[str] = []

    class Noted:
        def __init__(self, section: Section, *_: Any) -> None:
            ran.append(section.name)
            (tmp_path / "bundle").mkdir(exist_ok=True)

        def finish(self) -> dict[str, Any]:
            return {"state": "done", "seconds": 0.0, "figures": {}}

    monkeypatch.setattr(gpu_evidence, "Run", Noted)
    if is_made:
        (tmp_path / "bundle").mkdir()
        (tmp_path / "checkpoint.pt").touch()
    gpu_evidence.run(options(tmp_path / "out", small=False), tmp_path)
    expected = list(SECTIONS) if is_made else sorted(SECTIONS, key=lambda s: s.needs_model)
    assert ran == ["model"] * (not is_made) + [section.name for section in expected]
    first = [section.name for section in expected if section.needs_model][:2]
    assert first == ["onnxruntime-fp16-activations", "kernel-table"]


def test_all_sections_have_names_of_their_own_and_fit_their_time() -> None:
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    # Limits are for what goes wrong; the whole has its own.
    assert all(section.seconds <= 120 for section in SECTIONS)


def test_tables_hold_rows_of_the_same_columns() -> None:
    document = {
        "command": "python -m x",
        "sections": {
            "s": {
                "state": "done",
                "seconds": 1.0,
                "figures": {
                    "plain": 3,
                    "a": {"median_ms": 1, "p95_ms": 2},
                    "b": {"median_ms": 3, "p95_ms": 4},
                    "c": {"|V|": "x|y"},
                    "rows": [{"what": "d", "TFLOP/s": 5}, {"what": "k<__half>", "TFLOP/s": 6}],
                },
            }
        },
    }
    lines = markdown(document).splitlines()
    assert "- plain: 3" in lines
    assert lines.count("| | median_ms | p95_ms |") == 1
    assert "| a | 1 | 2 |" in lines
    assert "| c | x\\|y |" in lines
    assert "| | \\|V\\| |" in lines
    assert "| d | 5 |" in lines
    assert "| `k<__half>` | 6 |" in lines


def test_figures_are_what_json_has() -> None:
    import numpy as np

    given = {"a": np.float32(1 / 3), "b": [np.int64(2), float("nan")], "c": np.bool_(True), 4: None}
    assert plain(given) == {"a": 0.33333, "b": [2, "nan"], "c": True, "4": "None"}


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(tiny_export / "sam3_tiny", work / "bundle")
    shutil.copy(tiny_export / "sam3_tiny.pt", work / "checkpoint.pt")
    command = ["x", "--output", str(tmp_path / "out"), "--device", "cpu", "--small"]
    monkeypatch.setattr(sys, "argv", [*command, "--work", str(work), "--seconds", "900"])
    gpu_evidence.main()
    found = sections(tmp_path / "out")
    states = {name: section["state"] for name, section in found.items()}
    # ONNX Runtime has no BF16 on the CPU.
    assert states.pop("onnxruntime-bf16") == "failed with status 1"
    assert set(states.values()) == {"done"}, states
    for recipe in ("fp16", "fp16-activations", "tf32", "fp32"):
        assert found[f"onnxruntime-{recipe}"]["figures"]["gate"]["passed"], recipe
    assert found["numerics"]["figures"]["fp16, FP32 sums"]["passes the gate"]
    for call in ("encode", "one click", "16 objects"):
        first, *others = found["kernel-table"]["figures"][call]
        assert first["what"] == "all"
        assert first["ms"] > max(row["ms"] for row in others) > 0
