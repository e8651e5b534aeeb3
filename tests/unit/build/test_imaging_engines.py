"""The graphs around the network build in TensorRT for RTX, ahead of time and without a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import tensorrt_rtx as trt
from tests.unit.build.test_tensorrt_rtx import LOGGER, parse

from sam3rt.bundle import open_bundle
from sam3rt_build import imaging_graphs as imaging


@pytest.mark.parametrize("kind", ["preprocess", "postprocess"])
def test_imaging_graph_parses_and_builds(kind: str, bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(bundle, check_files=False).manifest
    path = tmp_path / f"{kind}.onnx"
    onnx.save(getattr(imaging, f"{kind}_graph")(manifest), path)
    builder = trt.Builder(LOGGER)
    network, errors = parse(builder, path)
    assert errors == []
    types = {t.name: t.dtype for t in (network.get_input(i) for i in range(network.num_inputs))}
    if kind == "preprocess":
        assert types["image"] == trt.uint8
        output = network.get_output(0)
        assert (output.name, output.dtype) == (manifest.encoder.inputs[0].name, trt.float32)
    else:
        assert network.get_output(0).dtype == trt.uint8

    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, shapes in getattr(imaging, f"{kind}_shapes")(manifest, 4096).items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 10_000
