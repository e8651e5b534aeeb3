"""`benchmarks/hardening/fork.py`: how it tells a child that ends well from one that does not."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks.hardening import fork

pytestmark = pytest.mark.serial


def forked(status: int | None) -> int:
    """A child that ends with a status, kills itself, or (``None``) never ends."""
    child = os.fork()
    if child:
        return child
    if status is None:
        signal.pause()
    elif status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status or 0)


@pytest.mark.parametrize(
    ("status", "found"),
    [(0, "ended with 0"), (3, "ended with 3"), (-9, "killed by signal 9"), (None, "hung for 0 s")],
)
def test_how_a_child_ended(status: int | None, found: str) -> None:
    assert fork._wait(forked(status), 0.3 if status is None else 20) == found


@pytest.mark.parametrize(
    ("status", "said", "well"),
    [
        (0, "ended with 0", True),
        (0, "refused: StateError ended with 0", True),
        (0, "hung for 60 s", False),
        (0, "ended with 0; the parent's answer changed", False),
        (-11, "ended with 0", False),
    ],
)
def test_both_processes_must_end_well(
    monkeypatch: pytest.MonkeyPatch, status: int, said: str, well: bool
) -> None:
    done = SimpleNamespace(returncode=status, stdout=said + "\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert fork.observe("onnxruntime", "nothing", Path("b"), 60)["well"] is well
