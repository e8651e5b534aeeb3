"""Tests of `sam3rt.accuracy.verdicts`: a remembered verdict is used whole, or as good as none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.support.helpers import tiny_bundle

from sam3rt import open_bundle
from sam3rt.accuracy import verdicts
from sam3rt.accuracy.verdicts import StoredVerdict, Subject, load_verdict, save_verdict
from sam3rt.bundle import Bundle

SUBJECT = Subject("openvino", "1.0", "a processor", "bf16")
VERDICT = StoredVerdict(True, "fine", {"masks mean IoU": 0.99, "broken": math.nan})


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle in a world whose cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_bundle(tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


def test_a_verdict_comes_back(bundle: Bundle) -> None:
    assert load_verdict(bundle, SUBJECT) is None
    path = save_verdict(bundle, SUBJECT, VERDICT)
    assert path is not None
    assert path.parent == bundle.path / "verdicts"
    loaded = load_verdict(bundle, SUBJECT)
    assert loaded is not None
    assert (loaded.passed, loaded.explanation) == (True, "fine")
    assert loaded.figures["masks mean IoU"] == 0.99
    assert math.isnan(loaded.figures["broken"])
    assert load_verdict(bundle, Subject("openvino", "1.1", "a processor", "bf16")) is None


@pytest.mark.parametrize(
    "change",
    [
        {"passed": 1},
        {"passed": None},
        {"explanation": []},
        {"figures": []},
        {"figures": None},
        {"figures": {"a": []}},
        {"figures": {"a": "x"}},
        {"figures": {"a": 10**400}},
        {"format": "sam3rt-verdict-2"},
        {"key": {}},
    ],
)
def test_a_damaged_verdict_is_as_good_as_none(bundle: Bundle, change: dict[str, Any]) -> None:
    path = save_verdict(bundle, SUBJECT, VERDICT)
    assert path is not None
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert load_verdict(bundle, SUBJECT) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, '{"format": 1e999}'])
def test_what_is_no_verdict_is_as_good_as_none(bundle: Bundle, text: str) -> None:
    path = save_verdict(bundle, SUBJECT, VERDICT)
    assert path is not None
    path.write_text(text)
    assert load_verdict(bundle, SUBJECT) is None


@pytest.mark.parametrize("target", ["outside", "verdicts"])
def test_a_bundle_does_not_choose_where_verdicts_are_written(
    bundle: Bundle, target: str, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    link = bundle.path / "verdicts"
    link.symlink_to(tmp_path / target if target == "outside" else link)
    path = save_verdict(bundle, SUBJECT, VERDICT)
    assert path is not None
    assert path.is_relative_to(verdicts._cache_folder())
    assert not list((tmp_path / "outside").iterdir())
    assert load_verdict(bundle, SUBJECT) is not None
