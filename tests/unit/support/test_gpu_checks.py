"""Tests of `tests.support.gpu_checks`: on the fake GPU they pass, and they see what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import gpu_checks
from tests.support.fake_cuda import FakeCuda
from tests.support.tensorrt_helpers import DRIVER, GPU
from tests.support.torch_lanes import StandInBackend

from sam3rt import SegmentationModel, open_bundle
from sam3rt.backends.tensorrt.cuda import Cuda
from sam3rt.backends.tensorrt.driver import Device


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def model(tiny_sam3: Path, cuda: FakeCuda) -> SegmentationModel:
    bundle = open_bundle(tiny_sam3)
    device = Device(0, GPU, cuda.total, DRIVER, (13, 0))
    return SegmentationModel(bundle, StandInBackend(bundle, cuda, device))


@pytest.mark.parametrize("check", gpu_checks.CUDA_CHECKS, ids=lambda check: check.__name__)
def test_the_fake_gpu_passes_and_gets_everything_back(
    check: Callable[[Cuda], Any], cuda: FakeCuda
) -> None:
    assert check(cuda)
    assert set(cuda.live.values()) == {0}


def test_dlpack(cuda: FakeCuda) -> None:
    gpu_checks.check_dlpack(cuda, np)


@pytest.mark.slow
def test_kernels_threads_and_leaks(model: SegmentationModel, cuda: FakeCuda) -> None:
    assert isinstance(model.backend, StandInBackend)
    figures = gpu_checks.check_kernels(model.backend)
    assert 0 < figures["largest error of a pixel"] < 1e-5
    gpu_checks.check_threads(model)
    gpu_checks.check_leaks(model, lambda: cuda.used)


def test_a_copy_that_does_nothing_is_seen(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCuda, "copy", lambda *_: None)
    with pytest.raises(AssertionError):
        gpu_checks.check_copies(cuda)
    with pytest.raises(AssertionError):
        gpu_checks.check_capture(FakeCuda())


def test_kernels_that_are_off_are_seen(
    model: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StandInBackend.pixels
    monkeypatch.setattr(
        StandInBackend, "pixels", lambda self, *given: original(self, *given) + 0.01
    )
    assert isinstance(model.backend, StandInBackend)
    with pytest.raises(AssertionError, match="pixel"):
        gpu_checks.check_kernels(model.backend)


def test_a_leak_is_seen(model: SegmentationModel) -> None:
    readings = iter([0, 1 << 29, 1 << 30])
    with pytest.raises(AssertionError, match=r"6 calls took .* by and by, in MB: 537, 1074"):
        gpu_checks.check_leaks(model, lambda: next(readings), rounds=6)
