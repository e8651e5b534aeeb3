"""Tests of `sam3rt.geometry`: what counts as an image, and how it reaches the encoder."""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
import struct
import zlib
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.helpers import GOLDEN, MOBILE_IMAGE, SAM3_IMAGE, examples, label, noise, photo

import sam3rt
from sam3rt import ImageError
from sam3rt.bundle import ImageSpec
from sam3rt.geometry import MAX_PIXELS, MAX_SIDE, ImageGeometry, geometry, preprocess, to_rgb

SPECS = {"sam3": SAM3_IMAGE, "mobile_sam": MOBILE_IMAGE}
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")

image_sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    """Noise, 20 x 30 pixels."""
    return noise(20, 30)


# --- PIL images -----------------------------------------------------------------------------------


def expected_rgb(mode: str, pixel: tuple[int, ...]) -> tuple[float, ...]:
    """What a pixel of a mode looks like, from the mode's definition."""
    if mode in ("RGB", "RGBA", "RGBX"):
        return pixel[:3]
    if mode in ("L", "LA", "P", "PA", "1"):
        return (pixel[0],) * 3
    if mode == "CMYK":
        return tuple((255 - ink) * (255 - pixel[3]) / 255 for ink in pixel[:3])
    if mode == "HSV":
        red, green, blue = colorsys.hsv_to_rgb(*(value / 255 for value in pixel))
        return (255 * red, 255 * green, 255 * blue)
    assert mode == "YCbCr"
    y, cb, cr = pixel[0], pixel[1] - 128, pixel[2] - 128
    return (y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb)


@pytest.mark.parametrize(
    ("mode", "pixel", "tolerance"),
    [
        ("RGB", (200, 30, 90), 0),
        ("RGBA", (200, 30, 90, 0), 0),
        ("RGBA", (200, 30, 90, 128), 0),
        ("RGBX", (200, 30, 90, 7), 0),
        ("L", (77,), 0),
        ("LA", (77, 0), 0),
        ("LA", (77, 200), 0),
        ("1", (255,), 0),
        ("1", (0,), 0),
        ("CMYK", (10, 200, 60, 0), 1),
        ("CMYK", (10, 200, 60, 90), 1),
        ("YCbCr", (120, 90, 170), 1.5),
        ("HSV", (40, 180, 220), 4),
        ("HSV", (200, 60, 130), 4),
    ],
)
def test_pil_modes_become_rgb(mode: str, pixel: tuple[int, ...], tolerance: float) -> None:
    image = PIL.Image.new(mode, (5, 4), pixel if len(pixel) > 1 else pixel[0])
    result = to_rgb(image)
    assert result.shape == (4, 5, 3)
    assert result.dtype == np.uint8
    expected = np.broadcast_to(expected_rgb(mode, pixel), result.shape)
    np.testing.assert_allclose(result, expected, atol=tolerance)


def test_rgb_image_keeps_every_pixel(picture: NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(to_rgb(PIL.Image.fromarray(picture)), picture)


def test_grey_array_and_bilevel_images_keep_their_layout() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(to_rgb(PIL.Image.fromarray(grey))[..., 1], grey)
    bits = PIL.Image.fromarray(grey % 2 * 255).convert("1")
    np.testing.assert_array_equal(to_rgb(bits)[..., 2], grey % 2 * 255)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])])
def test_palette_images_become_their_colours(transparency: int | bytes | None) -> None:
    colours = np.array([[255, 0, 10], [20, 250, 30], [1, 2, 3]], np.uint8)
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = PIL.Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    if transparency is not None:
        image.info["transparency"] = transparency
    np.testing.assert_array_equal(to_rgb(image), colours[indices])


def test_palette_with_alpha_loses_only_its_alpha() -> None:
    image = PIL.Image.new("PA", (2, 1))
    image.putpalette([9, 8, 7, 6, 5, 4])
    image.putpixel((1, 0), (1, 50))
    np.testing.assert_array_equal(to_rgb(image), [[[9, 8, 7], [6, 5, 4]]])


def test_transparency_is_dropped_and_not_blended(picture: NDArray[np.uint8]) -> None:
    alpha = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30, 1)
    image = PIL.Image.fromarray(np.concatenate([picture, alpha], axis=2))
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(to_rgb(image), picture)


def test_premultiplied_colour_is_divided_by_its_alpha() -> None:
    image = PIL.Image.new("RGBA", (3, 2), (200, 100, 50, 128)).convert("RGBa")
    assert np.abs(to_rgb(image).astype(int) - [200, 100, 50]).max() <= 2


def test_every_mode_converts_or_is_refused_by_name() -> None:
    """Modes such as La have no way to RGB in Pillow; they may not fail with its errors."""
    for mode in (*PIL.Image.MODES, "La", "RGBa", "RGBX", "I;16", "I;16B", "I;16L"):
        image = PIL.Image.new(mode, (3, 2))
        try:
            result = to_rgb(image, "picture")
        except ImageError as error:
            message = str(error)
        else:
            assert result.shape == (2, 3, 3)
            assert result.dtype == np.uint8
            continue
        assert message.startswith("picture: ")
        assert repr(mode) in message


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B", "I;16L", "LAB"])
def test_modes_without_eight_bit_rgb_are_refused_by_name(mode: str) -> None:
    with pytest.raises(ImageError, match=f"'{mode}'") as caught:
        to_rgb(PIL.Image.new(mode, (3, 2)))
    assert caught.value.argument == "image"


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_pil_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="pixel"):
        to_rgb(PIL.Image.new("RGB", size))


def test_exif_orientation_is_not_applied() -> None:
    image = PIL.Image.fromarray(noise(6, 9))
    exif = image.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    opened = PIL.Image.open(stream)
    assert opened.getexif()[0x0112] == 6
    np.testing.assert_array_equal(to_rgb(opened), noise(6, 9))


@pytest.mark.parametrize("damage", ["cut", "closed"])
@pytest.mark.parametrize("form", ["JPEG", "JPEG2000"])
def test_pil_image_that_cannot_be_read_is_refused(damage: str, form: str) -> None:
    # Pillow decodes at first use: a damaged upload fails here, with OSError or ValueError.
    stream = io.BytesIO()
    PIL.Image.fromarray(noise(64, 64)).save(stream, form)
    content = stream.getvalue()
    image = PIL.Image.open(io.BytesIO(content[: len(content) // 2]))
    if damage == "closed":
        image.close()
    with pytest.raises(ImageError):
        to_rgb(image)


# --- arrays ---------------------------------------------------------------------------------------


def test_uint8_array_is_taken_as_it_is(picture: NDArray[np.uint8]) -> None:
    assert to_rgb(picture) is picture


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 5, 3), np.float32), "float32"),
        (np.zeros((4, 5, 3), np.float64), "float64"),
        (np.zeros((4, 5, 3), np.uint16), "uint16"),
        (np.zeros((4, 5, 3), np.int8), "int8"),
        (np.zeros((4, 5, 3), np.int64), "int64"),
        (np.zeros((4, 5, 3), bool), "bool"),
        (np.zeros((4, 5, 3), object), "object"),
        (np.zeros((4, 5, 3), complex), "complex"),
        (np.zeros((4, 5), np.uint8), "(4, 5)"),
        (np.zeros(3, np.uint8), "(3,)"),
        (np.zeros((), np.uint8), "()"),
        (np.zeros((4, 5, 4), np.uint8), "(4, 5, 4)"),
        (np.zeros((4, 5, 1), np.uint8), "(4, 5, 1)"),
        (np.zeros((3, 4, 5), np.uint8), "(3, 4, 5)"),
        (np.zeros((1, 4, 5, 3), np.uint8), "(1, 4, 5, 3)"),
        (np.zeros((0, 5, 3), np.uint8), "(0, 5, 3)"),
        (np.zeros((4, 0, 3), np.uint8), "(4, 0, 3)"),
        (np.zeros((4, 5, 0), np.uint8), "(4, 5, 0)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_arrays_are_refused(array: NDArray[Any], words: str) -> None:
    with pytest.raises(ImageError) as caught:
        to_rgb(array, "picture")
    assert caught.value.argument == "picture"
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "value",
    [None, "photo.png", b"\x89PNG", 5, [[[0, 0, 0]]], [], {}, object(), PIL.Image, np.uint8(3)],
    ids=label,
)
def test_other_things_are_refused(value: Any) -> None:
    name = type(value).__qualname__
    with pytest.raises(ImageError, match=name):
        to_rgb(value)


def test_torch_tensor_is_refused_by_name() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ImageError, match=r"torch\.Tensor"):
        to_rgb(torch.zeros(4, 5, 3, dtype=torch.uint8))


def test_masked_array_is_refused_where_pixels_are_masked(picture: NDArray[np.uint8]) -> None:
    whole = np.ma.masked_array(picture)
    assert type(to_rgb(whole)) is np.ndarray
    whole[0, 0] = np.ma.masked
    with pytest.raises(ImageError, match="masked"):
        to_rgb(whole)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 1), (1 << 15, (1 << 13) + 1)])
def test_larger_images_are_refused_wherever_their_size_comes_from(size: tuple[int, int]) -> None:
    pixel = np.zeros((1, 1, 3), np.uint8)
    array = np.broadcast_to(pixel, (*size, 3))
    for call in (lambda: to_rgb(array), lambda: ImageGeometry(size, (8, 8))):
        with pytest.raises(ImageError, match=rf"{MAX_PIXELS} .*{MAX_SIDE} .*--max-pixels"):
            call()


def test_largest_images_are_taken() -> None:
    for size in ((1, MAX_SIDE), (MAX_SIDE, 1), (1 << 14, 1 << 14)):
        array = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (*size, 3))
        assert to_rgb(array) is array
        assert ImageGeometry(size, (8, 8)).original_size == size


def test_a_large_pil_image_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match="65537 x 1 pixels"):
        to_rgb(PIL.Image.new("1", (MAX_SIDE + 1, 1)))


def test_limits_can_be_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam3rt.geometry, "MAX_SIDE", 70_000)
    monkeypatch.setattr(sam3rt.geometry, "MAX_PIXELS", 70_000)
    assert to_rgb(np.zeros((1, 70_000, 3), np.uint8)).shape == (1, 70_000, 3)
    with pytest.raises(ImageError, match="at most 70000 pixels"):
        to_rgb(np.zeros((2, 40_000, 3), np.uint8))


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (5, 5, 3), (2.0, 3), None])
def test_a_geometry_has_two_positive_sides(size: Any) -> None:
    with pytest.raises(ImageError, match="image: got size"):
        ImageGeometry(size, (8, 8))
    with pytest.raises(ImageError, match="input_size"):
        ImageGeometry((8, 8), size)


# --- more than 8 bits a channel -------------------------------------------------------------------


def deep_png(colour_type: int, bits: int) -> bytes:
    """A PNG of 4 x 3 pixels: colour type 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    row = b"\0" + bytes(4 * {0: 1, 2: 3, 4: 2, 6: 4}[colour_type] * bits // 8)
    header = struct.pack(">IIBBBBB", 4, 3, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row * 3))
        + chunk(b"IEND", b"")
    )


def written(form: str, **options: Any) -> bytes:
    """A picture of 4 x 3 pixels as Pillow writes it."""
    stream = io.BytesIO()
    PIL.Image.fromarray(noise(3, 4)).save(stream, form, **options)
    return stream.getvalue()


def jpeg2000(bits: int, channel: int, *, raw: bool) -> bytes:
    """JPEG 2000 whose header says so many bits of one channel, which Pillow cannot write."""
    content = bytearray(written("JPEG2000", no_jp2=raw))
    start = content.index(b"\xff\x51")
    assert content[start + 40 + 3 * channel] == 7
    content[start + 40 + 3 * channel] = bits - 1
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        *(deep_png(colour_type, 16) for colour_type in (0, 2, 4, 6)),
        b"P6 4 3 65535\n" + bytes(4 * 3 * 6),
        b"P3 1 1 1023\n1 2 3",
        written("SGI", bpc=2),
        jpeg2000(16, 0, raw=False),
        jpeg2000(12, 2, raw=True),
    ],
)
def test_deep_colours_are_refused_too(content: bytes) -> None:
    """Pillow opens them as 8-bit modes and drops the low bits."""
    with pytest.raises(ImageError, match="scaling to 8 bits"):
        to_rgb(PIL.Image.open(io.BytesIO(content)))


@pytest.mark.parametrize(
    "content",
    [
        *(deep_png(colour_type, 8) for colour_type in (0, 2, 4, 6)),
        b"P6 4 3 255\n" + bytes(36),
        *(written("SGI"), written("JPEG2000"), written("JPEG2000", no_jp2=True)),
    ],
)
def test_eight_bits_a_channel_are_taken(content: bytes) -> None:
    assert to_rgb(PIL.Image.open(io.BytesIO(content))).shape == (3, 4, 3)


def test_sixteen_bits_a_pixel_are_taken() -> None:
    """A bitmap of 5, 6 and 5 bits a channel."""
    stream = io.BytesIO()
    header = struct.pack("<IiiHHIIiiII", 40, 4, 3, 1, 16, 3, 24, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    offset = 14 + len(header) + len(masks)
    stream.write(b"BM" + struct.pack("<IHHI", offset + 24, 0, 0, offset) + header + masks)
    stream.write(b"\x00\xf8" * 12)
    stream.seek(0)
    np.testing.assert_array_equal(to_rgb(PIL.Image.open(stream)), np.full((3, 4, 3), [255, 0, 0]))


# --- the stretch rule -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (480, 640),
        (1008, 1008),
        (1009, 1007),
        (1500, 2200),
        (2016, 504),
        (100, 80),
        (7, 13),
        (1, 1),
        (1, 500),
        (500, 1),
        (40, 3000),
        (3000, 40),
    ],
)
def test_stretch_equals_torch(height: int, width: int) -> None:
    import torch
    import torch.nn.functional as functional

    image = noise(height, width)
    pixels, place = preprocess(SAM3_IMAGE, image)
    assert pixels.shape == (1, 3, 1008, 1008)
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    assert place == ImageGeometry((height, width), (1008, 1008))
    scaled = torch.from_numpy(image).permute(2, 0, 1)[None].to(torch.float32) / 255
    resized = functional.interpolate(scaled, (1008, 1008), mode="bilinear", antialias=True)
    # 0.004 is half a level: rounding to uint8, or a filter without antialiasing, is far above.
    np.testing.assert_allclose(pixels, ((resized - 0.5) / 0.5).numpy(), atol=2e-4)


def test_stretch_into_a_rectangle() -> None:
    """Height and width of the encoder's input may differ; sizes are (height, width)."""
    spec = msgspec.structs.replace(SAM3_IMAGE, size=(20, 50))
    image = np.zeros((100, 100, 3), np.uint8)
    image[:, 50:] = 255
    pixels, place = preprocess(spec, image)
    assert pixels.shape == (1, 3, 20, 50)
    assert place.input_size == (20, 50)
    np.testing.assert_allclose(pixels[..., :24], -1)
    np.testing.assert_allclose(pixels[..., 26:], 1)


# --- the longest-side rule ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHOTOS)
def test_longest_side_equals_the_golden_data(name: str) -> None:
    folder = GOLDEN / "mobile_sam"
    entry = json.loads((folder / "cases.json").read_text())["photos"][name]
    image = photo(name)
    assert hashlib.sha256(image.tobytes()).hexdigest() == entry["rgb_sha256"]
    pixels, place = preprocess(MOBILE_IMAGE, image)
    assert place.original_size == (entry["height"], entry["width"])
    assert place.input_size == tuple(entry["input_size"])
    with np.load(folder / "golden.npz") as golden:
        expected = golden[f"{name}/preprocessed"]
    np.testing.assert_allclose(pixels[0, :, ::21, ::21], expected, atol=1e-6)
    # The golden data hold a hash of the whole resized image, so undo the normalization.
    height, width = place.input_size
    mean, std = (np.array(v)[:, None, None] for v in (MOBILE_IMAGE.mean, MOBILE_IMAGE.std))
    levels = np.round(pixels[0, :, :height, :width] * std + mean).astype(np.uint8)
    levels = np.ascontiguousarray(levels.transpose(1, 2, 0))
    assert hashlib.sha256(levels.tobytes()).hexdigest() == entry["resized_sha256"]


@given(size=image_sizes, pad=st.sampled_from([0.0, -1.5, 7.0]), seed=st.integers(0, 3))
@examples(30)
def test_longest_side_pads_below_and_right(size: tuple[int, int], pad: float, seed: int) -> None:
    spec = msgspec.structs.replace(MOBILE_IMAGE, size=(64, 64), pad_value=pad)
    image = noise(*size, seed)
    pixels, place = preprocess(spec, image)
    height, width = place.input_size
    assert pixels.shape == (1, 3, 64, 64)
    assert (pixels[..., height:, :] == pad).all()
    assert (pixels[..., :, width:] == pad).all()
    inside = pixels[0, :, :height, :width].transpose(1, 2, 0)
    resized = PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR)
    expected = (np.asarray(resized) - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(inside, expected, atol=1e-5)


@given(
    height=st.integers(1, 1 << 14),
    width=st.integers(1, 1 << 14),
    side=st.sampled_from([64, 1008, 1024, 1]),
)
@examples(300)
def test_longest_side_geometry(height: int, width: int, side: int) -> None:
    spec = msgspec.structs.replace(MOBILE_IMAGE, size=(side, side))
    place = geometry(spec, (height, width))
    assert place.original_size == (height, width)
    assert max(place.input_size) == side
    assert min(place.input_size) >= 1
    longest = max(height, width)
    for original, resized in zip((height, width), place.input_size, strict=True):
        assert abs(resized - max(1, original * side / longest)) <= 0.5 + 1e-9


# --- any rule -------------------------------------------------------------------------------------


VIEWS: dict[str, Any] = {
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "flipped rows": lambda a: a[::-1].copy()[::-1],
    "flipped columns": lambda a: a[:, ::-1].copy()[:, ::-1],
    "flipped channels": lambda a: a[..., ::-1].copy()[..., ::-1],
    "planes": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
    "transposed": lambda a: np.ascontiguousarray(a.transpose(1, 0, 2)).transpose(1, 0, 2),
    "Fortran order": np.asfortranarray,
    "cropped": lambda a: np.pad(a, ((3, 2), (1, 4), (0, 1)))[3:-2, 1:-4, :3],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("family", SPECS)
def test_views_give_what_copies_give(family: str, view: str) -> None:
    array = VIEWS[view](noise(41, 60))
    expected, place = preprocess(SPECS[family], array.copy())
    before = array.copy()
    array.flags.writeable = False
    actual, other_place = preprocess(SPECS[family], to_rgb(array))
    np.testing.assert_array_equal(actual, expected)
    assert place == other_place
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("family", SPECS)
def test_channels_are_normalized_apart(family: str) -> None:
    spec: ImageSpec = msgspec.structs.replace(
        SPECS[family], mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0)
    )
    image = np.empty((50, 50, 3), np.uint8)
    image[:] = (110, 120, 130)
    pixels, _ = preprocess(spec, image)
    for channel, value in enumerate((100.0, 50.0, 25.0)):
        np.testing.assert_allclose(pixels[0, channel], value, rtol=1e-6)


# --- coordinates ----------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)),
    x=st.floats(-1e4, 1e4, width=32),
    y=st.floats(-1e4, 1e4, width=32),
    family=st.sampled_from(sorted(SPECS)),
)
@examples(200)
def test_coordinates_follow_the_resize(
    size: tuple[int, int], x: float, y: float, family: str
) -> None:
    place = geometry(SPECS[family], size)
    (height, width), (input_height, input_width) = size, place.input_size
    coords = np.array([[x, y]], np.float32)
    pixels = place.to_input(coords, normalize=True)
    shares = place.to_input(coords, normalize=False)
    assert pixels.dtype == shares.dtype == np.float32
    np.testing.assert_allclose(
        pixels[0], [x / width * input_width, y / height * input_height], rtol=1e-6, atol=1e-30
    )
    np.testing.assert_allclose(
        shares[0], [x * input_width, y * input_height], rtol=1e-6, atol=1e-30
    )
    assert coords.tolist() == [[x, y]]
