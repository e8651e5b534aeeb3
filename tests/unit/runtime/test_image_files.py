"""Image files through the command line: read rightly, or refused with one line and status 1."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import subprocess
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import examples, noise

from sam3rt import ImageError, PromptWarning, geometry
from sam3rt.cli import main
from sam3rt.image_files import read_image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS")


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (24, 31)) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(noise(*size)).convert(mode).save(stream, form)
    return stream.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


# Found by fuzzing: a texture file without any known pixel format raises NotImplementedError.
ODD_DDS = base64.b64decode(
    "RERTIHwAAAAPEAAABQAAAAcAAAAVAAAAAAAAAP////8AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAIAAAAEAAAAAAAAAAGAAAAAAA/wAA/wAA/wAAAAAAAAAA4hAAAAAAAOmqWe2yf3txgEWbTPiCmsBJX3+/"
    "uueB/////wmqqqoHj0zvYEcANtvHTZCw0GirvgCzeOb18Ni/ZB/bfg=="
)
BAD_FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not an image",
    "zeros": lambda: bytes(10_000),
    "a bomb": lambda: png_that_claims(60_000, 60_000),
    "a wide bomb": lambda: png_that_claims((1 << 31) - 1, 1),
    "a header alone": lambda: encoded("PNG")[:33],
    "16 bits": lambda: encoded_array(np.zeros((4, 4), np.uint16)),
    "floats": lambda: encoded_array(np.zeros((4, 4), np.float32)),
    "an odd texture": lambda: ODD_DDS,
    "LAB": lambda: encoded_image(PIL.Image.new("LAB", (4, 4))),
    **{
        f"cut {form}": lambda form=form: encoded(form)[: len(encoded(form)) // 3]
        for form in FORMATS
    },
}


def encoded_array(array: np.ndarray) -> bytes:
    return encoded_image(PIL.Image.fromarray(array))


def encoded_image(image: PIL.Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    return stream.getvalue()


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_end_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image"
    path.write_bytes(BAD_FILES[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        status = main(["segment", str(path), "--point", "1,1", "--output", str(tmp_path / "out")])
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sam3rt segment: image {path}: got ")
    # One line, which names the file once, and says nothing of Pillow's to users of a command.
    assert (error.count(str(path)), error.count("\n")) == (1, 1)
    assert not re.search("PIL|bomb|Errno|Traceback", error)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="named pipes are of POSIX")
def test_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    """It would hold the turn of all other readers, and cannot be read twice."""
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(ImageError, match=r"image\.png: got a pipe"):
        read_image(tmp_path / "image.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_anywhere_is_read_or_refused(form: str, tmp_path: Path) -> None:
    whole = encoded(form)
    path = tmp_path / "image"
    refused = 0
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        try:
            array = read_image(path)
        except ImageError as error:
            refused += error.argument == "image"
        else:
            assert array.shape[2] == 3
    assert refused > 10


@pytest.mark.parametrize("form", [f for f in FORMATS if f not in ("JPEG", "WEBP", "GIF")])
def test_lossless_files_are_read_exactly(form: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(form))
    found = read_image(path)
    if form == "ICO":  # keeps square sizes of its own
        assert found.dtype == np.uint8
    else:
        np.testing.assert_array_equal(found, noise(24, 31))


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"])
def test_no_picture_starts_a_program(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow hands EPS to Ghostscript, whatever the file is called."""

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("a program was started")

    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with PIL.Image.open(path) as image:
        assert image.format == "EPS"  # what came before opened it so
    for name in ("Popen", "run", "call", "check_call"):
        monkeypatch.setattr(subprocess, name, start)
    with pytest.raises(ImageError, match=r"photo\.jpg: got no image"):
        read_image(path)


# --- orientation ----------------------------------------------------------------------------------


def with_exif(form: str, orientation: object, odd: bool) -> tuple[bytes, np.ndarray]:
    """An image file with an orientation, and how it looks upright."""
    picture = PIL.Image.fromarray(noise(16, 32))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    if odd:
        exif[0x9286] = b"ASCII\0\0\0hello"
        exif[0xEA1C] = b"\0" * 40
    stream = io.BytesIO()
    lossless = {"lossless": True} if form == "WEBP" else {}
    picture.save(stream, form, exif=exif, **lossless)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(stream.getvalue())))
    return stream.getvalue(), np.asarray(upright.convert("RGB"))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(form: str, orientation: int, tmp_path: Path) -> None:
    content, upright = with_exif(form, orientation, odd=False)
    path = tmp_path / "image"
    path.write_bytes(content)
    found = read_image(path)
    np.testing.assert_array_equal(found, upright)
    assert found.flags.c_contiguous


def test_odd_metadata_are_no_reason_to_refuse_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``exif_transpose`` writes all of EXIF back, and raises where it cannot."""

    def cannot(*arguments: object) -> bytes:
        raise struct.error("a tag that Pillow cannot write")

    content, upright = with_exif("JPEG", 6, odd=True)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    monkeypatch.setattr(PIL.Image.Exif, "tobytes", cannot)
    with PIL.Image.open(path) as image, pytest.raises(struct.error):
        PIL.ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(read_image(path), upright)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0", b"\0" * 30])
def test_damaged_metadata_mean_upright(exif: bytes, tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(noise(16, 32))
    picture.save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), noise(16, 32))


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60_000, 60_000), (1 << 20, 1), (20_000, 20_000)])
def test_large_images_are_refused_with_the_remedy(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(*size))
    with pytest.raises(ImageError, match="--max-pixels"):
        read_image(path)


def test_the_limit_can_be_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(geometry, "MAX_PIXELS", 1000)
    monkeypatch.setattr(geometry, "MAX_SIDE", 1000)
    path = tmp_path / "image.png"
    PIL.Image.fromarray(noise(2, 2000)).save(path)
    arguments = ["segment", str(path), "--point", "1,1", "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "--max-pixels" in capsys.readouterr().err
    assert main([*arguments, "--max-pixels", "4000"]) == 0
    assert main([*arguments, "--max-pixels", "3999"]) == 1


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
def test_of_several_pictures_the_first_is_read(form: str, tmp_path: Path) -> None:
    first, second = (PIL.Image.fromarray(noise(24, 31, seed)) for seed in (0, 1))
    first.save(tmp_path / "stack", form, save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_image(tmp_path / "stack"), noise(24, 31, 0))


def test_pillow_s_own_limit_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours holds instead: 179 million pixels are fewer than a phone of today takes."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
    path = tmp_path / "image.png"
    PIL.Image.fromarray(noise(24, 31)).save(path)
    np.testing.assert_array_equal(read_image(path), noise(24, 31))
    assert PIL.Image.MAX_IMAGE_PIXELS == 10


def test_other_threads_keep_their_filters_of_warnings(tmp_path: Path) -> None:
    """They belong to the whole process: whoever sets them back ends what others set meanwhile."""
    reading, done = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            reading.set()
            assert done.wait(30)
            return super().read(*size)

    reader = threading.Thread(target=read_image, args=(tmp_path / "a", Slow(encoded("PNG"))))
    before = list(warnings.filters)
    with warnings.catch_warnings():
        reader.start()
        assert reading.wait(30)
        warnings.simplefilter("error", PromptWarning)
        among = list(warnings.filters)
        done.set()
        reader.join()
        assert warnings.filters == among
    assert warnings.filters == before


def test_commands_say_nothing_of_odd_metadata(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(noise(24, 31))
    image.save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0")
    with pytest.warns(UserWarning, match="EXIF"):
        read_image(tmp_path / "odd.jpg")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command = ["segment", str(tmp_path / "odd.jpg"), "--point", "1,1"]
        assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert not caught


@given(data=st.data())
@examples(150)
def test_damage_raises_only_image_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(encoded(data.draw(st.sampled_from(FORMATS))))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            array = read_image(path)
        except ImageError:
            return
    assert array.dtype == np.uint8
    assert array.shape[2] == 3
