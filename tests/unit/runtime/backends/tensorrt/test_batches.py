"""Several images in one run of the encoder, and uploads while another image is encoded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.helpers import noise
from tests.support.tensorrt_helpers import Rig, make_rig

from sam3rt import BackendError, SAM3InteractiveImagePredictor, load_model
from sam3rt.backends.tensorrt.backend import allow_imaging
from sam3rt.backends.tensorrt.encoder import EncoderLane
from sam3rt.backends.tensorrt.lane import Lane

SIZES = [(60, 90), (300, 451), (45, 8), (8, 8), (100, 100)]


@pytest.fixture
def rig(tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build(max_batch=2)
    return rig


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_batch_is_encoded_together(on_device: bool, rig: Rig) -> None:
    images = [noise(*size) for size in SIZES]
    model = rig.model(lanes=1)
    if on_device:
        allow_imaging(model.backend)
        assert model.backend.imaging.preprocess_allowed
    reference = load_model(rig.source, backend="onnxruntime", device="cpu")
    for _ in range(2):
        rig.cuda.log.clear()
        found = model.encode_batch(images)
        # Two, two and one.
        assert rig.cuda.count("enqueue") + rig.cuda.count("launch") == 3
        for embedding, image in zip(found, images, strict=True):
            expected = reference.encode(image).numpy()
            for name, array in embedding.numpy().items():
                np.testing.assert_allclose(array, expected[name], atol=1e-4, rtol=0)
    predictor = SAM3InteractiveImagePredictor(model)
    predictor.set_image_batch(images)
    masks, _, _ = predictor.predict_batch([[[4.0, 4.0]]] * 5, [[1]] * 5)
    assert [mask.shape[-2:] for mask in masks] == SIZES


def test_single_images_and_batches_take_turns(rig: Rig) -> None:
    images = [noise(*size) for size in SIZES]
    model = rig.model(lanes=1)
    expected = [model.encode(image).numpy() for image in images]
    model.encode_batch(images)
    for image, maps in zip(images, expected, strict=True):
        for name, array in model.encode(image).numpy().items():
            np.testing.assert_array_equal(array, maps[name])


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_the_next_images_are_brought_while_these_are_encoded(
    on_device: bool, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rig.model(lanes=2)
    if on_device:
        allow_imaging(model.backend)
    brought: Callable[..., Any] = type(model.backend)._bring
    name = "encode_images" if on_device else "encode"
    encode: Callable[..., Any] = getattr(EncoderLane, name)
    seen: list[int] = []
    both = threading.Event()

    def noted(backend: Any, images: Any, places: Any) -> Any:
        found = brought(backend, images, places)
        seen.append(len(images))
        if len(seen) == 2:
            both.set()
        return found

    def slowly(lane: EncoderLane, images: Any) -> Any:
        assert both.wait(60)
        # And no more than the next.
        assert len(seen) <= 3
        return encode(lane, images)

    monkeypatch.setattr(type(model.backend), "_bring", noted)
    monkeypatch.setattr(EncoderLane, name, slowly)
    stages: list[str] = []
    model.on_stage = lambda stage, seconds: stages.append(stage)
    assert len(model.encode_batch([noise(*size) for size in SIZES])) == 5
    assert seen == [2, 2, 1]
    assert stages == ["encode"] * 3 if on_device else ["preprocess", "encode"] * 3


def test_a_batch_whose_image_cannot_be_brought_is_an_error_and_not_the_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rig.model(lanes=1)
    allow_imaging(model.backend)
    images = [noise(*size) for size in SIZES]
    assert model.encode_batch([]) == []
    expected = [embedding.numpy() for embedding in model.encode_batch(images)]
    upload: Callable[..., Any] = Lane.upload_image

    def fails(lane: Lane, image: NDArray[np.uint8]) -> Any:
        if image.shape[:2] == SIZES[2]:
            raise BackendError("the copy failed")
        return upload(lane, image)

    threads = threading.active_count()
    with monkeypatch.context() as broken:
        broken.setattr(Lane, "upload_image", fails)
        with pytest.raises(BackendError, match="the copy failed"):
            model.encode_batch(images)
    assert threading.active_count() == threads
    for embedding, maps in zip(model.encode_batch(images), expected, strict=True):
        for name, array in embedding.numpy().items():
            np.testing.assert_array_equal(array, maps[name])
