"""The command line, run in this process."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
import pytest
from tests.conftest import PHOTOS

from sam3rt import SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.bundle.default import default_bundle_path
from sam3rt.cli import main
from sam3rt.cli.segment import _print_table

CHELSEA = str(PHOTOS / "chelsea.png")
CLICK = ("--point", "9,9")


def mask_of(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_segment_writes_what_the_predictor_says(
    tmp_path: Path, default_model: SegmentationModel, chelsea: np.ndarray, capsys
) -> None:
    output = tmp_path / "deep" / "out"
    assert main(["segment", CHELSEA, "--point", "225,150", "--output", str(output)]) == 0
    predictor = SAM3InteractiveImagePredictor(default_model)
    predictor.set_image(chelsea)
    masks, scores, _ = predictor.predict(point_coords=[[225, 150]], point_labels=[1])
    document = json.loads((output / "result.json").read_text())
    steps = ["read", "load", "encode", "predict", "write"]
    assert list(document["seconds"]) == [*steps, "total"]
    total = document["seconds"].pop("total")
    assert sum(document["seconds"].values()) == pytest.approx(total, abs=0.001)
    assert [m["file"] for m in document["masks"]] == ["mask_0.png", "mask_1.png", "mask_2.png"]
    for entry, index in zip(document["masks"], np.argsort(-scores), strict=True):
        written = mask_of(output / entry["file"])
        assert set(np.unique(written)) <= {0, 255}
        np.testing.assert_array_equal(written == 255, masks[index] > 0)
        assert entry["predicted_iou"] == pytest.approx(float(scores[index]), abs=1e-5)
        assert entry["area"] == int(masks[index].sum())
    with PIL.Image.open(output / "overlay.png") as overlay:
        assert overlay.size == (451, 300)
        assert not np.array_equal(np.asarray(overlay), chelsea)
    printed = capsys.readouterr()
    assert "0.9938" in printed.out
    assert printed.err == ""
    names = {"mask_0.png", "mask_1.png", "mask_2.png", "overlay.png", "result.json"}
    assert {path.name for path in output.iterdir()} == names


def test_segment_applies_exif_orientation(
    tmp_path: Path, tiny_sam3: Path, chelsea: np.ndarray
) -> None:
    turned = PIL.Image.fromarray(np.rot90(chelsea))
    exif = turned.getexif()
    exif[0x0112] = 6  # stored rotated by 90 degrees to the left
    turned.save(tmp_path / "turned.png", exif=exif)
    documents = []
    for name, image in (("upright", CHELSEA), ("turned", str(tmp_path / "turned.png"))):
        given = ["--point", "225,150", "--bundle", str(tiny_sam3), "--output", str(tmp_path / name)]
        assert main(["segment", image, *given]) == 0
        documents.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert (documents[1]["width"], documents[1]["height"]) == (451, 300)
    assert documents[1]["masks"] == documents[0]["masks"]
    overlays = [(tmp_path / name / "overlay.png").read_bytes() for name in ("upright", "turned")]
    assert overlays[0] == overlays[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--point", "1"],
        ["--point", "1,2,3"],
        ["--point", "nan,2"],
        ["--point", "a,b"],
        ["--box", "1,2,3"],
        ["--box", "30,2,3,40"],
        ["--threads", "0"],
        ["--threads", "x"],
        ["--max-pixels", "0"],
        ["--point", "-5,a"],
        ["--box", "-3,2"],
        ["--mask-threshold", "nan"],
        ["--max-hole-area", "inf"],
        ["--max-sprinkle-area", "x"],
        ["--pred-iou-thresh", "nan"],
        ["--bundle", ""],
        ["--prompts", ""],
    ],
)
def test_segment_refuses_malformed_arguments(arguments: list[str], tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["segment", CHELSEA, *arguments, "--output", str(tmp_path / "o")])
    assert stopped.value.code == 2
    problem, hint = capsys.readouterr().err.splitlines()
    assert problem.startswith(f"sam3rt segment: argument {arguments[0]}")
    assert "_int" not in problem
    assert hint == "try: sam3rt segment --help"
    assert not (tmp_path / "o").exists()


def test_without_arguments_there_is_help(capsys) -> None:
    assert main([]) == 2
    assert "sam3rt segment photo.jpg" in capsys.readouterr().err


def test_an_empty_path_is_not_the_folder_here(tmp_path: Path, monkeypatch, capsys) -> None:
    """A variable that is not set leaves one."""
    monkeypatch.chdir(tmp_path)
    Path("mine.png").write_bytes(Path(CHELSEA).read_bytes())
    assert main(["segment", "", *CLICK, "--output", "o"]) == 1
    assert "image: got an empty path" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["segment", "mine.png", *CLICK, "--output", ""])
    assert "--output: an empty path" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "16 bits"])
def test_segment_refuses_broken_images(kind: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "broken.png"
    whole = Path(CHELSEA).read_bytes()
    path.write_bytes({"text": b"no image", "cut": whole[: len(whole) // 2]}.get(kind, b""))
    if kind == "16 bits":
        PIL.Image.fromarray(np.full((20, 20), 4000, np.uint16)).save(path)
    assert main(["segment", str(path), "--point", "1,1", "--output", str(tmp_path / "o")]) == 1
    assert "broken.png" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "missing.png", *CLICK, "--output", "o"], "missing.png"),
        (["segment", CHELSEA, *CLICK, "--bundle", "missing", "--output", "o"], "no bundle folder"),
        (["segment", CHELSEA, *CLICK, "--device", "cuda", "--output", "o"], "cuda"),
        (["segment", CHELSEA, *CLICK, "--backend", "nothing", "--output", "o"], "onnxruntime"),
        (["verify", "missing"], "no bundle folder"),
        (["info", "missing"], "no bundle folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_everything_says_that_it_takes_long_and_shows_seconds(
    tiny_sam3: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    said: list[str] = []
    monkeypatch.setattr("sam3rt.cli.segment.progress_printer", lambda: said.append)
    given = ["segment", CHELSEA, "--everything", "--points-per-side", "2"]
    given += ["--bundle", str(tiny_sam3), "--backend", "onnxruntime", "--device", "cpu"]
    assert main([*given, "-o", str(tmp_path / "o")]) == 0
    (line,) = said
    assert line.startswith("asking for what is at 4 points")
    assert "encoded in" not in capsys.readouterr().out
    assert main([*given, "-o", str(tmp_path / "o"), "--quiet"]) == 0
    assert said == [line]


@pytest.mark.parametrize(("took", "shown"), [(0.25, "in 250 ms,"), (134.216, "in 134.22 s,")])
def test_times_are_shown_as_people_read_them(took: float, shown: str, capsys) -> None:
    options = argparse.Namespace(everything=True, no_overlay=True, output=Path("o"))
    _print_table([], options, {"read": 0.0, "load": 0.0, "predict": took, "write": 0.0})
    assert f"predicted {shown} written" in capsys.readouterr().out


# --- the output folder ----------------------------------------------------------------------------


class SegmentTo(Protocol):
    def __call__(self, output: Path, *arguments: str, image: str = CHELSEA) -> int: ...


@pytest.fixture
def segment_to(tiny_sam3: Path) -> SegmentTo:
    """Runs ``sam3rt segment`` with a click, on a model that takes no time."""

    def run(output: Path, *arguments: str, image: str = CHELSEA) -> int:
        given = ("--point", "225,150", "--bundle", str(tiny_sam3), *arguments)
        return main(["segment", image, *given, "--output", str(output)])

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_results_of_an_earlier_run_are_replaced_as_a_whole(
    segment_to: SegmentTo, tmp_path: Path
) -> None:
    assert segment_to(tmp_path) == 0
    (tmp_path / "notes.txt").write_text("mine")
    assert names(tmp_path) == {
        *("mask_0.png", "mask_1.png", "mask_2.png", "overlay.png", "result.json", "notes.txt")
    }
    assert segment_to(tmp_path, "--single-mask", "--no-overlay") == 0
    assert names(tmp_path) == {"mask_0.png", "result.json", "notes.txt"}
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["overlay"] is None
    assert [mask["file"] for mask in document["masks"]] == ["mask_0.png"]


@pytest.mark.parametrize("name", ["mask_0.png", "mask_7.png", "overlay.png", "result.json"])
def test_files_of_the_user_s_are_not_overwritten(
    segment_to: SegmentTo,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SegmentationModel, "encode", _never)
    (tmp_path / name).write_text("{}")
    assert segment_to(tmp_path) == 1
    assert f"{name} is not from an earlier run" in capsys.readouterr().err
    assert names(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "{}"


def test_results_without_their_list_are_nobody_s(
    segment_to: SegmentTo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment_to(tmp_path) == 0
    (tmp_path / "result.json").unlink()
    assert segment_to(tmp_path) == 1
    said = capsys.readouterr().err
    assert "whose mask_0.png is not from an earlier run (no result.json there lists it)" in said
    # What the user is told to do helps.
    left = said.strip().partition("this one without ")[2].split(", ")
    assert left == ["mask_0.png", "mask_1.png", "mask_2.png", "overlay.png"]
    for name in left:
        (tmp_path / name).unlink()
    assert segment_to(tmp_path) == 0


@pytest.mark.parametrize("link", ["none", "soft", "hard"])
def test_the_image_is_never_a_target(
    segment_to: SegmentTo, link: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert segment_to(output) == 0
    image = output / "overlay.png"
    if link == "soft":
        (tmp_path / "link.png").symlink_to(image)
        image = tmp_path / "link.png"
    elif link == "hard":
        (tmp_path / "link.png").hardlink_to(image)
        image = tmp_path / "link.png"
    before = {path: path.read_bytes() for path in output.iterdir()}
    capsys.readouterr()
    assert segment_to(output, image=str(image)) == 1
    assert "overlay.png is the image itself" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link"])
def test_a_bad_output_is_found_before_the_model_is_loaded(
    segment_to: SegmentTo,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sam3rt.cli.segment.load_from_options", _never)
    output = tmp_path / "out"
    if kind == "dangling link":
        output.symlink_to(tmp_path / "nowhere")
    else:
        output.write_text("a file")
    assert segment_to(output / "deep" if kind == "below a file" else output) == 1
    assert str(output) in capsys.readouterr().err
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_is_left_of_a_run_that_fails(
    segment_to: SegmentTo, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    output = tmp_path / "deep" / "out"
    if earlier:
        assert segment_to(output) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("sam3rt.results.draw_objects", _full_disk)
    assert segment_to(output, "--single-mask") == 1
    assert f"{output}: No space left on device\n" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ({"deep"} if earlier else set())


def _full_disk(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


# --- prompts that are hardly meant ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "neither --point nor --box"),
        (["--point", "2250,1500"], "far outside the image of 451 x 300"),
        (["--box", "500,400,600,500"], "far outside the image of 451 x 300"),
    ],
)
def test_prompts_that_are_hardly_meant_are_refused_before_the_image_is_encoded(
    prompts: list[str],
    message: str,
    tiny_sam3: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SegmentationModel, "encode", _never)
    given = [*prompts, "--bundle", str(tiny_sam3), "--output", str(tmp_path / "o")]
    assert main(["segment", CHELSEA, *given]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _never(*arguments: object) -> None:
    raise AssertionError("was called")


@pytest.mark.parametrize("separate", [True, False])
def test_coordinates_may_begin_with_a_minus_sign(
    separate: bool, tmp_path: Path, tiny_sam3: Path
) -> None:
    prompts = [("--point", "-5,10"), ("--box", "-3,-2.5,200,200")]
    given = [part for pair in prompts for part in (pair if separate else ("=".join(pair),))]
    given += ["--bundle", str(tiny_sam3), "--no-overlay", "--output", str(tmp_path / "o")]
    assert main(["segment", CHELSEA, *given]) == 0
    document = json.loads((tmp_path / "o" / "result.json").read_text())
    assert document["prompts"]["point_coords"] == [[-5, 10]]
    assert document["prompts"]["box"] == [-3, -2.5, 200, 200]


@pytest.mark.slow
def test_verify_passes_on_the_bundled_model(capsys) -> None:
    assert main(["verify", "--all"]) == 0
    printed = capsys.readouterr().out
    assert "files match" in printed
    assert "click_0 masks" in printed
    assert "off" not in printed


def test_verify_names_a_damaged_file(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(default_bundle_path(), folder)
    content = bytearray((folder / "decoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "decoder.onnx").write_bytes(content)
    assert main(["verify", str(folder)]) == 1
    assert "decoder.onnx" in capsys.readouterr().out
