"""Tensors that lie where a bundle does not say, in C++: refused as the Python runtime does."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.support.cpp_driver import Build, Result
from tests.support.helpers import flip
from tests.unit.runtime.bundle import test_onnx_locations as places

from sam3rt import BundleError
from sam3rt.bundle.default import default_bundle_path
from sam3rt.bundle.onnx_locations import check_tensor_locations


def outcomes(build: Build, contents: list[bytes], tmp_path: Path) -> list[Result]:
    """Check files in both runtimes, which must agree; the C++ runtime's results."""
    beside = [[entry.file, entry.bytes] for entry in places.BESIDE]
    steps = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(content)
        steps.append({"op": "tensor_places", "path": path, "beside": beside})
    results = build.run(steps)
    for content, result in zip(contents, results, strict=True):
        try:
            check_tensor_locations(content, "m.onnx", places.BESIDE)
        except BundleError:
            result.refusal("BundleError", "m.onnx")
        else:
            assert result.error is None, result.error
    return results


def test_no_tensor_is_overlooked(cpp_build: Build, tmp_path: Path) -> None:
    inside = places.tensor(location="weights.data", length=16)
    outside = places.tensor(location="elsewhere.data")
    contents = [
        places.hide(kind, found) for kind in places.HIDING_PLACES for found in (inside, outside)
    ]
    refused = [result.error is not None for result in outcomes(cpp_build, contents, tmp_path)]
    assert refused == [False, True] * len(places.HIDING_PLACES)


def test_other_places(cpp_build: Build, tmp_path: Path) -> None:
    found = [places.tensor(location=location) for location in places.LOCATIONS]
    found += [
        places.tensor(location="weights.data", **place)
        for place in (
            {"offset": 90, "length": 11},
            {"offset": 101},
            {"length": "-1"},
            {"offset": "1e3"},
            {"length": "9" * 19},
            {"offset": ""},
        )
    ]
    found += [places.tensor(), places.tensor(offset=0)]
    twice = places.tensor(location="weights.data")
    twice.external_data.add(key="location", value="weights.data")
    contents = [places.model(tensor).SerializeToString() for tensor in [*found, twice]]
    assert all(result.error for result in outcomes(cpp_build, contents, tmp_path))
    whole = places.model(places.tensor(location="weights.data", offset=84, length=16))
    assert outcomes(cpp_build, [whole.SerializeToString()], tmp_path)[0].error is None


def test_what_is_no_onnx_file(cpp_build: Build, tmp_path: Path) -> None:
    whole = places.hide("sparse attribute", places.tensor(location="weights.data", length=16))
    rng = np.random.default_rng(2)
    contents = [b"", b"\0\0\0\0ORTM", b"\xff" * 20, b"\x0b", b"\x08" + b"\x80" * 12]
    contents += [places.nested(depth) for depth in (10, 1000)]
    contents += [whole[:length] for length in range(len(whole))]
    contents += [flip(whole, bit) for bit in range(0, len(whole) * 8, 3)]
    contents += [rng.bytes(40) for _ in range(100)]
    results = outcomes(cpp_build, contents, tmp_path)
    assert sum(result.error is not None for result in results) > 200


def test_graph_that_reads_memory(cpp_build: Build, tmp_path: Path) -> None:
    """ONNX Runtime itself would read this process's memory at the address."""
    secret = ctypes.create_string_buffer(1 << 20)
    for name, location in (("memory", "*/_ORT_MEM_ADDR_/*"), ("file", "../secret")):
        (tmp_path / name).mkdir()
        address = ctypes.addressof(secret) if name == "memory" else 0
        path = places.hostile(tmp_path / name, places.move_a_weight(location, address))
        load, prepare = cpp_build.run(
            [{"op": "load_model", "model": "m", "path": path}, {"op": "prepare", "model": "m"}]
        )
        assert load.error is None
        assert "data lie in" in prepare.refusal("BundleError", "decoder.onnx")


@pytest.mark.parametrize("check_files", [True, False])
def test_link_out_of_the_bundle(cpp_build: Build, tmp_path: Path, check_files: bool) -> None:
    path = tmp_path / "linked"
    shutil.copytree(default_bundle_path(), path)
    (path / "decoder.onnx").rename(tmp_path / "outside")
    (path / "decoder.onnx").symlink_to(tmp_path / "outside")
    steps = [
        {"op": "load_model", "model": "m", "path": path, "check_files": check_files},
        {"op": "prepare", "model": "m"},
    ]
    results = cpp_build.run(steps[: 1 if check_files else 2])
    assert "link" in results[-1].refusal("BundleError", "decoder.onnx")
