"""Tests of `sam3rt.bundle.files`: files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.helpers import label

from sam3rt.bundle import files as _files
from sam3rt.bundle.files import atomic_write, remove_temporaries

# It forks.
pytestmark = pytest.mark.serial

FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["unnamed", "named"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to write: Linux's files without a name, and hidden ones."""
    if request.param == "named":
        monkeypatch.setattr(_files, "_open_unnamed", lambda folder: None)
    return str(request.param)


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as stream:
        stream.write(content)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path, way: str) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert len(names(tmp_path)) == (way == "named")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    write(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert names(tmp_path) == ["a"]


def in_child(action: Callable[[], object], become: Callable[[], object]) -> str:
    """What an action raises in a process of its own, which first becomes something less able."""
    answer = FORK.Queue()

    def work() -> None:
        become()
        try:
            action()
            answer.put("nothing")
        except BaseException as error:
            answer.put(f"{type(error).__name__} {getattr(error, 'errno', 0)}")

    process = FORK.Process(target=work)
    process.start()
    said: str = answer.get(timeout=30)
    process.join(30)
    return said


def test_no_more_room(tmp_path: Path) -> None:
    """The system's own limit on the length of files stands in for a full disk."""
    write(tmp_path / "a", b"old")

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    said = in_child(lambda: write(tmp_path / "a", bytes(1_000_000)), small_files)
    assert said == f"OSError {errno.EFBIG}"
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_no_permission(mode: int) -> None:
    # Not below pytest's own folder, which nobody else may enter.
    with open_folder() as folder:
        write(folder / "a", b"old")
        folder.chmod(mode)

        def nobody() -> None:
            os.setgid(65534)
            os.setuid(65534)

        said = in_child(lambda: write(folder / "a", b"new"), nobody)
        assert said == f"PermissionError {errno.EACCES}"
        folder.chmod(0o755)
        assert names(folder) == ["a"]
        assert (folder / "a").read_bytes() == b"old"


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sam3rt-test-") as name:
        folder = Path(name) / "folder"
        folder.mkdir()
        Path(name).chmod(0o755)
        yield folder


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT]
)
def test_a_folder_that_cannot_be_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        write(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_an_error_while_writing_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{path}'")):  # noqa: SIM117
        with atomic_write(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"^mine$"), atomic_write(path):
        raise OSError("mine")
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write(path, b"new")
    assert str(caught.value).endswith(f"Is a directory: '{path}'")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=label)
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_step_that_fails_leaves_the_old_file(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    write(tmp_path / "a", b"old")
    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)):
        write(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write(tmp_path / "a", b"new")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_file_systems_without_unnamed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    write(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_systems_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS have no such flag."""
    monkeypatch.delattr(os, "O_TMPFILE")
    write(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_folder_that_vanishes_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    def vanish() -> None:
        with atomic_write(folder / "a") as stream:
            stream.write(b"x")
            for entry in folder.iterdir():
                entry.unlink()
            folder.rmdir()

    with pytest.raises(FileNotFoundError):
        vanish()


def write_forever(folder: Path, ready: Any) -> None:
    ready.set()
    number = 0
    while True:
        write(folder / "a", bytes([number % 256]) * 300_000)
        number += 1


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path, way: str) -> None:
    for attempt in range(12):
        ready = FORK.Event()
        process = FORK.Process(target=write_forever, args=(tmp_path, ready))
        process.start()
        assert ready.wait(30)
        process.join(0.003 * attempt)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        if (tmp_path / "a").exists():
            content = (tmp_path / "a").read_bytes()
            assert len(content) == 300_000
            assert len(set(content)) == 1
    assert (tmp_path / "a").exists()
    if way == "unnamed":
        # A file has a name of its own for the moment between getting it and losing it again. Chance
        # hits that moment now and then; files that had names all along would leave one each time.
        assert len(names(tmp_path)) <= 1 + 4


def test_temporaries_of_killed_writers_are_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"a.engine", ".lock", ".notes.tmp", f".{'0' * 31}.tmp", f"x.{'0' * 32}.tmp"}
    for name in others:
        (tmp_path / name).write_bytes(b"kept")
    monkeypatch.setattr(Path, "replace", lambda self, target: os.kill(os.getpid(), signal.SIGKILL))
    process = FORK.Process(target=_write, args=(tmp_path / "a.engine",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - others
    assert len(left) == 1
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others
    assert (tmp_path / "a.engine").read_bytes() == b"kept"


def _write(path: Path) -> None:
    with atomic_write(path) as stream:
        stream.write(b"new")
