"""Tests of `tests.support.torch_lanes` on the fake GPU, before it stands in on a real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.fake_cuda import FakeCuda
from tests.support.helpers import noise
from tests.support.tensorrt_helpers import DRIVER, GPU
from tests.support.torch_lanes import StandInBackend

from sam3rt import Prompts, SegmentationModel, open_bundle
from sam3rt.backends.tensorrt.driver import Device
from sam3rt_build.ort_graphs import typed_graph

CLICK = Prompts(point_coords=[[4.0, 4.0]], point_labels=[1])


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def stand_in(tiny_sam3: Path, cuda: FakeCuda) -> SegmentationModel:
    bundle = open_bundle(tiny_sam3)
    device = Device(0, GPU, cuda.total, DRIVER, (13, 0))
    return SegmentationModel(bundle, StandInBackend(bundle, cuda, device))


def test_it_computes_what_the_runtime_does(
    stand_in: SegmentationModel, tiny_model: SegmentationModel, cuda: FakeCuda
) -> None:
    image = noise(9, 12)
    here, there = stand_in.encode(image), tiny_model.encode(image)
    for _ in range(3):  # queued, recorded, replayed
        found, masks = stand_in.segment(here, CLICK)
        expected, reference = tiny_model.segment(there, CLICK)
        assert np.abs(found.low_res_masks - expected.low_res_masks).max() < 1e-3
        assert (masks != reference).mean() < 1e-3
    assert cuda.live["graphs"] == 2
    assert stand_in.health().healthy


def test_typed_graphs_run_in_their_types(tiny_sam3: Path, cuda: FakeCuda) -> None:
    bundle = open_bundle(tiny_sam3)
    device = Device(0, GPU, cuda.total, DRIVER, (13, 0))
    graphs = tuple(typed_graph(bundle, role, "fp16")[0] for role in ("encoder", "decoder"))  # type: ignore[arg-type]
    model = SegmentationModel(bundle, StandInBackend(bundle, cuda, device, graphs))  # type: ignore[arg-type]
    embedding = model.encode(noise(9, 12))
    assert {array.dtype.name for array in embedding.features.arrays()} == {"float16"}
    assert np.isfinite(model.decode(embedding, CLICK).low_res_masks).all()
