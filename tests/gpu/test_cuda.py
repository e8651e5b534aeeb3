"""The CUDA layer on the real GPU, and whatever there are of more than one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.gpu.conftest import FAKE, Card
from tests.support import gpu_checks

from sam3rt import open_bundle
from sam3rt.backends.tensorrt.cuda import Cuda
from sam3rt.backends.tensorrt.driver import probe_all
from sam3rt.bundle.default import default_bundle_path


@pytest.mark.parametrize("check", gpu_checks.CUDA_CHECKS, ids=lambda check: check.__name__)
def test_the_layer(check: Callable[[Cuda], Any], card: Card) -> None:
    check(card.cuda)
    assert card.cuda.lost is None


@pytest.mark.parametrize("library", ["numpy"] if FAKE else ["torch", "cupy"])
def test_device_memory_by_dlpack(library: str, card: Card) -> None:
    pytest.importorskip(library)
    gpu_checks.check_dlpack(card.cuda, importlib.import_module(library))


@pytest.mark.parametrize("model", ["MobileSAM", "SAM 3"])
def test_kernels_do_what_the_host_does(model: str, card: Card, typed_bundle: Path) -> None:
    """Each model has its own rules for resizing and masks."""
    pytest.importorskip("torch")
    from tests.support.torch_lanes import StandInBackend

    bundle = open_bundle(default_bundle_path() if model == "MobileSAM" else typed_bundle)
    backend = StandInBackend(bundle, card.cuda, card.device)
    gpu_checks.check_kernels(backend)
    backend.close()


def test_the_callers_gpu_stays_current() -> None:
    if FAKE or len(probe_all()) < 2:
        pytest.skip("there is one GPU")
    from cuda.bindings import runtime

    first, second = Cuda(0), Cuda(1)
    with second.active():
        with first.active():
            address = first.allocate(1 << 20)
            first.free(address)
        _, current = runtime.cudaGetDevice()
        assert int(current) == 1


def test_two_gpus_answer_alike(typed_bundle: Path) -> None:
    if FAKE or len(probe_all()) < 2:
        pytest.skip("there is one GPU")
    pytest.importorskip("torch")
    from tests.support.torch_lanes import StandInBackend

    bundle = open_bundle(typed_bundle)
    image = gpu_checks.picture(60, 80)
    maps = []
    for device in probe_all()[:2]:
        backend = StandInBackend(bundle, Cuda(device.index), device)
        where = gpu_checks.geometry(bundle.manifest.image, (60, 80))
        maps.append(backend.encode_image(image, where).numpy())
        backend.close()
    for a, b in zip(*maps, strict=True):
        assert np.abs(a - b).max() <= 1e-2 * np.abs(a).max()
