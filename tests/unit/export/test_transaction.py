"""Tests of `sam3rt_export.transaction`: whole or not at all, whoever dies meanwhile."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.export_helpers import leftovers

from sam3rt_export import transaction as module
from sam3rt_export.transaction import commit, new_folder, recover

# It forks.
pytestmark = pytest.mark.serial

FORK = multiprocessing.get_context("fork")


def write(target: Path, text: str, *, replace: bool = True) -> None:
    with new_folder(target) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)
        commit(folder, target, replace=replace)


def fail(target: Path, name: str) -> None:
    """Write one file, named as seen from the hidden folder, and fail."""
    with new_folder(target) as folder:
        (folder / name).write_text("x")
        raise KeyError(name)


def read(target: Path) -> set[str]:
    return {(target / name).read_text() for name in ("a", "b")}


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder."""
    if request.param == "two renames":
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    write(tmp_path / "x", "1")
    assert read(tmp_path / "x") == {"1"}
    write(tmp_path / "x", "2")
    assert read(tmp_path / "x") == {"2"}
    assert leftovers(tmp_path) == ["x"]


def test_linux_exchanges_names_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not module._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert [(tmp_path / name / "file").read_text() for name in "ab"] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        module._exchange(tmp_path / "a", tmp_path / "missing")


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    """Another process may have made the target after this one looked."""
    write(tmp_path / "x", "1")
    with pytest.raises(OSError, match="not empty"):
        write(tmp_path / "x", "2", replace=False)
    assert read(tmp_path / "x") == {"1"}
    assert leftovers(tmp_path) == ["x"]


@pytest.fixture
def _windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' rules: no locks of fcntl, no exchange, and no renaming onto what exists."""
    rename = os.rename

    def strict(source: str, target: str) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        rename(source, target)

    monkeypatch.setattr(module, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "rename", strict)


@pytest.mark.usefixtures("_windows")
def test_windows_rules_are_enough(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    write(target, "1")
    assert read(target) == {"1"}
    write(target, "2")
    assert read(target) == {"2"}
    with pytest.raises(OSError, match="not empty"):
        write(target, "3", replace=False)
    with pytest.raises(KeyError):
        fail(target, "a")
    assert read(target) == {"2"}
    target.rename(module._old(target))
    recover(target)
    assert read(target) == {"2"}
    assert leftovers(tmp_path) == ["x"]


@pytest.mark.parametrize("existing", ["nothing", "a parent", "an empty target"])
def test_an_exception_leaves_what_there_was(existing: str, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x"
    if existing == "a parent":
        (tmp_path / "a").mkdir()
    elif existing == "an empty target":
        target.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyError):
        fail(target, "half")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_parent_that_somebody_uses_by_now_stays(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x"
    with pytest.raises(KeyError):
        fail(target, "../theirs")
    assert leftovers(tmp_path / "new") == ["theirs"]


def stay(target: Path, ready: Any) -> None:
    with new_folder(target) as folder:
        (folder / "half").write_text("x")
        ready.set()
        time.sleep(60)


def started(target: Path) -> Any:
    """A process that stands in the middle of an export."""
    ready = FORK.Event()
    process = FORK.Process(target=stay, args=(target, ready))
    process.start()
    assert ready.wait(30)
    return process


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "x"
    kill(started(target))
    assert len(leftovers(tmp_path)) == 1
    write(target, "1")
    assert leftovers(tmp_path) == ["x"]


def test_what_a_living_process_does_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "x"
    process = started(target)
    try:
        before = leftovers(tmp_path)
        write(target, "1")
        assert leftovers(tmp_path) == sorted([*before, "x"])
    finally:
        kill(process)
    write(target, "2")
    assert leftovers(tmp_path) == ["x"]


def test_other_targets_leftovers_of_similar_names_stay_where_they_are_at_work(
    tmp_path: Path,
) -> None:
    process = started(tmp_path / "x.y")
    try:
        write(tmp_path / "x", "1")
        assert len(leftovers(tmp_path)) == 2
    finally:
        kill(process)


def test_what_was_moved_away_comes_back(tmp_path: Path) -> None:
    """A process that cannot exchange names may die between its two renames."""
    target = tmp_path / "x"
    write(target, "1")
    target.rename(tmp_path / ".x.old")
    recover(target)
    assert read(target) == {"1"}
    recover(target)
    assert leftovers(tmp_path) == ["x"]


def repeat(target: Path, text: str, count: int, replace: bool, outcomes: Any) -> None:
    won = 0
    for _ in range(count):
        try:
            write(target, text, replace=replace)
            won += 1
        except OSError:
            continue
    outcomes.put(won)


def race(work: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
    processes = [FORK.Process(target=work, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_of_two_that_make_the_same_one_wins(tmp_path: Path) -> None:
    for round_number in range(10):
        target = tmp_path / f"x{round_number}"
        outcomes = FORK.Queue()
        race(repeat, *((target, text, 1, False, outcomes) for text in "12"))
        assert sorted(outcomes.get(timeout=10) for _ in range(2)) == [0, 1]
        assert len(read(target)) == 1
    assert leftovers(tmp_path) == sorted(f"x{i}" for i in range(10))


def test_two_that_replace_the_same_never_mix(tmp_path: Path) -> None:
    target = tmp_path / "x"
    write(target, "0")
    outcomes = FORK.Queue()
    race(repeat, *((target, text, 30, True, outcomes) for text in "12"))
    assert sum(outcomes.get(timeout=10) for _ in range(2)) > 0
    assert len(read(target)) == 1
    assert leftovers(tmp_path) == ["x"]
