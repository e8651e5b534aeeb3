"""The scripts under benchmarks/: each can be started, and says how in its first lines."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from benchmarks import report
from tests.conftest import ROOT

SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "benchmarks/hardening")
    for path in (ROOT / folder).glob("*.py")
    if path.stem != "report"
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_started(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(name)
    assert f"    python -m {name}" in (module.__doc__ or "")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    assert "--output" in capsys.readouterr().out


def test_every_script_that_a_document_names_exists() -> None:
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "NOTES.md", *(ROOT / "docs").glob("*.md")]
    named = {n for page in pages for n in re.findall(r"-m (benchmarks[.\w]+)", page.read_text())}
    assert len(named) > 10
    assert named <= {*SCRIPTS}


def test_what_is_published_names_command_machine_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "/somebody/bundles/sam3", "--threads", "2"])
    target = tmp_path / "new" / "a.json"
    report.publish(report.conditions("numpy") | {"figure": 1}, target)
    document = json.loads(target.read_text())
    assert document == json.loads(capsys.readouterr().out)
    assert document["command"].endswith(" sam3 --threads 2")
    assert "somebody" not in document["command"]
    assert {"processor", "cores", "platform"} <= set(document["machine"])
    assert {"python", "sam3rt", "numpy"} == set(document["versions"])
