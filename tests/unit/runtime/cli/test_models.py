"""`sam3rt models`, and names in place of folders on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.helpers import edit_manifest, tiny_bundle

from sam3rt.bundle.default import default_bundle_path
from sam3rt.cli import main


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("SAM3RT_HOME", raising=False)


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bundle(Path("engines/sam3"))
    tiny_bundle(Path("engines/torn"))
    edit_manifest(Path("engines/torn"), lambda document: document.update(name=3))
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["sam3"]["family"] == "sam3"
    assert rows["sam3"]["input"] == "1008x1008"
    assert "name" in rows["torn"]["problem"]
    assert rows["mobile_sam"]["path"] == str(default_bundle_path())
    assert rows["mobile_sam"]["megabytes"] == pytest.approx(23.6, abs=0.1)
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "sam3", "torn", "mobile_sam", "looked"]
    assert lines[1].split() == ["sam3", "sam3", "1008x1008", "0.0", "MB", "engines/sam3"]


def test_commands_take_names(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bundle(Path("engines/sam3"))
    assert main(["info", "sam3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"]["path"] == "engines/sam3"
    assert main(["info", "sam33"]) == 1
    assert "did you mean sam3?" in capsys.readouterr().err
