"""The TensorRT backend over a fake TensorRT and a fake CUDA that check every use.

The engines are the bundle's graphs run by ONNX Runtime, so all that can differ from the ONNX
Runtime backend is what this backend adds: padding, chunks, buffers, streams, graphs, threads.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.fake_cuda import CALLERS_GPU, CudaMisuse, FakeCuda
from tests.support.golden import arguments_of, mobile_sam_cases, sam_cases
from tests.support.helpers import noise, photo
from tests.support.tensorrt_helpers import MAX_OBJECTS, MAX_POINTS, Rig, make_rig

from sam3rt import (
    BackendError,
    DeviceLostError,
    EmbeddingError,
    ImageEmbedding,
    Prompts,
    SAM3InteractiveImagePredictor,
    SegmentationModel,
    StateError,
    load_model,
)
from sam3rt.backends.tensorrt.backend import allow_imaging
from sam3rt.bundle.default import default_bundle_path
from sam3rt.geometry import geometry

TOLERANCE = 1e-4
MOBILE_CASES, SAM3_CASES = mobile_sam_cases(), sam_cases("sam3")


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture(scope="module")
def sam3_rig(
    small_bundle: Path, tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch
) -> Rig:
    rig = make_rig(small_bundle, tmp_path_factory.mktemp("sam3"), patch)
    rig.build()
    return rig


@pytest.fixture(scope="module")
def mobile_rig(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Rig:
    rig = make_rig(default_bundle_path(), tmp_path_factory.mktemp("mobile"), patch, seed=1)
    rig.build()
    return rig


@pytest.fixture(scope="module")
def tiny_rig(
    tiny_sam3: Path, tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch
) -> Rig:
    """What needs no full resolution runs on 8x8 pixels."""
    rig = make_rig(tiny_sam3, tmp_path_factory.mktemp("tiny"), patch, seed=2)
    rig.build()
    return rig


@pytest.fixture(scope="module")
def sam3(sam3_rig: Rig) -> SegmentationModel:
    return sam3_rig.model()


@pytest.fixture(scope="module")
def mobile(mobile_rig: Rig) -> SegmentationModel:
    return mobile_rig.model()


def with_imaging(rig: Rig) -> SegmentationModel:
    model = rig.model()
    allow_imaging(model.backend)
    assert model.backend.imaging.preprocess_allowed
    assert model.backend.imaging.postprocess_allowed
    return model


@pytest.fixture(scope="module")
def mobile_imaging(mobile_rig: Rig) -> SegmentationModel:
    """MobileSAM with pre- and postprocessing on the device."""
    return with_imaging(mobile_rig)


def moved(embedding: ImageEmbedding, model: SegmentationModel) -> ImageEmbedding:
    """An embedding of another backend, for this one."""
    return ImageEmbedding(
        model.backend.upload(list(embedding.numpy().values())),
        embedding.geometry,
        embedding.fingerprint,
        embedding.names,
    )


def equal(
    actual: tuple[NDArray[Any], ...], expected: tuple[NDArray[Any], ...], logits: bool = False
) -> None:
    """Masks, scores and low-resolution logits of two calls."""
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    if logits:
        np.testing.assert_allclose(actual[0], expected[0], atol=TOLERANCE * 100, rtol=1e-5)
    else:
        assert (actual[0] != expected[0]).mean() <= 1e-5
    np.testing.assert_allclose(actual[1], expected[1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(actual[2], expected[2], atol=TOLERANCE * 10, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n, case in SAM3_CASES.items() if not case.get("batch")])
def test_golden_cases_of_sam3(
    name: str,
    sam3: SegmentationModel,
    small_model: SegmentationModel,
    sam3_embeddings: dict[int, ImageEmbedding],
) -> None:
    case = SAM3_CASES[name]
    arguments = dict(case["args"])
    results = []
    for model in (sam3, small_model):
        predictor = SAM3InteractiveImagePredictor(model, **case["ctor"])
        embedding = sam3_embeddings[case["image"]]
        predictor.set_embedding(moved(embedding, sam3) if model is sam3 else embedding)
        if "mask_input" in case and "mask_input" not in arguments:
            source = SAM3_CASES[case["mask_input"]["from_case"]]
            low_res = predictor.predict(**source["args"])[2]
            arguments["mask_input"] = low_res[case["mask_input"]["channel"]][None]
        results.append(predictor.predict(**arguments))
    equal(*results, logits=bool(arguments.get("return_logits")))


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("name", list(MOBILE_CASES)[::4])
def test_golden_cases_of_mobile_sam(
    name: str,
    on_device: bool,
    mobile: SegmentationModel,
    mobile_imaging: SegmentationModel,
    default_model: SegmentationModel,
    mobile_embeddings: dict[str, ImageEmbedding],
) -> None:
    case = MOBILE_CASES[name]
    ours = mobile_imaging if on_device else mobile
    embedding = mobile_embeddings[case["photo"]]
    results = []
    for model in (ours, default_model):
        predictor = SAM3InteractiveImagePredictor(model)
        predictor.set_embedding(moved(embedding, ours) if model is ours else embedding)
        results.append(predictor.predict(**arguments_of(case)))
    equal(*results, logits=bool(case["args"].get("return_logits")))


def test_encoding_equals_onnxruntime(
    sam3: SegmentationModel,
    sam3_embeddings: dict[int, ImageEmbedding],
    golden_images: dict[int, NDArray[np.uint8]],
) -> None:
    # The second time it is the recorded graph that runs.
    for number in (0, 2):
        ours = sam3.encode(golden_images[number]).numpy()
        for name, array in sam3_embeddings[number].numpy().items():
            np.testing.assert_allclose(ours[name], array, atol=TOLERANCE, rtol=0)


def test_encoding_with_preprocessing_on_the_device(
    mobile_imaging: SegmentationModel,
    mobile_rig: Rig,
    mobile_embeddings: dict[str, ImageEmbedding],
    chelsea: NDArray[np.uint8],
) -> None:
    expected = mobile_embeddings["chelsea"]
    cuda = mobile_rig.cuda
    mobile_imaging.encode(chelsea)
    cuda.log.clear()
    with cuda.no_allocation():
        ours = mobile_imaging.encode(chelsea)
    np.testing.assert_allclose(
        next(iter(ours.numpy().values())),
        next(iter(expected.numpy().values())),
        atol=TOLERANCE,
        rtol=0,
    )
    # One byte per pixel and channel goes up, from pinned memory, and what is to be done with it.
    uploads = [nbytes for kind, nbytes in cuda.log if kind == "upload"]
    assert chelsea.nbytes <= uploads[0] < chelsea.nbytes + (1 << 20)
    assert sum(uploads[1:]) < 1024
    assert cuda.count("kernel") == 2


@pytest.mark.parametrize(
    ("max_hole_area", "dtype"), [(0.0, np.float32), (0.0, np.bool_), (40.0, np.uint8)]
)
def test_only_bytes_come_down_where_the_device_makes_the_masks(
    max_hole_area: float,
    dtype: Any,
    mobile_imaging: SegmentationModel,
    default_model: SegmentationModel,
    mobile_rig: Rig,
    mobile_embeddings: dict[str, ImageEmbedding],
    chelsea: NDArray[np.uint8],
) -> None:
    embedding = mobile_embeddings["chelsea"]
    cuda = mobile_rig.cuda
    boxes = np.array([[20, 10, 400, 290], [100, 50, 300, 200], [5, 5, 60, 60]], np.float32)
    results = []
    for model in (mobile_imaging, default_model):
        predictor = SAM3InteractiveImagePredictor(
            model, max_hole_area=max_hole_area, max_sprinkle_area=max_hole_area, mask_dtype=dtype
        )
        predictor.set_embedding(moved(embedding, model) if model is mobile_imaging else embedding)
        predictor.predict(box=boxes)
        cuda.log.clear()
        with cuda.no_allocation():
            results.append(predictor.predict(box=boxes))
        if model is mobile_imaging:
            downloads = [nbytes for kind, nbytes in cuda.log if kind == "download"]
            masks = len(boxes) * 3 * chelsea.shape[0] * chelsea.shape[1]
            low_res = len(boxes) * 3 * 256 * 256 * 4
            assert sum(downloads) <= masks + low_res * MAX_OBJECTS / len(boxes) + 10_000
            # All that goes up is the prompt, within the graph, holes or not.
            kinds = [kind for kind, _ in cuda.log]
            # The small outputs, the logits and the masks come down.
            assert kinds == ["launch", "download", "download", "download"]
    equal(*results)


@pytest.mark.parametrize("max_hole_area", [0.0, 40.0])
@pytest.mark.parametrize("name", ["chelsea", "rocket"])
def test_masks_of_more_objects_than_the_engine_takes(
    max_hole_area: float,
    name: str,
    mobile_imaging: SegmentationModel,
    default_model: SegmentationModel,
    mobile_embeddings: dict[str, ImageEmbedding],
) -> None:
    embedding = mobile_embeddings[name]
    height, width = embedding.original_size
    corners = np.random.default_rng(5).uniform(0, 1, (MAX_OBJECTS + 2, 2, 2))
    boxes = (np.sort(corners, axis=1) * [width, height]).reshape(-1, 4)
    results = []
    for model in (mobile_imaging, default_model):
        predictor = SAM3InteractiveImagePredictor(model, 0.5, max_hole_area)
        predictor.set_embedding(moved(embedding, model) if model is mobile_imaging else embedding)
        results.append(predictor.predict(box=boxes, multimask_output=False))
    equal(*results)


def test_a_prompt_is_one_launch_and_two_downloads(
    sam3_rig: Rig, sam3: SegmentationModel, sam3_embeddings: dict[int, ImageEmbedding]
) -> None:
    embedding = moved(sam3_embeddings[0], sam3)
    prompts = Prompts([[300, 200]], [1])
    sam3.decode(embedding, prompts)
    for _ in range(2):
        sam3_rig.cuda.log.clear()
        with sam3_rig.cuda.no_allocation():
            sam3.decode(embedding, prompts)
        kinds = [kind for kind, _ in sam3_rig.cuda.log]
        assert kinds == ["launch", "download", "download"]
        # Three masks and their scores, and nothing of the single mask.
        _, scores, logits = (nbytes for _, nbytes in sam3_rig.cuda.log)
        assert scores < 1024
        assert logits == 3 * 288 * 288 * 4


def test_features_are_copied_only_when_the_lane_holds_others(
    sam3_rig: Rig, sam3: SegmentationModel, sam3_embeddings: dict[int, ImageEmbedding]
) -> None:
    model = sam3_rig.model(lanes=1)
    first, second = (moved(sam3_embeddings[n], model) for n in (0, 1))
    prompts = Prompts([[100, 100]], [1])
    expected = {id(e): model.decode(e, prompts).low_res_masks for e in (first, second)}
    for embedding, copies in ((first, 1), (first, 0), (second, 1), (second, 0), (first, 1)):
        sam3_rig.cuda.log.clear()
        found = model.decode(embedding, prompts).low_res_masks
        assert sam3_rig.cuda.count("copy") == copies
        np.testing.assert_array_equal(found, expected[id(embedding)])


def test_encoding_leaves_the_features_where_the_decoder_reads_them(
    mobile_rig: Rig, mobile: SegmentationModel, chelsea: NDArray[np.uint8]
) -> None:
    embedding = mobile.encode(chelsea)
    mobile_rig.cuda.log.clear()
    mobile.decode(embedding, Prompts([[225, 150]], [1]))
    assert mobile_rig.cuda.count("copy") == 0


@pytest.mark.parametrize("masks", ["none", "shared", "own"])
@pytest.mark.parametrize("objects", [1, 3, MAX_OBJECTS, 2 * MAX_OBJECTS + 3])
def test_any_number_of_objects(
    objects: int, masks: str, tiny_rig: Rig, tiny_model: SegmentationModel
) -> None:
    rng = np.random.default_rng(objects)
    mask_input = None
    if masks != "none":
        count = objects if masks == "own" else 1
        mask_input = rng.normal(0, 8, (count, 1, 16, 16)).astype(np.float32)
    prompts = Prompts(
        rng.uniform(0, 50, (objects, 3, 2)), rng.integers(0, 2, (objects, 3)), mask_input=mask_input
    )
    model, theirs = tiny_rig.model(), tiny_model.encode(noise(50, 70))
    ours = moved(theirs, model)
    for multimask in (True, False):
        actual = model.decode(ours, prompts, multimask)
        expected = tiny_model.decode(theirs, prompts, multimask)
        np.testing.assert_allclose(
            actual.low_res_masks, expected.low_res_masks, atol=TOLERANCE * 10, rtol=1e-5
        )
        np.testing.assert_allclose(actual.iou_predictions, expected.iou_predictions, atol=TOLERANCE)


@pytest.mark.parametrize("points", [0, 1, 3, 4, 7, 8, MAX_POINTS - 1])
def test_any_number_of_points(
    points: int,
    sam3: SegmentationModel,
    small_model: SegmentationModel,
    sam3_embeddings: dict[int, ImageEmbedding],
) -> None:
    """Points and the model's own padding point, from none to as many as the engine takes."""
    rng = np.random.default_rng(points)
    prompts = Prompts()
    if points:
        prompts = Prompts(rng.uniform(0, 500, (points, 2)), rng.integers(-1, 2, points))
    embedding = sam3_embeddings[1]
    actual = sam3.decode(moved(embedding, sam3), prompts)
    expected = small_model.decode(embedding, prompts)
    np.testing.assert_allclose(actual.low_res_masks, expected.low_res_masks, atol=TOLERANCE * 10)
    np.testing.assert_allclose(actual.iou_predictions, expected.iou_predictions, atol=TOLERANCE)
    assert actual.object_score_logits is not None
    np.testing.assert_allclose(
        actual.object_score_logits, expected.object_score_logits, atol=TOLERANCE * 10
    )


def test_too_many_points_say_how_to_rebuild(
    sam3: SegmentationModel, sam3_embeddings: dict[int, ImageEmbedding]
) -> None:
    embedding = moved(sam3_embeddings[0], sam3)
    prompts = Prompts(np.zeros((MAX_POINTS, 2)), np.ones(MAX_POINTS))
    with pytest.raises(BackendError, match=r"17 points.*takes 16.*--max-points 32"):
        sam3.decode(embedding, prompts)


@pytest.mark.parametrize(
    "types", [{"features": "float16"}, {"labels": "int32"}], ids=["half features", "int32 labels"]
)
def test_types_are_the_engines_own(
    types: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    default_model: SegmentationModel,
    mobile_embeddings: dict[str, ImageEmbedding],
    chelsea: NDArray[np.uint8],
) -> None:
    rig = make_rig(default_bundle_path(), tmp_path, monkeypatch)
    rig.build(**types)
    model = rig.model()
    embedding = model.encode(chelsea)
    expected = mobile_embeddings["chelsea"]
    half = "features" in types
    (array,) = embedding.arrays().values()
    assert array.dtype == (np.float16 if half else np.float32)
    (ours,), (theirs,) = embedding.numpy().values(), expected.numpy().values()
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-3 if half else TOLERANCE)
    path = tmp_path / "embedding"
    embedding.save(path)
    again = model.load_embedding(path)
    np.testing.assert_array_equal(next(iter(again.numpy().values())), ours)
    prompts = Prompts([[225, 150]], [1])
    np.testing.assert_allclose(
        model.decode(again, prompts).low_res_masks,
        default_model.decode(expected, prompts).low_res_masks,
        atol=0.3 if half else TOLERANCE * 10,
    )


def test_eight_threads_at_once(
    mobile_imaging: SegmentationModel,
    default_model: SegmentationModel,
    mobile_rig: Rig,
    mobile_embeddings: dict[str, ImageEmbedding],
) -> None:
    references = [mobile_embeddings["chelsea"], mobile_embeddings["coffee"]]
    clicks = [[[225, 150]], [[300, 180]], [[100, 100]], [[50, 200]]]
    expected = {
        (image, click): SAM3InteractiveImagePredictor(default_model)
        for image in range(2)
        for click in range(4)
    }
    answers = {}
    for (image, click), predictor in expected.items():
        predictor.set_embedding(references[image])
        answers[image, click] = predictor.predict(clicks[click], [1])
    shared = [moved(embedding, mobile_imaging) for embedding in references]
    start = threading.Barrier(8)

    def serve(worker: int) -> None:
        predictor = SAM3InteractiveImagePredictor(mobile_imaging)
        start.wait()
        for step in range(6):
            image, click = (worker + step) % 2, (worker * 3 + step) % 4
            own = worker % 2 == 0
            predictor.set_embedding(
                moved(references[image], mobile_imaging) if own else shared[image]
            )
            equal(predictor.predict(clicks[click], [1]), answers[image, click])
        if worker == 0:
            mobile_imaging.encode(photo("chelsea"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serve, range(8)))
    assert 2 <= mobile_rig.cuda.live["streams"] <= 2 * 4


def test_a_forked_child_cannot_read_an_embedding(
    mobile: SegmentationModel,
    mobile_embeddings: dict[str, ImageEmbedding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embedding = moved(mobile_embeddings["chelsea"], mobile)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for read in (embedding.numpy, embedding.arrays, embedding.to_bytes):
        with pytest.raises(StateError, match="after the fork"):
            read()


def test_an_embedding_is_exported_where_it_lies(
    mobile_rig: Rig, mobile: SegmentationModel, mobile_embeddings: dict[str, ImageEmbedding]
) -> None:
    embedding = moved(mobile_embeddings["chelsea"], mobile)
    (expected,) = embedding.numpy().values()
    mobile_rig.cuda.log.clear()
    exported = np.from_dlpack(embedding)
    np.testing.assert_array_equal(exported, expected)
    assert mobile_rig.cuda.log == []
    # The memory stays for as long as somebody reads it.
    del embedding
    gc.collect()
    moved(mobile_embeddings["coffee"], mobile)
    np.testing.assert_array_equal(exported, expected)


@pytest.mark.parametrize("is_exported", [False, True])
def test_exported_memory_is_not_used_again(
    is_exported: bool, mobile_rig: Rig, mobile_embeddings: dict[str, ImageEmbedding]
) -> None:
    """A consumer lets go when its work is queued: freeing waits for the device, reuse does not."""
    model = mobile_rig.model(lanes=1)
    embedding = moved(mobile_embeddings["chelsea"], model)
    if is_exported:
        np.from_dlpack(embedding)
    del embedding
    mobile_rig.cuda.log.clear()
    moved(mobile_embeddings["chelsea"], model)
    assert mobile_rig.cuda.count("allocate") == int(is_exported)


def test_the_callers_gpu_is_the_current_one_again_after_each_call(
    tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chelsea: NDArray[np.uint8]
) -> None:
    """The stand-in refuses every call for which ours is not the current one."""
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build()

    def current() -> int:
        assert rig.cuda.index != CALLERS_GPU
        return rig.cuda.current

    model = with_imaging(rig)
    assert current() == CALLERS_GPU
    model.warm_up()
    embedding = model.encode(chelsea)
    assert current() == CALLERS_GPU
    model.segment(embedding, Prompts([[225, 150]], [1]))
    model.segment(embedding, Prompts([[225, 150]], [1]), max_hole_area=10)
    embedding.numpy()
    assert current() == CALLERS_GPU
    with pytest.raises(BackendError):
        model.decode(embedding, Prompts(np.zeros((MAX_POINTS, 2)), np.ones(MAX_POINTS)))
    assert current() == CALLERS_GPU
    # In finalizers too.
    del model, embedding
    gc.collect()
    assert rig.cuda.live == {"blocks": 0, "pinned": 0, "streams": 0, "graphs": 0, "modules": 0}
    assert current() == CALLERS_GPU


def test_everything_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chelsea: NDArray[np.uint8]
) -> None:
    rig = make_rig(default_bundle_path(), tmp_path, monkeypatch)
    rig.build()
    model = with_imaging(rig)
    before = rig.cuda.used
    maps = list(model.encode(chelsea).numpy().values())
    embeddings = [
        ImageEmbedding(
            model.backend.upload(maps),
            geometry(model.manifest.image, (300, 451)),
            model.manifest.fingerprint,
            ("image_embeddings.0",),
        )
        for _ in range(6)
    ]
    grown = rig.cuda.used - before
    assert grown >= 6 * embeddings[0].nbytes
    prompts = Prompts([[225, 150]], [1])
    expected = [model.decode(embedding, prompts).low_res_masks for embedding in embeddings]
    # Every embedding has memory of its own.
    for found in expected[1:]:
        np.testing.assert_array_equal(found, expected[0])
    nbytes = embeddings[0].nbytes
    del embeddings[1:]
    used = rig.cuda.used
    model.decode(embeddings[0], prompts)
    # Four blocks are kept for the next images, and no more.
    assert rig.cuda.used == used - nbytes
    rig.cuda.log.clear()
    kept = [model.backend.upload(maps) for _ in range(4)]
    assert rig.cuda.count("allocate") == 0
    del kept
    last = embeddings[0]
    del model, embeddings
    gc.collect()
    assert rig.cuda.live["blocks"] > 0
    del last
    gc.collect()
    # All that is left are results, which are the caller's.
    assert rig.cuda.live["pinned"] == len(expected)
    assert not any(count for kind, count in rig.cuda.live.items() if kind != "pinned")
    del expected, found
    gc.collect()
    assert rig.cuda.live == {"blocks": 0, "pinned": 0, "streams": 0, "graphs": 0, "modules": 0}


def test_out_of_memory_for_an_embedding_says_what_to_do(
    tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chelsea: NDArray[np.uint8]
) -> None:
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build()
    model = rig.model(lanes=1)
    embedding = model.encode(chelsea)
    prompts = Prompts([[225, 150]], [1])
    expected = model.decode(embedding, prompts).low_res_masks
    rig.cuda.total = rig.cuda.used + embedding.nbytes // 2
    with pytest.raises(BackendError, match=r"out of device memory: .* asked for.*embeddings"):
        model.encode(chelsea)
    np.testing.assert_array_equal(model.decode(embedding, prompts).low_res_masks, expected)
    rig.cuda.total *= 2
    model.encode(chelsea)


def test_out_of_memory_for_another_lane_waits_for_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chelsea: NDArray[np.uint8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At full size, so that the calls overlap."""
    rig = make_rig(default_bundle_path(), tmp_path, monkeypatch)
    rig.build()
    model = rig.model()
    embedding = model.encode(chelsea)
    prompts = Prompts([[225, 150]], [1])
    expected = model.decode(embedding, prompts).low_res_masks
    rig.cuda.total = rig.cuda.used + 1000
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: model.decode(embedding, prompts), range(12)):
            np.testing.assert_array_equal(found.low_res_masks, expected)
    # What the lanes left that could not be made is given back with the next call.
    model.decode(embedding, prompts)
    assert rig.cuda.live["streams"] == 1
    assert caplog.text.count("out of device memory") == 1
    # The lack of memory need not last.
    rig.cuda.total *= 2
    model.backend._pool._retry_at = 0.0
    busy = threading.Barrier(2, timeout=60)

    def decode(_: int) -> None:
        with model.backend._pool.lane():
            busy.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(decode, range(2)))
    assert rig.cuda.live["streams"] == 2


def test_without_graphs_where_they_cannot_be_recorded(
    tiny_sam3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chelsea: NDArray[np.uint8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch, capturable=False)
    rig.build()
    model = rig.model()
    embedding = model.encode(chelsea)
    prompts = Prompts([[225, 150]], [1])
    reference = load_model(tiny_sam3, backend="onnxruntime", device="cpu")
    expected = reference.decode(reference.encode(chelsea), prompts).low_res_masks
    for _ in range(3):
        found = model.decode(embedding, prompts).low_res_masks
        np.testing.assert_allclose(found, expected, atol=TOLERANCE * 10, rtol=1e-5)
    assert rig.cuda.live["graphs"] == 0
    assert rig.cuda.count("launch") == 0
    assert "without a CUDA graph" in caplog.text


def test_a_failed_call_leaves_the_lane_usable(
    tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chelsea: NDArray[np.uint8]
) -> None:
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build()
    model = rig.model(lanes=1)
    embedding = model.encode(chelsea)
    prompts = Prompts([[225, 150]], [1])
    expected = model.decode(embedding, prompts).low_res_masks
    real: Callable[..., None] = rig.cuda.launch

    def fail(graph: int, stream: int) -> None:
        raise BackendError("cudaGraphLaunch failed: cudaErrorLaunchFailure")

    monkeypatch.setattr(rig.cuda, "launch", fail)
    with pytest.raises(BackendError, match="LaunchFailure"):
        model.decode(embedding, prompts)
    monkeypatch.setattr(rig.cuda, "launch", real)
    np.testing.assert_array_equal(model.decode(embedding, prompts).low_res_masks, expected)


def test_a_gpu_that_is_lost_says_so(
    tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chelsea: NDArray[np.uint8]
) -> None:
    """A kernel's fault shows at the next call that waits, and at every one after it."""
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build()
    model = rig.model(lanes=1)
    embedding = model.encode(chelsea)
    prompts = Prompts([[225, 150]], [1])
    model.decode(embedding, prompts)

    def lost(stream: int) -> None:
        rig.cuda.lost = "cudaStreamSynchronize failed: cudaErrorIllegalAddress"
        raise rig.cuda.lost_error()

    def refused(graph: int, stream: int) -> None:
        raise BackendError("TensorRT refuses to run")

    with monkeypatch.context() as broken:
        broken.setattr(rig.cuda, "synchronize", lost)
        broken.setattr(rig.cuda, "launch", refused)
        for call in (model.decode, model.segment):
            with pytest.raises(DeviceLostError, match=r"cuda:0 cannot be used .*IllegalAddress"):
                call(embedding, prompts)
        health = model.health()
        assert not health.healthy
        assert "DeviceLostError: cuda:0 cannot be used in this process any more" in health.problem

        def gone() -> None:
            raise rig.cuda.lost_error()

        for stream in rig.cuda._streams.values():
            stream.pending.clear()
        broken.setattr(rig.cuda, "active", gone)
        engine = weakref.ref(model.backend._pool._free[0]._network.encoder)
        model.close()
        gc.collect()
        assert engine() is None


def test_embeddings_of_another_model_are_refused(
    tiny_rig: Rig, tiny_model: SegmentationModel
) -> None:
    prompts = Prompts([[1, 1]], [1])
    image = np.zeros((20, 30, 3), np.uint8)
    model = tiny_rig.model()
    for foreign in (tiny_model.encode(image), tiny_rig.model(lanes=1).encode(image)):
        with pytest.raises(EmbeddingError, match="another model or backend"):
            model.decode(foreign, prompts)


def test_the_fake_notices_what_it_is_for(mobile_rig: Rig) -> None:
    """A host buffer that is reused too early, as a check of the checks."""
    cuda = mobile_rig.cuda
    cuda._random.seed(3)
    cuda._random.random = lambda: 1.0  # nothing runs by itself
    try:
        with pytest.raises(CudaMisuse, match="current"):
            cuda.allocate(64)
        with cuda.active():
            misuse(cuda)
    finally:
        del cuda._random.random


def misuse(cuda: FakeCuda) -> None:
    block, stream = cuda.allocate(64), cuda.create_stream()
    host = np.zeros(64, np.uint8)
    cuda.upload(block, host, stream)
    host[0] = 1
    with pytest.raises(CudaMisuse, match="changed before its upload"):
        cuda.synchronize(stream)
    host[0] = 0
    with pytest.raises(CudaMisuse, match="freed while"):
        cuda.free(block)
    other = cuda.create_stream()
    with pytest.raises(CudaMisuse, match="at once"):
        cuda.download(np.zeros(64, np.uint8), block, other)
    with pytest.raises(CudaMisuse, match="of a block of"):
        cuda.copy(block, block, 65, stream)
    cuda.synchronize(stream)
    cuda.begin_capture(stream)
    with pytest.raises(CudaMisuse, match="records"):
        cuda.allocate(1)
    cuda.destroy_graph(cuda.end_capture(stream))
    cuda.free(block)
    for left in (stream, other):
        cuda.destroy_stream(left)
