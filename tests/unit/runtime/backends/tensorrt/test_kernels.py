"""The GPU's kernels, compiled for the CPU, against what the host computes."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support import cpu_kernels
from tests.support.helpers import (
    MOBILE_IMAGE,
    MOBILE_MASKS,
    SAM3_IMAGE,
    SAM3_MASKS,
    examples,
    noise,
    tiny_bundle,
)

from sam3rt.backends.tensorrt.imaging import MASKING, RESIZING, mask_job, resize_job
from sam3rt.bundle import ImageSpec, Manifest, MaskSpec
from sam3rt.geometry import geometry, preprocess, rows_first
from sam3rt.masks import MaskOptions, clean, finish, upsample

# Extreme shapes, shrinking, growing, both, and the sizes people use.
SIZES = [(1080, 1920), (300, 451), (1, 1), (7, 2000), (1500, 3), (1008, 1008), (90, 60)]


def with_rules(tmp_path: Path, image: ImageSpec, masks: MaskSpec) -> Manifest:
    return msgspec.structs.replace(tiny_bundle(tmp_path / "bundle"), image=image, masks=masks)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    return {
        "sam3": with_rules(tmp_path_factory.mktemp("sam3"), SAM3_IMAGE, SAM3_MASKS),
        "mobile": with_rules(tmp_path_factory.mktemp("mobile"), MOBILE_IMAGE, MOBILE_MASKS),
    }


def resized(spec: ImageSpec, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the kernels make of an image."""
    where = geometry(spec, (image.shape[0], image.shape[1]))
    pixels = np.full((1, 3, *spec.size), np.nan, np.float32)
    job = resize_job(spec, where, image=image.ctypes.data, pixels=pixels.ctypes.data)
    spans = np.empty((sum(where.input_size), 2), np.int32)
    rows, columns = where.input_size * job["taps"][0]
    weights = np.empty(rows + columns, np.float32)
    job["spans"], job["weights"] = spans.ctypes.data, weights.ctypes.data
    for name in RESIZING:
        cpu_kernels.run(name, job.ctypes.data)
    assert (spans[:, 1] >= 1).all()
    assert (spans[: where.input_size[0], 1] <= job["taps"][0, 0]).all()
    assert (spans[where.input_size[0] :, 1] <= job["taps"][0, 1]).all()
    return pixels


@pytest.mark.parametrize("size", SIZES)
def test_an_image_is_resized_as_by_the_host(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected, _ = preprocess(SAM3_IMAGE, image)
    np.testing.assert_allclose(resized(SAM3_IMAGE, image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(300, 451), (1500, 3)])
def test_padding_by_the_longest_side(size: tuple[int, int]) -> None:
    spec = msgspec.structs.replace(MOBILE_IMAGE, resize_dtype="float32", pad_value=-3.0)
    image = noise(*size)
    expected, where = preprocess(spec, image)
    pixels = resized(spec, image)
    np.testing.assert_allclose(pixels, expected, atol=1e-5, rtol=0)
    height, width = where.input_size
    assert (pixels[..., height:, :] == -3.0).all()
    assert (pixels[..., width:] == -3.0).all()


@pytest.mark.parametrize("size", [(1080, 1920), (720, 1280), (1500, 1503), (7, 2000), (60, 90)])
def test_rounding_to_levels_is_pillows_to_the_last_level(size: tuple[int, int]) -> None:
    """At 1080p and 720p the weights are such that many a level lies halfway."""
    image = noise(*size)
    expected, where = preprocess(MOBILE_IMAGE, image)
    assert not rows_first(where)
    np.testing.assert_array_equal(resized(MOBILE_IMAGE, image), expected)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
@examples(15)
def test_rounding_of_any_size(height: int, width: int, seed: int) -> None:
    image = noise(height, width, seed)
    if not rows_first(geometry(MOBILE_IMAGE, (height, width))):
        expected, _ = preprocess(MOBILE_IMAGE, image)
        np.testing.assert_array_equal(resized(MOBILE_IMAGE, image), expected)


@pytest.mark.parametrize(
    ("size", "first"), [((2000, 40), True), ((1080, 1920), False), ((300, 451), False)]
)
def test_pillows_order_of_axes(size: tuple[int, int], first: bool) -> None:
    """Where Pillow 13 begins with the rows, rounding comes out otherwise: the host does those."""
    assert rows_first(geometry(MOBILE_IMAGE, size)) == first


class Masks:
    """A job with its memory: logits [planes, h, w] to masks of an image's size."""

    def __init__(
        self,
        manifest: Manifest,
        logits: NDArray[np.float32],
        size: tuple[int, int],
        options: MaskOptions,
    ) -> None:
        where = geometry(manifest.image, size)
        self.logits = np.ascontiguousarray(logits)
        self.cleaned = np.full_like(self.logits, np.nan)
        self.search = np.full((2, *logits.shape), -7, np.int32)
        self.masks = np.full((len(logits), *size), 9, np.uint8)
        self.job = mask_job(
            manifest,
            len(logits),
            where,
            options,
            logits=self.logits.ctypes.data,
            cleaned=self.cleaned.ctypes.data,
            parents=self.search[0].ctypes.data,
            areas=self.search[1].ctypes.data,
            masks=self.masks.ctypes.data,
        )

    def run(self, *kernels: str) -> None:
        for name in kernels:
            cpu_kernels.run(name, self.job.ctypes.data)

    def run_in_parts(self, threads: int, *kernels: str) -> None:
        """Each kernel by several threads at once, which take turns on the rows."""
        library = cpu_kernels.load(cpu_kernels.SOURCE.read_text())

        def part(name: str, first: int) -> None:
            library.take_blocks(first, threads)
            try:
                cpu_kernels.run(name, self.job.ctypes.data)
            finally:
                library.take_blocks(0, 1)

        with ThreadPoolExecutor(threads) as pool:
            for name in kernels:
                list(pool.map(part, [name] * threads, range(threads)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["sam3", "mobile"])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_masks_equal_the_hosts(
    name: str, size: tuple[int, int], threshold: float, manifests: dict[str, Manifest]
) -> None:
    manifest = manifests[name]
    side = manifest.masks.low_res_size[0]
    blocks = np.random.default_rng(0).normal(0, 8, (3, side // 8, side // 8))
    logits = blocks.repeat(8, 1).repeat(8, 2).astype(np.float32)
    work = Masks(manifest, logits, size, MaskOptions(threshold))
    work.run(*MASKING)
    where = geometry(manifest.image, size)
    for mask, source in zip(work.masks, logits, strict=True):
        values = np.empty(size, np.float32)
        upsample(source, where, manifest.image, manifest.masks, values)
        clear = np.abs(values - threshold) > 1e-5 * np.abs(values).max()
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(mask[clear], (values > threshold)[clear])


@pytest.mark.parametrize("name", ["sam3", "mobile"])
def test_holes_and_islands_go_before_the_upsampling(
    name: str, manifests: dict[str, Manifest]
) -> None:
    manifest = manifests[name]
    logits = speckled(np.random.default_rng(2), (4, *manifest.masks.low_res_size))
    options = MaskOptions(0.5, 40.0, 25.0, dtype=np.uint8)
    work = Masks(manifest, logits, (300, 451), options)
    work.run(*MASKING)
    where = geometry(manifest.image, (300, 451))
    expected = finish(logits[None], where, manifest.image, manifest.masks, options)[0]
    assert (work.masks != expected).mean() <= 1e-5
    unclean = finish(logits[None], where, manifest.image, manifest.masks, MaskOptions(0.5))[0]
    assert (unclean != expected).mean() > 1e-3


def speckled(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Blobs with holes and islands of all sizes."""
    coarse = rng.normal(0, 4, (shape[0], -(-shape[1] // 8), -(-shape[2] // 8)))
    smooth = coarse.repeat(8, 1).repeat(8, 2)[:, : shape[1], : shape[2]]
    result: NDArray[np.float32] = (smooth + rng.normal(0, 2, shape)).astype(np.float32)
    return result


def cleaned(
    manifest: Manifest, logits: NDArray[np.float32], options: MaskOptions, threads: int = 1
) -> NDArray[np.float32]:
    """The logits of one mask without its small components."""
    spec = msgspec.structs.replace(manifest.masks, low_res_size=logits.shape)
    work = Masks(msgspec.structs.replace(manifest, masks=spec), logits[None], (4, 4), options)
    if threads == 1:
        work.run(*MASKING[:-1])
    else:
        work.run_in_parts(threads, *MASKING[:-1])
    result: NDArray[np.float32] = work.cleaned[0]
    return result


def worms(height: int, width: int) -> NDArray[np.float32]:
    """A spiral, a comb and a chessboard: long ways from a pixel to its root."""
    logits = np.full((height, width), -1, np.float32)
    top, left, bottom, right = 0, 0, height - 1, width // 2 - 1
    while top <= bottom and left <= right:
        logits[top, left : right + 1] = logits[bottom, left : right + 1] = 1
        logits[top : bottom + 1, right] = 1
        logits[top + 2 : bottom + 1, left] = 1
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    half = width // 2
    logits[: height // 2, half::2] = 1
    logits[height // 2, half:] = 1
    logits[height // 2 + 2 :, half:] = (
        np.indices((height - height // 2 - 2, width - half)).sum(0) % 2
    )
    return logits


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (33, 64), (288, 288)])
@pytest.mark.parametrize("areas", [(0, 0), (1, 0), (0, 3.5), (40, 25), (1e9, 1e9), (0.5, 0.5)])
def test_small_components_are_the_hosts(
    shape: tuple[int, int], areas: tuple[float, float], manifests: dict[str, Manifest]
) -> None:
    rng = np.random.default_rng(1)
    patterns = [rng.normal(0, 1, shape).astype(np.float32), speckled(rng, (1, *shape))[0]]
    if min(shape) > 8:
        patterns.append(worms(*shape))
    for logits in patterns:
        logits.flat[:: 7 * 11] = np.nan  # neither above the threshold nor below
        options = MaskOptions(0.25, *areas)
        found = cleaned(manifests["sam3"], logits, options)
        if max(areas) < 1:
            assert np.isnan(found).all()  # there is nothing to clean, and nobody reads it
        else:
            np.testing.assert_array_equal(found, clean(logits, 0.25, *areas))


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 9999), st.floats(0.2, 0.8))
@examples(60)
def test_components_of_any_mask(
    manifests: dict[str, Manifest], height: int, width: int, seed: int, share: float
) -> None:
    inside = np.random.default_rng(seed).random((height, width)) < share
    logits = np.where(inside, 3, -3).astype(np.float32)
    for areas in ((4, 4), (30, 2)):
        found = cleaned(manifests["sam3"], logits, MaskOptions(0.0, *areas))
        np.testing.assert_array_equal(found, clean(logits, 0.0, *areas))


def test_many_threads_at_once_find_the_same_components(manifests: dict[str, Manifest]) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        for logits in (speckled(rng, (1, 288, 288))[0], worms(288, 288)):
            found = cleaned(manifests["sam3"], logits, MaskOptions(0.0, 60, 60), threads=8)
            np.testing.assert_array_equal(found, clean(logits, 0.0, 60, 60))


def test_nothing_is_touched_where_there_is_nothing_to_make(manifests: dict[str, Manifest]) -> None:
    work = Masks(manifests["sam3"], np.zeros((1, 288, 288), np.float32), (8, 8), MaskOptions())
    work.job["planes"] = 0
    for pointer in ("logits", "cleaned", "parents", "areas", "masks"):
        work.job[pointer] = 0
    work.run(*MASKING)
    assert (work.masks == 9).all()


@pytest.mark.parametrize("architecture", ["sm_75", "sm_89", "sm_120"])
def test_the_cuda_compiler_takes_the_source(architecture: str, tmp_path: Path) -> None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("there is no CUDA compiler")
    target = str(tmp_path / "kernels.cubin")
    flags = ["-cubin", f"-arch={architecture}", "--fmad=false", "-Werror", "all-warnings"]
    subprocess.run([compiler, *flags, "-o", target, str(cpu_kernels.SOURCE)], check=True)


def test_the_jobs_are_laid_out_as_in_the_source(tmp_path: Path) -> None:
    """Sizes and offsets, asked of the compiler."""
    from sam3rt.backends.tensorrt.imaging import MASK_JOB, RESIZE_JOB

    checks = ['#include "kernels.cu"', "#include <cstddef>"]
    jobs: tuple[tuple[str, Any], ...] = (("ResizeJob", RESIZE_JOB), ("MaskJob", MASK_JOB))
    for name, dtype in jobs:
        checks.append(f"static_assert(sizeof({name}) == {dtype.itemsize});")
        for field, (_, offset) in dtype.fields.items():
            checks.append(f"static_assert(offsetof({name}, {field}) == {offset});")
    shutil.copy(cpu_kernels.SOURCE, tmp_path / "kernels.cu")
    cpu_kernels.load((tmp_path / "kernels.cu").read_text() + "\n" + "\n".join(checks[1:]))
