"""The service without a network: what it answers is what ``predict`` answers, or a refusal."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest
from tests.support.helpers import noise, wrapped
from tests.support.serving import check_equal, clicks, image_file, predicted
from tests.support.tensorrt_helpers import make_rig

from sam3rt import (
    BackendError,
    ImageError,
    InvalidInputError,
    PromptError,
    SAM3InteractiveImagePredictor,
    SegmentationModel,
)
from sam3rt_serve.core import ObjectPrompt, Service
from sam3rt_serve.errors import BusyError, TooLargeError, UnknownImageError
from sam3rt_serve.images import read_image
from sam3rt_serve.joining import joining_pays
from sam3rt_serve.limits import Limits
from sam3rt_serve.sessions import Sessions

IMAGE = noise(24, 31)
FILE = image_file(IMAGE)
POINT = ObjectPrompt([(12.0, 9.0)], [1])


@pytest.fixture
def serve(toy: SegmentationModel) -> Iterator[Callable[..., Service]]:
    """Makes services of the small model, and closes them."""
    made = []

    def make(model: SegmentationModel = toy, **options: Any) -> Service:
        limits = {name: options.pop(name) for name in list(options) if hasattr(Limits, name)}
        made.append(Service(model, Limits(**limits), **options))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def predictor(toy: SegmentationModel) -> SAM3InteractiveImagePredictor:
    predictor = SAM3InteractiveImagePredictor(toy)
    predictor.set_image(IMAGE)
    return predictor


def hold(service: Service, image_id: str) -> tuple[threading.Event, Future[Any]]:
    """Keep a service's only thread for clicks busy with one until the event is set."""
    gate = threading.Event()
    answer = service.clicks._answer
    service.clicks._answer = lambda requests: (gate.wait(10), answer(requests))[1]
    future = service.segment(image_id, [POINT], deadline=1e9)
    while service.clicks.waiting:
        time.sleep(0.001)
    return gate, future


# --- images ---------------------------------------------------------------------------------------


def test_an_image_is_encoded_once(toy: SegmentationModel, serve: Callable[..., Service]) -> None:
    encoded = []
    model = wrapped(toy, on_encode=lambda maps: (encoded.append(1), maps)[1])
    service = serve(model)
    stored = [future.result(5) for future in [service.add_image(FILE) for _ in range(4)]]
    assert {one.image_id for one in stored} == {stored[0].image_id}
    assert stored[0].size == (24, 31)
    assert sorted(one.is_new for one in stored) == [False, False, False, True]
    assert len(encoded) == 1
    assert service.find_image(stored[0].image_id) == stored[0]._replace(is_new=False)


def test_images_that_wait_are_encoded_together_where_that_gains(
    toy: SegmentationModel, serve: Callable[..., Service]
) -> None:
    gate, runs = threading.Event(), []
    model = wrapped(toy)
    model.backend.images_at_once = 3
    encode = model.backend.encode_images

    def held(images: Any, *arguments: Any) -> Any:
        runs.append(len(images))
        assert gate.wait(10)
        return encode(images, *arguments)

    model.backend.encode_images = held  # type: ignore[method-assign]
    service = serve(model)
    images = [noise(24, 31, n) for n in range(6)]
    futures = [service.add_image(image_file(images[0]))]
    while not runs:
        time.sleep(0.001)
    # The second thread has read one and waits for its turn; others wait in line, one of them bad.
    futures.append(service.add_image(image_file(images[1])))
    while service.uploads.waiting:
        time.sleep(0.001)
    bad = service.add_image(b"no image")
    files = [image_file(images[n]) for n in (2, 3, 3, 4, 5)]
    futures += [service.add_image(file) for file in files]
    gate.set()
    with pytest.raises(ImageError):
        bad.result(5)
    predictor = SAM3InteractiveImagePredictor(toy)
    for number, future in zip((0, 1, 2, 3, 3, 4, 5), futures, strict=True):
        predictor.set_image(images[number])
        (found,) = service.segment(future.result(5).image_id, [POINT]).result(5)
        check_equal(found, predicted(predictor, POINT))
    assert max(runs) in (2, 3)
    assert sum(runs) == 6


def test_ids_of_the_callers(serve: Callable[..., Service]) -> None:
    service = serve()
    assert service.add_image(FILE, "mine").result(5).image_id == "mine"
    # An id stays with its image.
    again = service.add_image(image_file(noise(9, 9)), "mine").result(5)
    assert (again.size, again.is_new) == ((24, 31), False)
    service.remove_image("mine")
    assert service.add_image(image_file(noise(9, 9)), "mine").result(5).size == (9, 9)
    for call in (service.find_image, service.remove_image, service.embedding_file):
        with pytest.raises(UnknownImageError, match="'other'"):
            call("other")


def test_an_exif_orientation_is_applied(serve: Callable[..., Service]) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    content = image_file(IMAGE, exif=exif)
    assert serve().add_image(content).result(5).size == (31, 24)
    np.testing.assert_array_equal(read_image(content, 1 << 20), np.rot90(IMAGE, -1))


def claims(width: int, height: int) -> bytes:
    """A small PNG whose header promises a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", ImageError),
        (b"neither", ImageError),
        (FILE[:60], ImageError),
        (image_file(IMAGE, "GIF"), ImageError),
        (image_file(IMAGE, "TIFF"), ImageError),
        (image_file(np.zeros((4, 4), np.uint16)), ImageError),
        (claims(5000, 5000), TooLargeError),
        (claims(60_000, 60_000), TooLargeError),
        (bytes(3000), TooLargeError),
    ],
    ids=["empty", "text", "cut", "gif", "tiff", "16 bits", "large", "bomb", "long"],
)
def test_bad_images_are_refused(
    content: bytes, error: type[Exception], serve: Callable[..., Service]
) -> None:
    service = serve(image_bytes=2800, pixels=1 << 20)
    with pytest.raises(error):
        service.add_image(content).result(5)
    assert service.cache.statistics().entries == 0
    assert service.add_image(FILE).result(5).is_new


def test_a_failure_of_the_encoder_is_told_and_over(
    toy: SegmentationModel, serve: Callable[..., Service]
) -> None:
    fails = [True]

    def encode(maps: list[Any]) -> list[Any]:
        if fails.pop() if fails else False:
            raise BackendError("no memory")
        return maps

    service = serve(wrapped(toy, on_encode=encode))
    with pytest.raises(BackendError, match="no memory"):
        service.add_image(FILE).result(5)
    assert service.add_image(FILE).result(5).is_new


def test_a_cache_that_holds_no_image_is_refused_at_once(
    toy: SegmentationModel, default_model: SegmentationModel, serve: Callable[..., Service]
) -> None:
    size = toy.encode(IMAGE).nbytes
    assert serve(cache_bytes=size).add_image(FILE).result(5).is_new
    with pytest.raises(InvalidInputError, match=rf"cache_bytes: got {size - 1}, expected {size} "):
        Service(toy, cache_bytes=size - 1)
    with pytest.raises(InvalidInputError, match=r"--cache-mb 4\)"):
        Service(default_model, cache_bytes=1 << 20)


# --- masks ----------------------------------------------------------------------------------------


def test_requests_that_wait_together_share_runs(
    serve: Callable[..., Service], predictor: SAM3InteractiveImagePredictor
) -> None:
    service = serve(threads=1)
    runs: list[int] = []
    service.on_run = runs.append
    image_id = service.add_image(FILE).result(5).image_id
    other_id = service.add_image(image_file(noise(16, 16))).result(5).image_id
    gate, busy = hold(service, image_id)
    objects = clicks(7, 24, 31)
    futures = [service.segment(image_id, [one]) for one in objects]
    alone = service.segment(other_id, [POINT])
    single = service.segment(image_id, [POINT], False)
    gate.set()
    for one, future in zip(objects, futures, strict=True):
        check_equal(future.result(5)[0], predicted(predictor, one))
    check_equal(single.result(5)[0], predicted(predictor, POINT, False))
    assert alone.result(5)[0].masks.shape == (3, 16, 16)
    assert busy.result(5)
    # Objects with equally many points share a run: of the seven there are six kinds.
    assert sorted(runs) == [1, 1, 1, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("pays", [True, False])
def test_clicks_on_several_images_share_runs_where_that_pays(
    pays: bool,
    serve: Callable[..., Service],
    tiny_sam3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build()
    model = rig.model(lanes=1)
    monkeypatch.setattr("sam3rt_serve.core.joining_pays", lambda model: pays)
    service = serve(model, threads=1)
    images = [noise(24, 31, seed) for seed in range(4)]
    ids = [service.add_image(image).result(30).image_id for image in images]
    gate, busy = hold(service, ids[0])
    futures = [service.segment(image_id, [POINT]) for image_id in ids]
    refused = service.segment("nobody", [POINT])
    rig.cuda.log.clear()
    gate.set()
    assert busy.result(30)
    predictor = SAM3InteractiveImagePredictor(model)
    found = [future.result(30)[0] for future in futures]
    with pytest.raises(UnknownImageError):
        refused.result(30)
    runs = rig.cuda.count("enqueue") + rig.cuda.count("launch")
    # The one that held the thread, and the others; together with an unknown image they fail, and
    # are answered one by one.
    assert runs == 5
    for image, result in zip(images, found, strict=True):
        predictor.set_image(image)
        masks, _, low_res = predicted(predictor, POINT)
        np.testing.assert_allclose(result.low_res_masks, low_res, rtol=0, atol=1e-4)
        assert (result.masks != masks).mean() < 1e-3
    gate, busy = hold(service, ids[0])
    futures = [service.segment(image_id, [POINT]) for image_id in ids]
    rig.cuda.log.clear()
    gate.set()
    assert busy.result(30)
    assert all(future.result(30) for future in futures)
    runs = rig.cuda.count("enqueue") + rig.cuda.count("launch")
    assert runs == (2 if pays else 5)


def test_whether_sharing_runs_pays_is_tried(
    toy: SegmentationModel, tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not joining_pays(toy), "nothing to try on a CPU"
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build()
    model = rig.model(lanes=1)
    asked: list[int] = []
    segment_batch = model.segment_batch

    def at_a_price(embeddings: Any, prompts: Any) -> Any:
        asked.append(len(embeddings))
        time.sleep(price[len(embeddings)])
        return segment_batch(embeddings, prompts)

    monkeypatch.setattr(model, "segment_batch", at_a_price)
    price = {1: 0.02, 4: 0.0}
    assert joining_pays(model)
    assert set(asked) == {1, 4}
    price = {1: 0.0, 4: 0.3}
    assert not joining_pays(model)


def test_large_images_are_not_decoded_together(serve: Callable[..., Service]) -> None:
    # Room for the masks of two objects.
    service = serve(threads=1, mask_pixels=2 * 3 * 24 * 31)
    runs: list[int] = []
    service.on_run = runs.append
    image_id = service.add_image(FILE).result(5).image_id
    gate, busy = hold(service, image_id)
    futures = [service.segment(image_id, [POINT, POINT]) for _ in range(3)]
    gate.set()
    assert busy.result(5)
    assert [len(future.result(5)) for future in futures] == [2, 2, 2]
    assert runs == [1, 2, 2, 2]
    with pytest.raises(TooLargeError, match="at most 2"):
        service.segment(image_id, [POINT] * 3).result(5)


def test_the_prompts_of_one_fail_alone(serve: Callable[..., Service]) -> None:
    service = serve(threads=1)
    image_id = service.add_image(FILE).result(5).image_id
    gate, busy = hold(service, image_id)
    good = service.segment(image_id, [POINT])
    bad = service.segment(image_id, [ObjectPrompt([(1e300, 1.0)], [1])])
    gate.set()
    assert busy.result(5)
    assert good.result(5)
    with pytest.raises(PromptError, match="point_coords"):
        bad.result(5)


def test_labels_are_1_where_they_are_left_out() -> None:
    points = [(1.0, 2.0), (3.0, 4.0)]
    assert ObjectPrompt(points) == ObjectPrompt(points, [1, 1])
    assert msgspec.json.decode(b'{"points": [[1, 2]]}', type=ObjectPrompt).labels == [1]


# --- sessions -------------------------------------------------------------------------------------


def test_a_session_refines(
    serve: Callable[..., Service], predictor: SAM3InteractiveImagePredictor
) -> None:
    service = serve()
    image_id = service.add_image(FILE).result(5).image_id
    other = ObjectPrompt([(3.0, 3.0), (20.0, 9.0)], [1, 0])
    first = service.segment(image_id, [POINT], session="s").result(5)
    best = first[0].low_res_masks[np.argmax(first[0].scores)]
    second = service.segment(image_id, [other, POINT], session="s").result(5)
    assert [one.is_refined for one in second] == [True, False]
    check_equal(second[0], predicted(predictor, other, mask=best))
    check_equal(second[1], predicted(predictor, POINT))
    assert not service.segment(image_id, [POINT], session="t").result(5)[0].is_refined
    third = service.segment(image_id, [POINT, POINT], session="s").result(5)
    assert [one.is_refined for one in third] == [True, True]
    # Another image, and the same one after it was sent again, begin anew.
    service.remove_image(image_id)
    service.add_image(FILE).result(5)
    assert not service.segment(image_id, [POINT], session="s").result(5)[0].is_refined


def test_sessions_are_bounded() -> None:
    mask = np.zeros((4, 4), np.float32)
    sessions = Sessions(3 * mask.nbytes)
    sessions.put("image", "a", [mask])
    sessions.put("image", "b", [mask])
    sessions.put("image", "a", [mask + 1, mask])
    assert [m is not None for m in sessions.get("image", "a", 3)] == [True, True, False]
    sessions.put("other", "c", [mask])  # b was used longest ago
    assert sessions.get("image", "b", 1) == [None]
    assert sessions.get("other", "c", 1)[0] is not None
    sessions.discard("image")
    assert sessions.get("image", "a", 1) == [None]
    sessions.put("image", "too many", [mask] * 4)
    assert sessions.get("image", "too many", 1) == [None]
    assert sessions.get("other", None, 2) == [None, None]


# --- waiting --------------------------------------------------------------------------------------


def test_neither_clicks_nor_images_that_are_known_wait_for_images(
    toy: SegmentationModel, serve: Callable[..., Service]
) -> None:
    gate = threading.Event()
    gate.set()
    model = wrapped(toy, on_encode=lambda maps: (gate.wait(10), maps)[1])
    service = serve(model, waiting_images=1)
    stored = service.add_image(FILE).result(5)
    service.add_image(IMAGE, "mine").result(5)
    gate.clear()
    uploads = []
    for n in range(3):  # two are with the threads, one waits
        uploads.append(service.add_image(noise(9, 9, n)))
        while n < 2 and service.uploads.waiting:
            time.sleep(0.001)
    with pytest.raises(BusyError):
        service.add_image(FILE, "other")
    assert service.segment(stored.image_id, [POINT]).result(5)
    assert service.add_image(FILE).result(0) == stored._replace(is_new=False)
    assert not service.add_image(b"not even read", "mine").result(0).is_new
    gate.set()
    assert all(upload.result(5).is_new for upload in uploads)


def test_an_image_that_pillow_refuses_is_told_the_services_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(TooLargeError, match="too many pixels, at most 50 are taken"):
        read_image(image_file(noise(40, 30)), 50)
