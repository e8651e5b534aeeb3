"""TensorRT for RTX: its runtime configuration, the kernels it compiles, and engines read in pieces.

The stand-in raises where a graph would keep fallback kernels, and where nobody asked whether a run
can be recorded.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from tests.support.fake_tensorrt import RuntimeCache
from tests.support.tensorrt_helpers import Rig, make_rig

from sam3rt import BackendError, Prompts, SegmentationModel, load_model
from sam3rt.backends.tensorrt import trt

PROMPTS = Prompts([[225, 150]], [1])


@pytest.fixture
def rig(tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch, rtx=True)
    rig.build()
    return rig


def serve(rig: Rig) -> SegmentationModel:
    """One image and two clicks, the second a recorded one, compared with ONNX Runtime."""
    model = rig.model()
    reference = load_model(rig.bundle.path, backend="onnxruntime", device="cpu", check_files=False)
    image = np.random.default_rng(0).integers(0, 256, (300, 451, 3), np.uint8)
    embedding = model.encode(image)
    expected = reference.decode(reference.encode(image), PROMPTS).low_res_masks
    for _ in range(2):
        found = model.decode(embedding, PROMPTS).low_res_masks
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-5)
    return model


def kernels_file(rig: Rig) -> Path:
    (path,) = rig.bundle.path.glob("engines/*/kernels-sm89.cache")
    return path


def test_runs_are_recorded_with_their_own_kernels(rig: Rig) -> None:
    model = serve(rig)
    assert rig.cuda.live["graphs"] == 2, model
    assert rig.cuda.count("launch") >= 1


def test_an_engine_that_allocates_itself_runs_without_a_graph(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rig.build(user_memory=False)
    model = serve(rig)
    assert rig.cuda.live["graphs"] == 0, model
    assert "without a CUDA graph: tensorrt-rtx refuses to be recorded" in caplog.text


def test_what_was_compiled_is_kept_beside_the_engine(rig: Rig) -> None:
    serve(rig)
    assert len(rig.trt.compiled) == 2
    content = kernels_file(rig).read_bytes()
    serve(rig)
    # Another model of this process starts with what is in the file.
    assert len(rig.trt.compiled) == 2
    assert kernels_file(rig).read_bytes() == content


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_ignored_and_replaced(
    damage: str, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    serve(rig)
    path = kernels_file(rig)
    content = path.read_bytes()
    wrong = {"cut": content[:-1], "changed": content[:-1] + b"?", "empty": b""}[damage]
    path.write_bytes(wrong)
    serve(rig)
    assert f"{path} is damaged" in caplog.text
    assert len(rig.trt.compiled) == 4
    assert path.read_bytes() == content


def test_a_file_of_another_driver_is_replaced(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(rig)
    monkeypatch.setattr(RuntimeCache, "ENVIRONMENT", "driver 600")
    serve(rig)
    assert len(rig.trt.compiled) == 4
    assert b"driver 600" in kernels_file(rig).read_bytes()


def test_a_folder_that_cannot_be_written_to_does_no_harm(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def refuse(path: Path) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(trt, "atomic_write", refuse)
    serve(rig)
    assert "compiled kernels are not kept: read-only file system" in caplog.text


def test_a_version_without_a_reader_gets_the_whole_engine(rig: Rig) -> None:
    del rig.trt.IStreamReaderV2
    serve(rig)


def test_a_file_that_cannot_be_read_is_an_engine_that_cannot_be_loaded(rig: Rig) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError("input/output error")

    with pytest.raises(BackendError, match="cannot load x"):
        rig.platform.library.load(Broken(b"{}"), "x")
