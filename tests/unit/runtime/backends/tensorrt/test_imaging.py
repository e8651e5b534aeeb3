"""Preprocessing and postprocessing as matrix products, against Pillow, PyTorch and the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.helpers import (
    MOBILE_IMAGE,
    MOBILE_MASKS,
    SAM3_IMAGE,
    SAM3_MASKS,
    examples,
    noise,
    tiny_bundle,
)

from sam3rt.bundle import ImageSpec, Manifest, MaskSpec
from sam3rt.geometry import geometry, preprocess, resize_matrices, rows_first
from sam3rt.masks import upsample
from sam3rt.masks.upsampling import upsampling_matrices
from sam3rt_build import imaging_graphs as imaging

# Extreme shapes, shrinking, growing, both, and the sizes people use.
SIZES = [(1080, 1920), (300, 451), (1, 1), (7, 2000), (1500, 3), (1008, 1008), (90, 60)]


def session(model: Any) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def with_rules(tmp_path: Path, image: ImageSpec, masks: MaskSpec) -> Manifest:
    return msgspec.structs.replace(tiny_bundle(tmp_path / "bundle"), image=image, masks=masks)


@pytest.fixture(scope="module")
def sam3(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return with_rules(tmp_path_factory.mktemp("sam3"), SAM3_IMAGE, SAM3_MASKS)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return with_rules(tmp_path_factory.mktemp("mobile"), MOBILE_IMAGE, MOBILE_MASKS)


@pytest.fixture(scope="module")
def sessions(sam3: Manifest, mobile: Manifest) -> dict[tuple[str, str], ort.InferenceSession]:
    return {
        (name, kind): session(getattr(imaging, f"{kind}_graph")(manifest))
        for name, manifest in (("sam3", sam3), ("mobile", mobile))
        for kind in ("preprocess", "postprocess")
    }


def run_preprocess(
    session: ort.InferenceSession, manifest: Manifest, image: NDArray[np.uint8]
) -> NDArray[np.float32]:
    place = geometry(manifest.image, (image.shape[0], image.shape[1]))
    rows, columns = resize_matrices(manifest.image, place)
    feed = {imaging.IMAGE: image, imaging.ROWS: rows, imaging.COLUMNS: columns}
    result: NDArray[np.float32] = session.run([imaging.PIXELS], feed)[0]
    return result


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_equals_pillows_float_resize(
    size: tuple[int, int], sam3: Manifest, sessions: dict[Any, ort.InferenceSession]
) -> None:
    image = noise(*size)
    pixels = run_preprocess(sessions["sam3", "preprocess"], sam3, image)
    planes = [
        np.asarray(
            PIL.Image.fromarray(image[..., c].astype(np.float32)).resize(
                (1008, 1008), PIL.Image.Resampling.BILINEAR
            )
        )
        for c in range(3)
    ]
    expected = (np.stack(planes) - 127.5) / 127.5
    np.testing.assert_allclose(pixels[0], expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(pixels, preprocess(sam3.image, image)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(300, 451), (1080, 1920), (7, 2000), (1500, 3)])
def test_padding_by_the_longest_side(
    size: tuple[int, int], mobile: Manifest, sessions: dict[Any, ort.InferenceSession]
) -> None:
    """Without rounding: what is left is the resize and where the padding begins."""
    spec = msgspec.structs.replace(MOBILE_IMAGE, resize_dtype="float32", pad_value=-3.0)
    manifest = msgspec.structs.replace(mobile, image=spec)
    image = noise(*size)
    pixels = run_preprocess(session(imaging.preprocess_graph(manifest)), manifest, image)
    expected, place = preprocess(spec, image)
    np.testing.assert_allclose(pixels, expected, atol=1e-5, rtol=0)
    height, width = place.input_size
    assert (pixels[..., height:, :] == -3.0).all()
    assert (pixels[..., width:] == -3.0).all()


@pytest.mark.parametrize("size", [(1080, 1920), (720, 1280), (1500, 1503), (7, 2000), (60, 90)])
def test_rounding_to_levels_is_pillows_to_the_last_level(
    size: tuple[int, int], mobile: Manifest, sessions: dict[Any, ort.InferenceSession]
) -> None:
    """At 1080p and 720p the weights are such that many a level lies halfway."""
    image = noise(*size)
    pixels = run_preprocess(sessions["mobile", "preprocess"], mobile, image)
    np.testing.assert_array_equal(pixels, preprocess(mobile.image, image)[0])


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
@examples(15)
def test_rounding_of_any_size(
    mobile: Manifest,
    sessions: dict[Any, ort.InferenceSession],
    height: int,
    width: int,
    seed: int,
) -> None:
    image = noise(height, width, seed)
    if not rows_first(geometry(mobile.image, (height, width))):
        pixels = run_preprocess(sessions["mobile", "preprocess"], mobile, image)
        np.testing.assert_array_equal(pixels, preprocess(mobile.image, image)[0])


@pytest.mark.parametrize(
    ("size", "first"), [((2000, 40), True), ((1080, 1920), False), ((300, 451), False)]
)
def test_pillows_order_of_axes(
    size: tuple[int, int],
    first: bool,
    mobile: Manifest,
    sessions: dict[Any, ort.InferenceSession],
) -> None:
    """Where Pillow begins with the rows, rounding comes out otherwise: the host resizes those."""
    image = noise(*size)
    place = geometry(mobile.image, size)
    assert rows_first(place) == first
    pixels = run_preprocess(sessions["mobile", "preprocess"], mobile, image)
    expected, _ = preprocess(mobile.image, image)
    levels = np.abs(pixels - expected) * np.array(MOBILE_IMAGE.std)[:, None, None]
    height, width = place.input_size
    off = (levels[..., :height, :width] > 0.5).mean()
    assert (off > 0) == first


@given(st.integers(1, 400), st.integers(1, 400))
@examples(60)
def test_resize_matrices_are_averages(height: int, width: int) -> None:
    for spec in (SAM3_IMAGE, MOBILE_IMAGE):
        place = geometry(spec, (height, width))
        rows, columns = resize_matrices(spec, place)
        assert rows.shape == (spec.size[0], height)
        assert columns.shape == (width, spec.size[1])
        for sums, filled in (
            (rows.sum(axis=1), place.input_size[0]),
            (columns.sum(axis=0), place.input_size[1]),
        ):
            np.testing.assert_allclose(sums[:filled], 1, atol=1e-5)
            assert (sums[filled:] == 0).all()
        assert rows.min() >= 0


def run_postprocess(
    session: ort.InferenceSession,
    manifest: Manifest,
    logits: NDArray[np.float32],
    size: tuple[int, int],
    threshold: float,
) -> NDArray[np.uint8]:
    place = geometry(manifest.image, size)
    rows, columns = upsampling_matrices(
        manifest.masks.low_res_size,
        manifest.image.size,
        place.input_size,
        size,
        manifest.masks.upsampling,
    )
    feed = {
        imaging.LOGITS: logits,
        imaging.ROWS: rows,
        imaging.COLUMNS: columns,
        imaging.THRESHOLD: np.array([threshold], np.float32),
    }
    result: NDArray[np.uint8] = session.run([imaging.MASKS], feed)[0]
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["sam3", "mobile"])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_postprocessing_equals_the_hosts(
    name: str,
    size: tuple[int, int],
    threshold: float,
    sam3: Manifest,
    mobile: Manifest,
    sessions: dict[Any, ort.InferenceSession],
) -> None:
    manifest = {"sam3": sam3, "mobile": mobile}[name]
    rng = np.random.default_rng(0)
    side = manifest.masks.low_res_size[0]
    logits = rng.normal(0, 8, (3, side // 8, side // 8)).repeat(8, 1).repeat(8, 2)
    logits = logits.astype(np.float32)
    masks = run_postprocess(sessions[name, "postprocess"], manifest, logits, size, threshold)
    assert masks.dtype == np.uint8
    assert masks.shape == (3, *size)
    place = geometry(manifest.image, size)
    for mask, source in zip(masks, logits, strict=True):
        values = np.empty(size, np.float32)
        upsample(source, place, manifest.image, manifest.masks, values)
        clear = np.abs(values - threshold) > 1e-5 * np.abs(values).max()
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(mask[clear], (values > threshold)[clear])


@pytest.mark.parametrize("size", [(1080, 1920), (300, 451), (7, 2000), (90, 60)])
def test_upsampling_by_matrices_equals_pytorch(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(0, 8, (288, 288)).astype(np.float32)
    place = geometry(SAM3_IMAGE, size)
    rows, columns = upsampling_matrices(
        (288, 288), SAM3_IMAGE.size, place.input_size, size, "direct"
    )
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None, None], size, mode="bilinear", align_corners=False
    )[0, 0].numpy()
    np.testing.assert_allclose(rows @ (logits @ columns), expected, atol=1e-5, rtol=1e-6)


def test_shapes_hold_what_the_graphs_take(sam3: Manifest, mobile: Manifest) -> None:
    for manifest in (sam3, mobile):
        for kind in ("preprocess", "postprocess"):
            model = getattr(imaging, f"{kind}_graph")(manifest)
            for side in (1, 512, 4096):
                shapes = getattr(imaging, f"{kind}_shapes")(manifest, side)
                assert list(shapes) == [entry.name for entry in model.graph.input]
                for entry in model.graph.input:
                    declared = entry.type.tensor_type.shape.dim
                    for least, typical, most, dim in zip(
                        *shapes[entry.name], declared, strict=True
                    ):
                        assert 1 <= least <= typical <= most
                        if dim.dim_value:
                            assert least == most == dim.dim_value
