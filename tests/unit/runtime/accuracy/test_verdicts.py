"""Tests of `sam3rt.accuracy.verdicts`: a remembered verdict is used whole, or as good as none."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.helpers import tiny_bundle

from sam3rt import open_bundle
from sam3rt.accuracy import verdicts
from sam3rt.accuracy.verdicts import (
    StoredVerdict,
    Subject,
    load_verdict,
    save_verdict,
    verdict_folder,
)
from sam3rt.bundle import Bundle

SUBJECT = Subject("openvino", "1.0", "a processor", "bf16")
VERDICT = StoredVerdict(True, "fine", {"masks mean IoU": 0.99, "broken": math.nan})


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle in a world whose cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_bundle(tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("system", "environment", "folder"),
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache"),
        ("darwin", {}, "~/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
        ("win32", {}, "~/AppData/Local"),
    ],
)
def test_where_each_system_keeps_caches(
    system: str, environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert verdict_folder() == Path(folder).expanduser() / "sam3rt" / "verdicts"


def test_a_verdict_comes_back(bundle: Bundle, tmp_path: Path) -> None:
    assert load_verdict(bundle, SUBJECT) is None
    path = save_verdict(bundle, SUBJECT, VERDICT)
    assert path is not None
    assert path.parent == tmp_path / "cache" / "sam3rt" / "verdicts"
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
        {"encoder_failed": 0},
        {"figures": []},
        {"figures": None},
        {"figures": {"a": []}},
        {"figures": {"a": "x"}},
        {"figures": {"a": 10**400}},
        {"format": "sam3rt-verdict-1"},
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


@pytest.mark.parametrize("field", ["backend", "version", "processor", "precision", "files"])
def test_a_verdict_about_something_else_does_not_count(bundle: Bundle, field: str) -> None:
    save_verdict(bundle, SUBJECT, VERDICT)
    assert load_verdict(bundle, dataclasses.replace(SUBJECT, **{field: "other"})) is None


def test_a_verdict_of_another_version_of_this_package_does_not_count(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_verdict(bundle, SUBJECT, VERDICT)
    monkeypatch.setattr(verdicts, "__version__", "0.0.9")
    assert load_verdict(bundle, SUBJECT) is None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ONEDNN_MAX_CPU_ISA", ("AVX2", "AVX512_CORE")),
        ("DNNL_DEFAULT_FPMATH_MODE", ("BF16", "STRICT")),
        ("ORT_CUDA_GEMM_OPTIONS", ("1", "2")),
        ("ORT_DISABLE_FLASH_ATTENTION", ("1", "0")),
        ("NVIDIA_TF32_OVERRIDE", ("0", "1")),
    ],
)
def test_a_verdict_on_other_kernels_does_not_count(
    bundle: Bundle, name: str, values: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 that was proven while TF32 was switched off would serve unproven later."""
    for own, other in (values, values[::-1]):
        monkeypatch.setenv(name, own)
        save_verdict(bundle, SUBJECT, VERDICT)
        assert load_verdict(bundle, SUBJECT) is not None
        monkeypatch.delenv(name)
        assert load_verdict(bundle, SUBJECT) is None
        monkeypatch.setenv(name, other)
        assert load_verdict(bundle, SUBJECT) is None
        verdicts_made = verdict_folder()
        assert verdicts_made is not None
        for path in verdicts_made.iterdir():
            path.unlink()


def test_other_variables_do_not_matter(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    save_verdict(bundle, SUBJECT, VERDICT)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "another")
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    assert load_verdict(bundle, SUBJECT) is not None


def test_a_verdict_of_another_bundle_or_limit_does_not_count(
    bundle: Bundle, tmp_path: Path
) -> None:
    path = save_verdict(bundle, SUBJECT, VERDICT)
    assert path is not None
    tiny_bundle(tmp_path / "other", seed=1)
    assert load_verdict(open_bundle(tmp_path / "other"), SUBJECT) is None
    # Even under the name that is looked for.
    document = json.loads(path.read_text())
    document["key"]["limits"]["mask_iou"] = 0.0
    path.write_text(json.dumps(document))
    assert load_verdict(bundle, SUBJECT) is None


def test_what_comes_with_a_bundle_counts_for_nothing(bundle: Bundle, tmp_path: Path) -> None:
    path = save_verdict(bundle, SUBJECT, VERDICT)
    assert path is not None
    (bundle.path / "verdicts").mkdir()
    path.rename(bundle.path / "verdicts" / path.name)
    assert load_verdict(bundle, SUBJECT) is None


@pytest.mark.parametrize("kind", ["pipe", "link", "zeros", "folder", "large"])
def test_what_is_no_plain_small_file_is_not_read(bundle: Bundle, tmp_path: Path, kind: str) -> None:
    path = save_verdict(bundle, SUBJECT, VERDICT)
    assert path is not None
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(content + b" " * (1 << 20))
    assert load_verdict(bundle, SUBJECT) is None


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("reason", ["a file in the way", "no home folder"])
def test_where_nothing_can_be_written_this_process_remembers(
    reason: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "no home folder":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
        assert verdict_folder() is None
    else:
        (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    subject = dataclasses.replace(SUBJECT, version=reason)
    assert load_verdict(bundle, subject) is None
    assert save_verdict(bundle, subject, VERDICT) is None
    again = load_verdict(bundle, subject)
    assert again is not None
    assert again.passed
