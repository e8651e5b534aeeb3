"""Programs over the C++ runtime: in C, with threads, the example and the documented one."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from tests.conftest import PHOTOS
from tests.support.cpp_driver import EACH_BUILD, ROOT, Build
from tests.support.golden_calls import Golden
from tests.support.helpers import noise

import sam3rt
from sam3rt.bundle.default import default_bundle_path
from sam3rt.cli import main

BUNDLE = default_bundle_path()
CHELSEA = PHOTOS / "chelsea.png"


@EACH_BUILD
def test_c_program(
    cpp_build: Build, tiny_sam3: Path, tiny_model: sam3rt.SegmentationModel, tmp_path: Path
) -> None:
    pixels = noise(30, 40)
    (tmp_path / "image.rgb").write_bytes(pixels.tobytes())
    done = cpp_build.program(
        "tests/c_interface", tiny_sam3, tmp_path / "image.rgb", 30, 40, tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"

    predictor = sam3rt.SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image(pixels)
    click: dict[str, Any] = {"point_coords": [[20, 15], [3, 4]], "point_labels": [1, 0]}
    first = predictor.predict(**click)
    refined = {**click, "mask_input": first[2][:1], "multimask_output": False}
    expected = {
        "click": first,
        "batch0": first,
        "batch1": predictor.predict(),
        "refined": predictor.predict(**refined),
    }
    for name, (masks, iou, low_res) in expected.items():
        found = np.frombuffer((tmp_path / f"{name}.masks").read_bytes(), np.uint8)
        assert (found != masks.ravel()).mean() <= 1e-4
        for part, array in (("iou", iou), ("low_res", low_res)):
            values = np.frombuffer((tmp_path / f"{name}.{part}").read_bytes(), np.float32)
            np.testing.assert_allclose(values, array.ravel(), atol=1e-4, rtol=0)
    logits = predictor.predict(**refined, return_logits=True)[0]
    values = np.frombuffer((tmp_path / "logits").read_bytes(), np.float32)
    np.testing.assert_allclose(values, logits.ravel(), atol=1e-4, rtol=0)
    assert tiny_model.load_embedding(tmp_path / "image.embedding").original_size == (30, 40)


@pytest.mark.parametrize("name", ["address", "thread"])
def test_threads(cpp_builds: Path, name: str, tiny_sam3: Path, tmp_path: Path) -> None:
    done = Build(cpp_builds / name, tmp_path).program("tests/threads", tiny_sam3, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert done.stdout == "4 threads, 0 failures\n"
    assert [path.name for path in tmp_path.iterdir()] == ["shared.embedding"]


def test_nothing_is_reported(cpp_build: Build, tmp_path: Path) -> None:
    """ONNX Runtime keeps an identifier of the machine in the home folder before it reports."""
    home = tmp_path / "home"
    home.mkdir()
    # In an environment that names a CI system it would not report either.
    program = cpp_build.path / "examples/sam3rt_segment"
    output = tmp_path / "output"
    done = subprocess.run(
        [program, CHELSEA, "--point", "225,150", "--bundle", BUNDLE, "--output", output],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []


# --- sam3rt_segment -------------------------------------------------------------------------------


def segment(build: Build, image: Path, output: Path, *options: str, bundle: Path = BUNDLE) -> Any:
    """Run the example program, which must succeed; the parsed result."""
    done = build.program(
        "examples/sam3rt_segment", image, "--bundle", bundle, "--output", output, *options
    )
    assert done.returncode == 0, done.stderr
    assert "overlay.png" in done.stdout
    return json.loads((output / "result.json").read_text())


def read_png(path: Path) -> NDArray[Any]:
    with PIL.Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("cpp_build", ["release"], indirect=True)
@pytest.mark.parametrize(
    "options",
    [
        ("--point", "225,150"),
        ("--point", "225,150", "--point", "60.5,280,0", "--single-mask"),
        ("--box", "20,10,400,290", "--box=120,40,330,260", "--mask-threshold", "0.5"),
        ("--box=20,10,400,290", "--max-hole-area", "50", "--max-sprinkle-area", "20"),
    ],
    ids=" ".join,
)
def test_segment_writes_what_the_command_does(
    cpp_build: Build, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """The same files: equal masks, and a result that differs in nothing but times."""
    found = segment(cpp_build, CHELSEA, tmp_path / "cpp", *options)
    arguments = ["segment", str(CHELSEA), "--bundle", str(BUNDLE), "--output"]
    extra = ["--backend", "onnxruntime", "--device", "cpu", *options]
    assert main([*arguments, str(tmp_path / "python"), *extra]) == 0
    expected = json.loads((tmp_path / "python" / "result.json").read_text())
    assert list(found) == list(expected)
    for name in ("image", "height", "width", "prompts", "overlay", "model"):
        assert found[name] == expected[name]
    assert found["seconds"].keys() <= expected["seconds"].keys()
    assert len(found["masks"]) == len(expected["masks"])
    for mine, theirs in zip(found["masks"], expected["masks"], strict=True):
        assert list(mine) == list(theirs)
        assert (mine["file"], mine["object"]) == (theirs["file"], theirs["object"])
        assert mine["predicted_iou"] == pytest.approx(theirs["predicted_iou"], abs=1e-5)
        assert mine["area"] == pytest.approx(theirs["area"], abs=14)
        assert np.abs(np.subtract(mine["bounding_box"], theirs["bounding_box"])).max() <= 1
        mask, wanted = (read_png(tmp_path / part / mine["file"]) for part in ("cpp", "python"))
        assert mask.shape == wanted.shape
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask != wanted).mean() <= 1e-4
    names = {path.name for path in (tmp_path / "python").iterdir()}
    assert {path.name for path in (tmp_path / "cpp").iterdir()} == names


def test_only_an_earlier_runs_results_are_replaced(
    cpp_build: Build, tiny_sam3: Path, tmp_path: Path
) -> None:
    """As by the command: nothing of the user's is lost, the image least of all."""
    output, other = tmp_path / "output", tmp_path / "other"
    image = tmp_path / "image.png"
    PIL.Image.fromarray(noise(20, 30)).save(image)
    segment(cpp_build, image, output, "--point=4,4", bundle=tiny_sam3)
    (output / "notes.txt").write_text("mine")
    segment(cpp_build, image, output, "--point=4,4", "--single-mask", bundle=tiny_sam3)
    names = ["mask_0.png", "notes.txt", "overlay.png", "result.json"]
    assert sorted(path.name for path in output.iterdir()) == names
    other.mkdir()
    for source, folder in (
        (image.rename(other / "mask_7.png"), other),
        (output / "mask_0.png", output),
    ):
        content = source.read_bytes()
        options = ("--bundle", tiny_sam3, "--output", folder)
        done = cpp_build.program("examples/sam3rt_segment", source, *options)
        assert done.returncode == 2
        assert f"{source} is not from an earlier run" in done.stderr
        assert source.read_bytes() == content


def test_overlay_shows_mask_outline_and_prompts(cpp_build: Build, tmp_path: Path) -> None:
    segment(
        cpp_build, CHELSEA, tmp_path, "--point=225,150", "--point=10,280,0", "--box=20,10,400,290"
    )
    image, overlay = read_png(CHELSEA)[..., :3].astype(int), read_png(tmp_path / "overlay.png")
    assert overlay.shape == image.shape
    mask = read_png(tmp_path / "mask_0.png") > 0
    tinted = np.abs(overlay - (0.55 * image + 0.45 * np.array([0, 132, 214]))).max(axis=-1) <= 1
    untouched = (overlay == image).all(axis=-1)
    assert tinted[mask].mean() > 0.8
    assert untouched[~mask].mean() > 0.8
    edge = mask & ~np.roll(mask, 1, axis=1)
    assert (overlay[edge] == [0, 132, 214]).all(axis=-1).mean() > 0.8
    for (x, y), colour in (((225, 147), (255, 255, 255)), ((228, 153), (22, 170, 82))):
        assert tuple(overlay[y, x]) == colour
    assert tuple(overlay[283, 10]) == (222, 42, 52)
    assert tuple(overlay[100, 21]) == (22, 170, 82)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["png", "jpg"])
def test_exif_orientation_is_applied(
    cpp_build: Build, tiny_sam3: Path, tmp_path: Path, orientation: int, form: str
) -> None:
    image = PIL.Image.fromarray(np.kron(noise(6, 8), np.ones((8, 8, 1), np.uint8)))
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    image.save(tmp_path / f"a.{form}", exif=exif, **({"quality": 95} if form == "jpg" else {}))
    # The threshold is one that no pixel passes: the overlay is the image.
    options = ("--mask-threshold", "1e6", "--max-hole-area", "0")
    result = segment(
        cpp_build, tmp_path / f"a.{form}", tmp_path / "out", *options, bundle=tiny_sam3
    )
    with PIL.Image.open(tmp_path / f"a.{form}") as stored:
        from PIL import ImageOps

        upright = np.asarray(ImageOps.exif_transpose(stored)).astype(int)
    assert (result["height"], result["width"]) == upright.shape[:2]
    assert not read_png(tmp_path / "out" / "mask_0.png").any()
    difference = np.abs(read_png(tmp_path / "out" / "overlay.png").astype(int) - upright)
    # JPEG decoders differ by a few levels.
    assert np.median(difference) <= (3 if form == "jpg" else 0)


BAD_ARGUMENTS = [
    (),
    ("image.png",),
    ("image.png", "--bundle", "b"),
    ("image.png", "more.png", "--bundle=b", "--output=o"),
    ("image.png", "--bundle=b", "--output=o", "--point=1"),
    ("image.png", "--bundle=b", "--output=o", "--point=1,2,3"),
    ("image.png", "--bundle=b", "--output=o", "--point=1,nan"),
    ("image.png", "--bundle=b", "--output=o", "--point=1,2x"),
    ("image.png", "--bundle=b", "--output=o", "--point="),
    ("image.png", "--bundle=b", "--output=o", "--box=4,3,2,1"),
    ("image.png", "--bundle=b", "--output=o", "--box=1,2,3"),
    ("image.png", "--bundle=b", "--output=o", "--threads=0"),
    ("image.png", "--bundle=b", "--output=o", "--nonsense"),
    ("image.png", "--bundle=b", "--output=o", "--backend=torch"),
    ("image.png", "--bundle=b", "--output=o", "--backend=tensorrt", "--device=cpu"),
    ("image.png", "--bundle=b", "--output"),
    ("image.png", "--bundle=b", "--output=o", "--point=1,2", "--box=1,2,3,4", "--box=1,2,3,4"),
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=" ".join)
def test_wrong_arguments(cpp_build: Build, arguments: tuple[str, ...]) -> None:
    done = cpp_build.program("examples/sam3rt_segment", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("sam3rt_segment: ")


def test_what_cannot_be_segmented(cpp_build: Build, tmp_path: Path) -> None:
    content = CHELSEA.read_bytes()
    cases = {
        "text.png": b"hello",
        "empty.png": b"",
        "cut.png": content[: len(content) // 2],
        "header.png": content[:20],
        "exif.jpg": b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff",
        "loop.jpg": b"\xff\xd8\xff\xe1\x00\x00",
    }
    for form in ("jpg", "bmp", "gif", "tga", "ppm"):
        PIL.Image.fromarray(noise(40, 60)).save(tmp_path / f"cut.{form}")
        cases[f"cut.{form}"] = (tmp_path / f"cut.{form}").read_bytes()[:-500]
    for name, text in cases.items():
        (tmp_path / name).write_bytes(text)
    PIL.Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "folder.png").mkdir()
    for name in (*cases, "deep.png", "missing.png", "folder.png"):
        done = cpp_build.program(
            "examples/sam3rt_segment",
            tmp_path / name,
            f"--bundle={BUNDLE}",
            f"--output={tmp_path / 'out'}",
        )
        assert done.returncode == 1, (name, done.stderr)
        assert name in done.stderr
    assert not (tmp_path / "out").exists()


# --- the documented program -----------------------------------------------------------------------


def readme_block(language: str, containing: str) -> str:
    """The code block of docs/cpp.md in a language that contains a text."""
    blocks = re.findall(
        rf"```{language}\n(.*?)```", (ROOT / "docs" / "cpp.md").read_text(), re.DOTALL
    )
    (found,) = [block for block in blocks if containing in block]
    return str(found)


def test_part_of_another_project(cpp_builds: Path, tmp_path: Path) -> None:
    """``add_subdirectory`` gives the target that ``find_package`` gives, and installs nothing."""
    (tmp_path / "main.cpp").write_text("#include <sam3rt/sam3rt.hpp>\nint main() {}\n")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(app CXX C)\n"
        f'add_subdirectory("{ROOT}/runtime/cpp" sam3rt)\n'
        "add_executable(app main.cpp)\ntarget_link_libraries(app PRIVATE sam3rt::sam3rt)\n"
        "get_target_property(real sam3rt::sam3rt ALIASED_TARGET)\n"
        "message(STATUS \"target ${real}, build type '${CMAKE_BUILD_TYPE}'\")\n"
    )
    dependencies = cpp_builds / "dependencies"
    options = [f"-DCMAKE_PREFIX_PATH={dependencies}", f"-DONNXRUNTIME_ROOT={dependencies}"]
    done = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "build", *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "target sam3rt_shared, build type ''" in done.stdout
    installed = (tmp_path / "build" / "sam3rt" / "cmake_install.cmake").read_text()
    assert "libsam3rt" not in installed


def test_readme_quick_start(cpp_builds: Path, sam3_golden: Golden, tmp_path: Path) -> None:
    """Compiled and run as written, against the installed library."""
    source = readme_block("cpp", "sam3rt::Model::load")
    (tmp_path / "main.cpp").write_text(source)
    (tmp_path / "CMakeLists.txt").write_text(readme_block("cmake", "find_package(sam3rt"))
    subprocess.run(
        [
            "cmake",
            *("-S", tmp_path, "-B", tmp_path / "build"),
            # Nothing of what the library itself is built with.
            f"-DCMAKE_PREFIX_PATH={cpp_builds / 'install'}",
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True, capture_output=True)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "sam3").symlink_to(sam3_golden.bundle, target_is_directory=True)
    done = subprocess.run(
        [tmp_path / "build" / "app"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        # The program finds every library by itself.
        env={name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "photo.embedding").stat().st_size > 1_000_000
    scores = [float(word) for word in re.findall(r"-?\d+\.\d+", done.stdout)]
    model = sam3rt.load_model(sam3_golden.bundle, backend="onnxruntime", device="cpu")
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    predictor.set_image(np.full((480, 640, 3), 127, np.uint8))
    _, expected, low_res = predictor.predict(point_coords=[[225, 150]], point_labels=[1])
    _, refined, _ = predictor.predict(
        box=[20, 10, 400, 290],
        mask_input=low_res[expected.argmax()][None],
        multimask_output=False,
    )
    np.testing.assert_allclose(scores, [*expected, *refined], atol=1e-5)
