"""The table of backends: what it says is so."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from sam3rt.backends import BACKENDS
from sam3rt.backends.create import AUTO_ORDER
from sam3rt.backends.table import TABLE, BackendEntry, entry, nothing_installed

NOWHERE = BackendEntry("x", "a:b", ("json", "sam3rt_no_such.module"), "cpu")


def test_backends_are_those_of_the_table() -> None:
    assert tuple(found.name for found in TABLE) == BACKENDS
    for name in ("onnxruntime", "openvino"):
        module, _, function = entry(name).factory.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert {name for name, _ in AUTO_ORDER} == set(BACKENDS)


@pytest.mark.parametrize("found", TABLE, ids=lambda found: found.name)
def test_extras_exist_and_bring_the_modules(found: BackendEntry) -> None:
    required = [Requirement(text) for text in importlib.metadata.requires("sam3rt") or ()]
    names = {
        requirement.name
        for requirement in required
        if requirement.marker is not None and requirement.marker.evaluate({"extra": found.extra})
    }
    # Before it, Python's lock is kept while a thread waits for the GPU.
    floors = {str(r.specifier) for r in required if r.name == "cuda-python"}
    assert floors == {">=12.9.1"}
    packages = {"cuda.bindings": {"cuda-python"}, "onnxruntime": {"onnxruntime"}}
    for module in found.modules:
        assert names & packages.get(module, {module.replace("_", "-")})
    assert re.match(rf"pip install 'sam3rt\[{found.extra}\]'", found.hint)


def test_missing_modules_are_named_with_what_brings_them() -> None:
    assert NOWHERE.missing() == ("sam3rt_no_such.module",)
    problem = NOWHERE.problem()
    assert problem is not None
    assert problem.startswith("sam3rt_no_such.module cannot be imported (No module named")
    assert problem.endswith(": pip install 'sam3rt[cpu]'")
    assert entry("onnxruntime").missing() == ()
    assert entry("onnxruntime").problem() is None
    with pytest.raises(KeyError):
        entry("nothing")


def test_without_any_backend_the_first_hint_is_the_simplest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert nothing_installed() is None
    monkeypatch.setattr("sam3rt.backends.table._is_installed", lambda module: False)
    said = nothing_installed()
    assert said is not None
    assert said.startswith("no backend is installed: pip install 'sam3rt[cpu]'")
    assert "TensorRT" not in said


def test_asking_what_is_missing_imports_nothing() -> None:
    code = (
        "from sam3rt.backends.table import TABLE; import sys; "
        "[found.missing() for found in TABLE]; "
        "print([m for m in ('onnxruntime', 'openvino', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"[]\n"
