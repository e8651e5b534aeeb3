"""Where a bundle is written: whole or not at all, and over nothing that is not to be replaced.

A stub writes the files, and says which export they are of by the bundle's export id.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.export_helpers import leftovers
from tests.support.helpers import tiny_bundle

from sam3rt.bundle import open_bundle
from sam3rt.errors import InvalidInputError
from sam3rt_export import ExportError, ExportOptions, export_bundle, exporter, transaction
from sam3rt_export.errors import CheckpointError

OLD, NEW = ExportOptions(name="0"), ExportOptions(name="1")
REPLACE = ExportOptions(name="1", overwrite=True)


@pytest.fixture
def during() -> list[Callable[[Path], None]]:
    """What is done in the middle of an export, when half of the files are written."""
    return []


@pytest.fixture
def stub(during: list[Callable[[Path], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a made-up bundle, by which a reader can tell exports of different names."""

    def write(_: Any, folder: Path, options: ExportOptions, say: Any) -> tuple[None, None]:
        tiny_bundle(folder / "made", seed=int(options.name or 0))
        for file in (folder / "made").iterdir():
            if file.name == "parity.npz":
                for action in during:
                    action(folder)
            file.rename(folder / file.name)
        (folder / "made").rmdir()
        return None, None

    monkeypatch.setattr(exporter, "_write_files", write)
    monkeypatch.setattr(exporter, "self_check", lambda *_: [])


def export(target: str | Path, options: ExportOptions = NEW) -> None:
    export_bundle("checkpoint", target, options)


def name_of(bundle: Path) -> str:
    """The name of the export that a bundle is of; it must be whole."""
    names = {hashlib.sha256(bytes([number])).hexdigest(): str(number) for number in range(3)}
    return names[open_bundle(bundle).manifest.export_id]


@pytest.fixture
def old(stub: None, tmp_path: Path) -> Path:
    """A bundle to be replaced, with an engine that was built for it."""
    path = tmp_path / "place" / "out"
    export(path, OLD)
    (path / "engines").mkdir()
    (path / "engines" / "engine.plan").write_text("old")
    return path


class Boom(Exception):
    """Stands for a fault nobody foresaw."""


FAULTS: list[tuple[BaseException, type[BaseException], str]] = [
    (Boom("x"), ExportError, "the export failed: Boom: x"),
    (MemoryError("x"), ExportError, "the export failed: MemoryError: x"),
    (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    (OSError(28, "No space left on device"), ExportError, "output: .*No space left"),
    (CheckpointError("x"), CheckpointError, "x"),
]


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("raised", "seen", "message"), FAULTS, ids=[type(fault).__name__ for fault, *_ in FAULTS]
)
@pytest.mark.parametrize("existing", ["nothing", "a bundle", "no parents"])
def test_a_fault_on_the_way_leaves_everything_as_it_was(
    during: list[Callable[[Path], None]],
    raised: BaseException,
    seen: type[BaseException],
    message: str,
    existing: str,
    tmp_path: Path,
) -> None:
    target = tmp_path / "a" / "b" / "out" if existing == "no parents" else tmp_path / "out"
    if existing == "a bundle":
        export(target, OLD)

    def fail(_: Path) -> None:
        raise raised

    during.append(fail)
    with pytest.raises(seen, match=message):
        export(target, REPLACE)
    assert leftovers(tmp_path) == (["out"] if existing == "a bundle" else [])
    if existing == "a bundle":
        assert name_of(target) == "0"


@pytest.mark.parametrize("kind", ["bundle", "folder", "file"])
def test_an_existing_output_is_refused_before_anything_is_read(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / ("bundle.json" if kind == "bundle" else "photo.jpg")).write_text("mine")
    before = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(ExportError, match="exists"):
        export(target)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == before


@pytest.mark.usefixtures("stub")
def test_a_new_bundle_is_readable_by_everyone(tmp_path: Path) -> None:
    export(tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_overwriting_replaces_the_whole_bundle(old: Path) -> None:
    export(old, REPLACE)
    assert leftovers(old.parent) == ["out"]
    assert "engines" not in leftovers(old)
    assert name_of(old) == "1"


@pytest.mark.usefixtures("stub")
def test_overwriting_nothing_is_fine(tmp_path: Path) -> None:
    export(tmp_path / "out", REPLACE)
    assert leftovers(tmp_path) == ["out"]


def test_what_an_interrupted_overwrite_left_is_no_obstacle(old: Path) -> None:
    shutil.copytree(old, old.with_name(".out.old"))
    export(old, REPLACE)
    assert leftovers(old.parent) == ["out"]
    assert name_of(old) == "1"


def test_the_old_bundle_comes_back_where_the_new_one_cannot_take_its_place(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange two names in one step."""
    monkeypatch.setattr(transaction, "_exchange", lambda first, second: False)
    rename = Path.rename

    def refuse_the_new_one(self: Path, target: Any) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(ExportError):
        export(old, REPLACE)
    assert leftovers(old.parent) == ["out"]
    assert name_of(old) == "0"


BAD_OUTPUTS: dict[str, tuple[str, type[Exception], str]] = {
    "nothing": ("", InvalidInputError, "output: got ''"),
    "a zero byte": ("a\0b", InvalidInputError, "output: got 'a"),
    "a loop of links": ("loop", ExportError, "output: .*loop"),
    "not UTF-8": (os.fsdecode(b"\xff"), ExportError, "output: .*not UTF-8"),
}


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("output", "error", "message"), BAD_OUTPUTS.values(), ids=list(BAD_OUTPUTS)
)
def test_an_output_that_can_be_none_is_refused(
    output: str,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(error, match=message):
        export(output)
    assert leftovers(tmp_path) == ["loop"]


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("argument", ["name", "license"])
@pytest.mark.parametrize("text", ["", "a\nb", "\x1b[31m", "\udcff"])
def test_texts_of_the_manifest_are_of_one_line(argument: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"^{argument}: got .* a text of one line"):
        export(tmp_path / "out", ExportOptions(**{argument: text}))
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("shape", [(4,), (9, 12), (9, 12, 4), (0, 12, 3)])
def test_what_is_no_image_is_not_compared_on(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^parity_images: got an array of shape"):
        export(tmp_path / "out", ExportOptions(parity_images=[np.zeros(shape, np.uint8)]))
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("colour", [(0, 0, 0), (3, 4, 5)])
def test_an_image_that_shows_no_mistakes_is_not_compared_on(
    colour: tuple[int, int, int], tmp_path: Path
) -> None:
    image = np.full((9, 12, 3), colour, np.uint8)
    with pytest.raises(InvalidInputError, match=r"^parity_images: got an image of one"):
        export(tmp_path / "out", ExportOptions(parity_images=[image]))
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwriting_replaces_bundles_and_nothing_else(kind: str, tmp_path: Path) -> None:
    """A mistyped output must not delete somebody's folder."""
    target = tmp_path / "photos"
    mine = target
    if kind == "folder":
        target.mkdir()
        mine = target / "holiday.jpg"
    mine.write_text("mine")
    with pytest.raises(ExportError):
        export(target, REPLACE)
    assert mine.read_text() == "mine"
    assert leftovers(tmp_path) == ["photos"]


def test_a_bundle_with_somebodys_own_file_is_not_replaced(old: Path) -> None:
    """Such as the checkpoint itself."""
    (old / "sam3.pt").write_text("mine")
    with pytest.raises(ExportError, match=r"is not overwritten: it holds 'sam3\.pt'"):
        export(old, REPLACE)
    assert (old / "sam3.pt").read_text() == "mine"
    assert name_of(old) == "0"


def test_overwriting_a_link_leaves_no_rubbish(old: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / "current"
    link.parent.mkdir()
    link.symlink_to(old, target_is_directory=True)
    export(link, REPLACE)
    assert leftovers(link.parent) == ["current"]
    assert link.is_symlink()
    assert name_of(old) == "1"


@pytest.mark.usefixtures("stub")
def test_parents_are_made_and_relative_paths_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    export("a/b/out")
    export("out")
    assert leftovers(tmp_path) == ["a", "out"]
    assert leftovers(tmp_path / "a" / "b") == ["out"]


@pytest.mark.usefixtures("stub")
def test_a_parent_that_cannot_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(ExportError, match="output"):
            export(output)

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(transaction.tempfile, "mkdtemp", refuse)
    with pytest.raises(ExportError, match=r"cannot be written.*Permission denied"):
        export(tmp_path / "out")
    assert leftovers(tmp_path) == ["file"]


def test_a_checkpoint_that_is_none_is_refused_without_a_trace(tmp_path: Path) -> None:
    for target in (tmp_path / "out", tmp_path / "a" / "b" / "out"):
        with pytest.raises(CheckpointError, match=r"missing\.pt"):
            export_bundle(tmp_path / "missing.pt", target)
        assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("stub")
def test_of_two_exports_to_one_place_the_first_wins(
    during: list[Callable[[Path], None]], tmp_path: Path
) -> None:
    """Whoever comes second must not overwrite unasked, however long ago it looked."""
    target = tmp_path / "out"
    during.append(lambda _: tiny_bundle(target, seed=2))
    with pytest.raises(ExportError, match="exists"):
        export(target)
    assert leftovers(tmp_path) == ["out"]
    assert name_of(target) == "2"
