"""`sam3rt segment` on many images: formats, prompts.jsonl, failures, going on where it stopped."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pycocotools.coco import COCO
from tests.support.helpers import edit_manifest, noise
from tests.support.runnable_bundle import runnable_bundle

import sam3rt
from sam3rt import Segmentation, SegmentationModel
from sam3rt.cli import folder as folder_module
from sam3rt.cli import main
from sam3rt.cli.folder import Journal
from sam3rt.image_files import read_image
from sam3rt.masks.polygons import joined

CLICK = ("--point", "9,9")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few nodes that says IoUs."""
    path = tmp_path_factory.mktemp("folder") / "bundle"
    runnable_bundle(path)
    edit_manifest(path, lambda document: document.update(model_type="mobile_sam"))
    return path


@pytest.fixture(scope="module")
def model(bundle: Path) -> SegmentationModel:
    return sam3rt.load_model(bundle, backend="onnxruntime", device="cpu")


@pytest.fixture
def imgs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``imgs`` of the working folder, with three pictures and a hidden file."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "imgs"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "deep/c.PNG")):
        PIL.Image.fromarray(noise(30 + number, 40, number)).save(folder / name)
    (folder / ".hidden.png").write_bytes(b"nothing")
    return Path("imgs")


@pytest.fixture
def segment(bundle: Path) -> Any:
    """Runs ``sam3rt segment`` with the small bundle."""

    def run(*arguments: str) -> int:
        model = ("--bundle", str(bundle), "--backend", "onnxruntime", "--device", "cpu")
        return main(["segment", *arguments, *model])

    return run


def write_prompts(path: str, *lines: dict[str, Any] | str) -> str:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(path).write_text("\n".join(text) + "\n")
    return path


def files(folder: Path | str) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def classes_in(labels: str) -> str:
    return "".join(line[0] for line in Path(labels).read_text().splitlines())


def found(model: SegmentationModel, path: Path, *prompts: Any, **options: Any) -> Segmentation:
    return model.segment_image(read_image(path), *prompts, **options)


# --- formats --------------------------------------------------------------------------------------


def test_png_is_a_folder_for_each_image(imgs: Path, segment: Any, model: Any, capsys: Any) -> None:
    assert segment("imgs", *CLICK, "-o", "out") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("3 images segmented")
    assert printed.err == ""
    names = ("mask_0.png", "mask_1.png", "mask_2.png", "overlay.png", "result.json")
    expected = {f"{n}/{f}" for n in ("a", "b", "deep/c") for f in names}
    assert set(files("out")) == expected | {"results.jsonl"}
    for name in ("a.png", "deep/c.PNG"):
        result = found(model, imgs / name, [9, 9])
        target = Path("out", name).with_suffix("")
        document = json.loads((target / "result.json").read_text())
        assert document["image"] == str(imgs / name)
        assert [m["area"] for m in document["masks"]] == result.area.tolist()
        for index, mask in enumerate(result.masks):
            with PIL.Image.open(target / f"mask_{index}.png") as picture:
                np.testing.assert_array_equal(np.asarray(picture) == 255, mask)


def test_coco_is_one_document_that_pycocotools_loads(
    imgs: Path, segment: Any, model: Any, capsys: Any
) -> None:
    lines = (
        {"image": "b.png", "points": [[9, 9], [20, 3]], "labels": [1, 0], "name": "cat"},
        {"image": "deep/c.PNG", "box": [3, 4, 20, 25], "name": "dog"},
        {"image": "b.png", "box": [1, 2, 30, 20], "points": [[5, 5]], "name": "dog"},
    )
    prompts = write_prompts("p.jsonl", *lines)
    assert segment("imgs", "--prompts", prompts, "--format", "coco", "-o", "out") == 0
    assert "images without a line in p.jsonl: 1" in capsys.readouterr().err
    assert files("out") == ["annotations.json", "results.jsonl"]
    dataset = COCO("out/annotations.json")
    assert [c["name"] for c in dataset.loadCats(dataset.getCatIds())] == ["cat", "dog"]
    by_name = {i["file_name"]: i for i in dataset.loadImgs(dataset.getImgIds())}
    assert set(by_name) == {"imgs/b.png", "imgs/deep/c.PNG"}
    results = {
        ("imgs/b.png", 1): found(model, imgs / "b.png", [[9, 9], [20, 3]], [1, 0]).best,
        ("imgs/b.png", 2): found(model, imgs / "b.png", [5, 5], 1, [1, 2, 30, 20]).best,
        ("imgs/deep/c.PNG", 2): found(model, imgs / "deep/c.PNG", boxes=[3, 4, 20, 25]).best,
    }
    annotations = dataset.loadAnns(dataset.getAnnIds())
    assert [a["id"] for a in annotations] == [1, 2, 3]
    for annotation in annotations:
        (image,) = dataset.loadImgs(annotation["image_id"])
        result = results.pop((image["file_name"], annotation["category_id"]))
        np.testing.assert_array_equal(dataset.annToMask(annotation), result.masks[0])
        assert annotation["score"] == pytest.approx(float(result.confidence[0]), abs=1e-6)
    assert not results


def test_yolo_is_a_text_for_each_image(imgs: Path, segment: Any, model: Any) -> None:
    prompts = write_prompts(
        "p.jsonl",
        {"image": "a.png", "points": [[9, 9]]},
        {"image": "a.png", "points": [[30, 20]], "name": "cat"},
        {"image": "deep/c.PNG", "points": [[9, 9]], "name": "cat"},
    )
    assert segment("imgs", "--prompts", prompts, "--format", "yolo", "-o", "out") == 0
    assert files("out") == ["classes.txt", "labels/a.txt", "labels/deep/c.txt", "results.jsonl"]
    assert Path("out/classes.txt").read_text() == "object\ncat\n"
    lines = Path("out/labels/a.txt").read_text().splitlines()
    expected = [found(model, imgs / "a.png", point).best for point in ([9, 9], [30, 20])]
    assert [line.split()[0] for line in lines] == ["0", "1"]
    for line, result in zip(lines, expected, strict=True):
        shares = np.array(line.split()[1:], float).reshape(-1, 2)
        ring = joined(result.polygons(1.0, holes=True)[0])
        np.testing.assert_allclose(shares * [40, 30], ring, atol=1e-4)
        assert ((shares >= 0) & (shares <= 1)).all()


def test_labelme_is_a_document_beside_each_image_if_wanted(
    imgs: Path, segment: Any, model: Any
) -> None:
    (imgs / "b.json").write_text("{}")
    assert segment("imgs", *CLICK, "--format", "labelme", "-o", "imgs") == 1
    assert (imgs / "b.json").read_text() == "{}"
    for name in ("a.json", "deep/c.json"):
        document = json.loads((imgs / name).read_text())
        image = (imgs / name).parent / document["imagePath"]
        with PIL.Image.open(image) as picture:
            assert picture.size == (document["imageWidth"], document["imageHeight"])
        rings = found(model, image, [9, 9]).best.polygons(1.0)[0]
        assert [shape["points"] for shape in document["shapes"]] == [r.tolist() for r in rings]
        assert {shape["label"] for shape in document["shapes"]} == {"object"}


# --- which images ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["imgs/a.png", "imgs/b.png"], {"a", "b"}),
        (["imgs/*.png"], {"a", "b"}),
        (["imgs/**/*.[pP][nN][gG]"], {"a", "b", "deep/c"}),
        (["imgs/deep", "imgs/a.png"], {"c", "a"}),
        (["imgs/**/*"], {"a", "b", "deep/c"}),
    ],
)
def test_files_folders_and_patterns(
    arguments: list[str], expected: set[str], imgs: Path, segment: Any
) -> None:
    assert segment("imgs/a.png", *CLICK, "-o", "imgs/masks") == 0
    assert segment(*arguments, *CLICK, "--format", "labelme", "-o", "out") == 0
    assert {name[:-5] for name in files("out") if name.endswith(".json")} == expected


def test_what_is_passed_over_is_said(imgs: Path, segment: Any, capsys: Any) -> None:
    for name in ("a.HEIC", "b.heic", "notes.txt", "README"):
        (imgs / name).write_text("mine")
    (imgs / "deep" / "round").symlink_to("..")
    (imgs / ".git").mkdir()
    (imgs / ".git" / "x.py").write_text("")
    assert segment("imgs", *CLICK, "-o", "imgs/out") == 0
    said = ".heic (2), .txt (1), links to folders (1), without a suffix (1)"
    assert capsys.readouterr().err == f"passed over: {said}\n"
    Path("none").mkdir()
    Path("none", "c.heic").write_text("mine")
    assert segment("none", *CLICK, "-o", "out") == 1
    assert "got none, with nothing but .heic (1), expected" in capsys.readouterr().err


@pytest.mark.parametrize("images", ["imgs", "imgs/*"])
def test_what_cannot_be_read_fails(
    images: str, imgs: Path, segment: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(imgs / "pipe.png")
    (imgs / "lost.png").symlink_to("nowhere.png")
    (imgs / "round.png").symlink_to("round.png")
    scandir = os.scandir

    def forbidding(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert segment(images, *CLICK, "--format", "coco", "-o", "imgs/out") == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("2 images segmented")
    assert [line.removeprefix("sam3rt segment: failed: ") for line in printed.err.splitlines()] == [
        *["imgs/deep: Permission denied"] * (images == "imgs"),
        "imgs/lost.png: No such file or directory",
        "imgs/round.png: Too many levels of symbolic links",
        "imgs/pipe.png: got a pipe, expected a file",
    ]
    prompts = write_prompts("p.jsonl", {"image": "a.png", "points": [[9, 9]]})
    assert segment(images, "--prompts", prompts, "--format", "coco", "-o", "imgs/out") <= 1
    assert "done before" in capsys.readouterr().out


def test_results_within_the_images_are_no_images(imgs: Path, segment: Any, capsys: Any) -> None:
    for said, output in (("3 images", "out"), ("0 images", "out"), ("3 images", "other")):
        assert segment("imgs", *CLICK, "-o", f"imgs/{output}") == 0
        assert capsys.readouterr().out.startswith(said)


def test_masks_do_not_go_where_images_are_read(imgs: Path, segment: Any, capsys: Any) -> None:
    assert segment("imgs", *CLICK, "-o", "imgs") == 1
    assert "the images' own folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["https://example.org/cat.jpg"], "curl -L URL | sam3rt segment -"),
        (["nothing/*.png"], "nothing/*.png"),
        (["empty"], "empty"),
        ([], "image files, folders or patterns"),
        (["-", "imgs"], "- alone"),
        (["imgs", "imgs/deep/../a.png"], "names differ before the suffix"),
    ],
)
def test_what_is_no_image_is_refused_before_the_model_is_loaded(
    arguments: list[str], said: str, imgs: Path, segment: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sam3rt.cli.segment.load_from_options", _never)
    Path("empty").mkdir()
    assert segment(*arguments, *CLICK, "-o", "out") == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not Path("out").exists()


def _never(*arguments: object) -> None:
    raise AssertionError("was called")


def test_an_image_may_come_from_standard_input(
    imgs: Path, segment: Any, model: Any, monkeypatch: Any
) -> None:
    content = io.BytesIO((imgs / "a.png").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    assert segment("-", *CLICK, "-o", "out") == 0
    document = json.loads(Path("out/result.json").read_text())
    assert [m["area"] for m in document["masks"]] == found(
        model, imgs / "a.png", [9, 9]
    ).area.tolist()


# --- prompts.jsonl --------------------------------------------------------------------------------


def test_prompts_name_images_beside_themselves_and_may_come_by_a_pipe(
    imgs: Path, segment: Any, monkeypatch: Any, capsys: Any
) -> None:
    line = {"image": "deep/c.PNG", "points": [[9, 9]]}
    write_prompts("imgs/p.jsonl", line, "", {**line, "image": "gone.png"})
    assert segment("--prompts", "imgs/p.jsonl", "--format", "labelme", "-o", "out") == 1
    assert "failed: gone.png: not found in imgs" in capsys.readouterr().err
    assert files("out") == ["deep/c.json", "results.jsonl"]
    # Names as results.jsonl has them are found too.
    again = write_prompts("again.jsonl", {**line, "image": "imgs/deep/c.PNG"})
    assert segment("imgs", "--prompts", again, "--format", "labelme", "-o", "out") == 0
    assert files("out") == ["deep/c.json", "results.jsonl"]
    # One image by three names is one, whose objects stay in order.
    same = ["imgs/b.png", "a.png", "./b.png", "deep/../b.png"]
    points = [[[9, 9]], [[5, 5]], [[20, 20]], [[30, 3]]]
    lines = [{"image": name, "points": p} for name, p in zip(same, points, strict=True)]
    for number, named in enumerate(([], ["imgs"])):
        prompts = write_prompts("imgs/p.jsonl", *lines)
        assert segment(*named, "--prompts", prompts, "-o", f"same{number}") == 0
        (result,) = Path(f"same{number}").glob("**/b/result.json")
        asked = json.loads(result.read_text())["prompts"]
        assert [call["point_coords"] for call in asked] == [points[0], points[2], points[3]]
    Path("imgs/photo").write_bytes(Path("imgs/b.png").read_bytes())
    prompts = write_prompts("imgs/p.jsonl", *lines, {**line, "image": "photo"})
    capsys.readouterr()
    assert segment("imgs", "--prompts", prompts, "-o", "some") == 0
    said = "images with a line in imgs/p.jsonl that are not among those given: 1"
    assert said in capsys.readouterr().err.splitlines()
    piped = io.StringIO(json.dumps({**line, "image": "imgs/b.png"}))
    monkeypatch.setattr(sys, "stdin", piped)
    assert segment("--prompts", "-", "--format", "labelme", "-o", "piped") == 0
    assert files("piped") == ["imgs/b.json", "results.jsonl"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"image": "a.png", "pionts": [[1, 1]]}, "line 2: the key 'pionts'"),
        ({"image": "a.png", "pionts": [[1, 1]]}, "did you mean 'points'?"),
        ({"image": "a.png", "zzz": 1}, "'zzz', expected image, points, labels, box, name"),
        ({"points": [[1, 1]]}, "image"),
        ({"image": "a.png"}, 'no prompt, expected "points" or "box"'),
        ({"image": "a.png", "points": [1, 1]}, "points"),
        ({"image": "a.png", "points": [[1, 1]], "labels": [1, 0]}, "2 labels for 1 points"),
        ({"image": "a.png", "points": [[1, 1]], "labels": [2]}, "2 - at `$.labels[0]`"),
        ({"image": "a.png", "box": [1, 1, 2]}, "box"),
        ({"image": "a.png", "points": [[1, 1]], "name": "two\nlines"}, r"the name 'two\nlines'"),
        ({"image": "a.png", "points": [[1, 1]], "name": "\u2028"}, "one line of text"),
        ({"image": "a.png", "points": [[1, 1]], "name": ""}, "the name ''"),
        ({"image": "a.png", "points": [[1, 1]], "name": "\ud800"}, "one line of text"),
        ("not JSON", "line 2"),
        ("[1]", "line 2"),
    ],
)
def test_a_wrong_line_is_named(line: Any, said: str, imgs: Path, segment: Any, capsys: Any) -> None:
    prompts = write_prompts("p.jsonl", {"image": "a.png", "points": [[1, 1]]}, line)
    assert segment("imgs", "--prompts", prompts, "-o", "out") == 1
    error = capsys.readouterr().err
    assert said in error
    assert "p.jsonl, line 2" in error
    assert not Path("out").exists()


def test_a_wrong_prompt_fails_its_image_alone(imgs: Path, segment: Any, capsys: Any) -> None:
    prompts = write_prompts(
        "p.jsonl",
        {"image": "a.png", "points": [[4000, 4000]]},
        {"image": "b.png", "points": [[1, 1]]},
    )
    assert segment("imgs", "--prompts", prompts, "-o", "out") == 1
    assert (
        "failed: imgs/a.png: prompts: got a point at (4000, 4000) pixels" in capsys.readouterr().err
    )
    assert Path("out/b/result.json").exists()


# --- failures and going on ------------------------------------------------------------------------


def test_failures_are_listed_at_the_end_and_tried_again(
    imgs: Path, segment: Any, capsys: Any
) -> None:
    whole = (imgs / "b.png").read_bytes()
    (imgs / "b.png").write_bytes(whole[:100])
    assert segment("imgs", *CLICK, "--format", "coco", "-o", "out") == 1
    printed = capsys.readouterr()
    assert "2 images segmented" in printed.out
    assert "1 failed" in printed.out
    assert printed.err.startswith("sam3rt segment: failed: imgs/b.png: got an image that cannot")
    (imgs / "b.png").write_bytes(whole)
    assert segment("imgs", *CLICK, "--format", "coco", "-o", "out") == 0
    assert "1 image segmented" in capsys.readouterr().out
    assert len(json.loads(Path("out/annotations.json").read_text())["images"]) == 3


@pytest.mark.parametrize("form", ["png", "coco", "yolo", "labelme"])
def test_nothing_is_done_twice(
    form: str, imgs: Path, segment: Any, capsys: Any, monkeypatch: Any
) -> None:
    arguments = ("imgs", *CLICK, "--format", form, "-o", "out")
    assert segment(*arguments) == 0
    before = {name: Path("out", name).read_bytes() for name in files("out")}
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModel, "encode", _never)
        assert segment(*arguments) == 0
    assert "0 images segmented, 3 done before" in capsys.readouterr().out
    assert {name: Path("out", name).read_bytes() for name in files("out")} == before


def test_what_changed_is_done_again(imgs: Path, segment: Any, capsys: Any) -> None:
    arguments = ["imgs", *CLICK, "--format", "labelme", "-o", "out"]

    def again(*more: str) -> str:
        capsys.readouterr()
        assert segment(*arguments, *more) == 0
        return str(capsys.readouterr().out).partition(" ")[0]

    assert again() == "3"
    assert again("--mask-threshold", "0.5") == "3"
    assert again("--mask-threshold", "0.5") == "0"
    PIL.Image.fromarray(noise(50, 60)).save(imgs / "a.png")
    assert again("--mask-threshold", "0.5") == "1"
    Path("out/b.json").unlink()
    assert again("--mask-threshold", "0.5") == "1"
    arguments[2] = "20,9"
    assert again("--mask-threshold", "0.5") == "3"
    arguments[3:] = ["-o", "png"]
    for name in ("mask_0.png", "overlay.png"):
        again()
        Path("png/deep/c", name).unlink()
        assert again() == "1"


@pytest.mark.parametrize("form", ["png", "coco", "yolo", "labelme"])
@pytest.mark.parametrize("cut", [1, 9, 100_000])
def test_a_run_that_was_stopped_goes_on(
    form: str, cut: int, imgs: Path, segment: Any, capsys: Any, monkeypatch: Any
) -> None:
    """Stopped while it noted the last image, or before."""
    arguments = ("imgs", *CLICK, "--format", form, "-o", "out")
    note = Journal.add

    def stopped(journal: Journal, entry: Any) -> None:
        if entry["image"] != "imgs/deep/c.PNG" or not entry["key"]:
            return note(journal, entry)
        with Path("out/results.jsonl").open("ab") as stream:
            stream.write((json.dumps(entry) + "\n").encode()[:-cut])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopped)
        assert segment(*arguments) == 130
    # Nothing more is waited for.
    said = capsys.readouterr().err
    assert said == "2 images are done: the same command again does the rest\n"
    assert segment(*arguments) == 0
    # A line without its end is whole.
    said = capsys.readouterr().out
    assert said.startswith("0 images segmented" if cut == 1 else "1 image segmented")
    there = {name: Path("out", name).read_bytes() for name in files("out")}
    assert segment(*arguments[:-1], "fresh") == 0
    fresh = {name: Path("fresh", name).read_bytes() for name in files("fresh")}
    assert there == fresh


@pytest.mark.parametrize("height", [30, 31])
def test_who_stops_a_run_is_told_what_it_waits_for(
    height: int, imgs: Path, segment: Any, monkeypatch: Any
) -> None:
    """Ctrl-C while the first image is encoded, or while it is written and the next is encoded."""
    error = io.StringIO()
    encoding = threading.Event()
    said: list[str] = []
    encode = SegmentationModel.encode

    def slow(model: SegmentationModel, image: Any) -> Any:
        if image.shape[0] == height:
            encoding.set()
            end = time.monotonic() + 10
            while not error.getvalue().endswith("rest\n") and time.monotonic() < end:
                time.sleep(0.01)
            said.append(error.getvalue())
        return encode(model, image)

    def interrupted(*arguments: Any) -> None:
        assert encoding.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(SegmentationModel, "encode", slow)
    if height == 30:
        monkeypatch.setattr(Future, "result", interrupted)
    monkeypatch.setattr(Journal, "add", interrupted)
    monkeypatch.setattr(sys, "stderr", error)
    assert segment("imgs", *CLICK, "-o", "out") == 130
    assert said == [
        "stopping once an image is encoded that was begun; "
        "0 images are done: the same command again does the rest\n"
    ]


def test_another_command_adds_to_a_coco_document(imgs: Path, segment: Any) -> None:
    """Names that differ in the suffix alone get in nobody's way, since all is one file."""
    (imgs / "a.jpg").write_bytes((imgs / "a.png").read_bytes())
    for number, (name, what) in enumerate([("a.png", "cat"), ("a.jpg", "dog"), ("b.png", "cat")]):
        line = {"image": name, "points": [[9, 9]], "name": what}
        prompts = write_prompts(f"{number}.jsonl", line)
        assert segment("--prompts", prompts, "imgs", "--format", "coco", "-o", "out") == 0
    # What fails now is not shown as it was.
    (imgs / "b.png").write_bytes(b"nothing")
    assert segment("--prompts", prompts, "imgs", "--format", "coco", "-o", "out") == 1
    document = json.loads(Path("out/annotations.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["imgs/a.jpg", "imgs/a.png"]
    # An image by another path is the same; those that are gone are none any more.
    (imgs / "a.png").unlink()
    (imgs / "b.png").unlink()
    again = ("--prompts", "1.jsonl", str(imgs.resolve()), "--format", "coco", "-o", "out")
    assert segment(*again) == 0
    shown = json.loads(Path("out/annotations.json").read_text())["images"]
    assert [image["file_name"] for image in shown] == [str(imgs.resolve() / "a.jpg")]
    names = {category["id"]: category["name"] for category in document["categories"]}
    assert [names[a["category_id"]] for a in document["annotations"]] == ["dog", "cat"]


def test_commands_at_the_same_time_lose_nothing(imgs: Path, segment: Any, monkeypatch: Any) -> None:
    """The second runs from beginning to end while the first one notes its first image."""
    note = Journal.add

    def interrupted(journal: Journal, entry: Any) -> None:
        monkeypatch.setattr(Journal, "add", note)
        assert segment("imgs/deep", *CLICK, "--format", "coco", "-o", "out") == 0
        note(journal, entry)

    monkeypatch.setattr(Journal, "add", interrupted)
    assert segment("imgs/*.png", *CLICK, "--format", "coco", "-o", "out") == 0
    assert len(json.loads(Path("out/annotations.json").read_text())["images"]) == 3
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 4


def test_another_command_keeps_the_numbers_of_yolo_classes(imgs: Path, segment: Any) -> None:
    for names in (["cat", "dog"], ["bird", "dog"]):
        image = "a.png" if "cat" in names else "b.png"
        lines = [{"image": image, "points": [[9, 9]], "name": name} for name in names]
        prompts = write_prompts("p.jsonl", *lines)
        assert segment("--prompts", prompts, "imgs", "--format", "yolo", "-o", "out") == 0
    assert Path("out/classes.txt").read_text().splitlines() == ["cat", "dog", "bird"]
    for image, expected in (("a", "01"), ("b", "21")):
        assert classes_in(f"out/labels/{image}.txt") == expected
    # Without the list, numbers are given anew.
    Path("out/classes.txt").unlink()
    assert segment("--prompts", prompts, "imgs", "--format", "yolo", "-o", "out") == 0
    assert classes_in("out/labels/b.txt") == "01"


def test_two_commands_that_number_classes_at_once_are_found_out(
    imgs: Path, segment: Any, capsys: Any, monkeypatch: Any
) -> None:
    """Both began without classes.txt, and the other one wrote it last."""
    line = {"image": "a.png", "points": [[9, 9]], "name": "cat"}
    command = ("--prompts", write_prompts("p.jsonl", line), "imgs", "--format", "yolo", "-o", "out")
    add = Journal.add

    def slow(journal: Journal, entry: Any) -> None:
        add(journal, entry)
        Path("out/classes.txt").write_text("dog\n")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", slow)
        assert segment(*command) == 1
    said = capsys.readouterr().err
    assert "classes.txt, which another command changed meanwhile, expected" in said
    # What the user is told to do helps.
    assert "the same command again" in said
    assert segment(*command) == 0
    assert Path("out/classes.txt").read_text().splitlines() == ["dog", "cat"]
    assert classes_in("out/labels/a.txt") == "1"


@pytest.mark.parametrize(
    "line",
    [
        '{"image": "imgs/a.png"}',
        '{"image": [], "files": 1}',
        '{"image": "b", "files": [1]}',
        "[]",
        "1",
    ],
)
def test_lines_that_are_not_ours_are_passed_over(line: str, imgs: Path, segment: Any) -> None:
    arguments = ("imgs", *CLICK, "--format", "coco", "-o", "out")
    assert segment(*arguments) == 0
    before = Path("out/results.jsonl").read_text()
    with Path("out/results.jsonl").open("a") as stream:
        stream.write(f"{line}\n")
    assert segment(*arguments) == 0
    assert Path("out/results.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["results.jsonl", "annotations.json"])
def test_files_of_the_user_s_are_not_overwritten(
    name: str, imgs: Path, segment: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sam3rt.cli.segment.load_from_options", _never)
    Path("out").mkdir()
    Path("out", name).write_text("mine")
    assert segment("imgs", *CLICK, "--format", "coco", "-o", "out") == 1
    assert name in capsys.readouterr().err
    assert files("out") == [name]
    assert Path("out", name).read_text() == "mine"


def test_a_model_that_is_not_there_leaves_nothing(imgs: Path, segment: Any, capsys: Any) -> None:
    assert main(["segment", "imgs", *CLICK, "--bundle", "gone", "-o", "out"]) == 1
    assert "no bundle folder at gone" in capsys.readouterr().err
    assert not Path("out").exists()


def test_another_format_asks_for_another_folder(imgs: Path, segment: Any, capsys: Any) -> None:
    assert segment("imgs", *CLICK, "--format", "coco", "-o", "out") == 0
    assert segment("imgs", *CLICK, "--format", "yolo", "-o", "out") == 1
    assert "results.jsonl is of --format coco" in capsys.readouterr().err


def test_the_next_image_is_encoded_while_one_is_written(
    imgs: Path, segment: Any, monkeypatch: Any
) -> None:
    """Writing the first waits for the second's encoding, and would wait for ever otherwise."""
    encoded = threading.Semaphore(0)
    encode, write = SegmentationModel.encode, folder_module.write_text
    waited = []

    def counted(*arguments: Any) -> Any:
        result = encode(*arguments)
        encoded.release()
        return result

    def patient(path: Path, text: str) -> None:
        if path.suffix == ".json" and not waited:
            waited.append(all(encoded.acquire(timeout=20) for _ in range(2)))
        write(path, text)

    monkeypatch.setattr(SegmentationModel, "encode", counted)
    monkeypatch.setattr(folder_module, "write_text", patient)
    assert segment("imgs", *CLICK, "--format", "labelme", "-o", "out") == 0
    assert waited == [True]


# --- what is said ---------------------------------------------------------------------------------


def test_json_is_a_line_for_each_image(imgs: Path, segment: Any, capsys: Any) -> None:
    assert segment("imgs", *CLICK, "--json", "--format", "coco", "-o", "out") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == ["imgs/a.png", "imgs/b.png", "imgs/deep/c.PNG"]
    assert lines == [json.loads(x) for x in Path("out/results.jsonl").read_text().splitlines()[1:]]
    # Also of those that were done before.
    assert segment("imgs", *CLICK, "--json", "--format", "coco", "-o", "out") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    assert segment("imgs/a.png", *CLICK, "--json", "-o", "one") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("one/result.json").read_text())


@pytest.mark.parametrize("image", ["imgs", "imgs/a.png"])
def test_quiet_is_quiet(image: str, imgs: Path, segment: Any, capsys: Any) -> None:
    assert segment(image, *CLICK, "--quiet", "-o", "out") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_person_sees_progress(imgs: Path, segment: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert segment("imgs", *CLICK, "--format", "labelme", "-o", "out") == 0
    shown = capsys.readouterr().err.split("\r")
    assert [text.partition(",")[0] for text in shown[1:4]] == ["1/3", "2/3", "3/3"]
    assert "deep/c" in shown[3]
    assert shown[4] == "\x1b[K"


def test_best_only_is_a_mask_an_object(imgs: Path, segment: Any) -> None:
    points = ("--points", "9,9 20,3,0", "--points", "30,20")
    assert segment("imgs/a.png", *points, "--best-only", "-o", "out") == 0
    assert files("out") == ["mask_0.png", "mask_1.png", "overlay.png", "result.json"]
    document = json.loads(Path("out/result.json").read_text())
    assert [m["object"] for m in document["masks"]] == [0, 1]
    assert document["prompts"]["point_coords"] == [[[9, 9], [20, 3]], [[30, 20]]]
    assert document["prompts"]["point_labels"] == [[1, 0], [1]]


def test_each_points_and_each_box_is_an_object(
    imgs: Path, segment: Any, model: Any, capsys: Any
) -> None:
    boxes = ("--box", "1,2,20,20", "--box", "5,5,30,25")
    clicks = ("--point", "9,9", "--point", "20,3,0", "--points", "-1,2;30,20")
    assert segment("imgs/a.png", *clicks, *boxes, "-o", "out") == 0
    expected = found(
        model,
        imgs / "a.png",
        [[[9, 9], [20, 3]], [[-1, 2], [30, 20]]],
        [[1, 0], [1, 1]],
        [[1, 2, 20, 20], [5, 5, 30, 25]],
    )
    document = json.loads(Path("out/result.json").read_text())
    assert [m["area"] for m in document["masks"]] == expected.area.tolist()
    assert segment("imgs/a.png", *clicks, *boxes[:2], "-o", "out") == 1
    assert "clicks of 2 and boxes of 1 objects" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["segmnt"], "did you mean segment?"),
        (["segment", "a.png", "--pionts", "1,1", "-o", "o"], "did you mean --points?"),
        (["segment", "a.png", "--bst-only", "-o", "o"], "did you mean --best-only?"),
        (["segment", "a.png", "--format", "coc", "-o", "o"], "did you mean coco?"),
        (["segment", "a.png", "-o", "o", "--zzzzzz"], "unrecognized arguments: --zzzzzz\n"),
    ],
)
def test_what_was_meant_is_suggested(arguments: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_can_complete(shell: str, capsys: Any) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", shell])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "best-only" in printed
    assert "labelme" in printed


def test_a_missing_shtab_is_named(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    assert "pip install shtab" in capsys.readouterr().err
