"""The HTTP interface in this process: its shapes, its refusals and what it tells about itself."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from tests.support.helpers import noise, wrapped
from tests.support.serving import clicks, image_file, predicted

from sam3rt import SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.masks.polygons import signed_area
from sam3rt.masks.rle import decompress, mask_of
from sam3rt_serve.cli import JsonFormatter
from sam3rt_serve.core import ObjectPrompt, Service
from sam3rt_serve.http import create_app
from sam3rt_serve.limits import Limits
from sam3rt_serve.wire import OPERATIONS

IMAGE = noise(24, 31)
FILE = image_file(IMAGE)
LARGE_FILE = image_file(np.zeros((99, 99, 3), np.uint8))
PNG = {"content-type": "image/png"}
QUESTION = {"objects": [{"points": [[12, 9]], "labels": [1]}]}


@pytest.fixture
def serve(toy: SegmentationModel) -> Iterator[Callable[..., TestClient]]:
    """Makes applications over the small model; they are shut down in the end."""
    made = []

    def make(model: SegmentationModel = toy, **options: Any) -> TestClient:
        limits = {name: options.pop(name) for name in list(options) if hasattr(Limits, name)}
        service = Service(model, Limits(**limits), cache_folder=options.pop("cache_folder", None))
        app = create_app(service, **options)
        made.append(TestClient(app, raise_server_exceptions=False))
        return made[-1].__enter__()

    yield make
    for client in made:
        client.__exit__(None, None, None)


@pytest.fixture
def client(serve: Callable[..., TestClient]) -> TestClient:
    return serve()


@pytest.fixture
def image_id(client: TestClient) -> str:
    return str(client.post("/v1/images", content=FILE, headers=PNG).json()["image_id"])


def masks_of(answer: dict[str, Any], number: int = 0) -> NDArray[np.bool_]:
    """An object's masks, bool [C, H, W], out of PNG files or bits."""
    shape = (answer["height"], answer["width"])
    masks = []
    for text in answer["objects"][number]["masks"]:
        content = base64.b64decode(text, validate=True)
        if answer["format"] == "png":
            with PIL.Image.open(io.BytesIO(content)) as image:
                assert (image.mode, image.format) == ("1", "PNG")
                masks.append(np.asarray(image))
        else:
            assert len(content) == -(-shape[0] * shape[1] // 8)
            bits = np.unpackbits(np.frombuffer(content, np.uint8))[: shape[0] * shape[1]]
            masks.append(bits.reshape(shape).astype(bool))
    return np.stack(masks)


# --- the shapes of answers ------------------------------------------------------------------------


def test_images_come_as_bodies_and_in_forms(client: TestClient) -> None:
    body = client.post("/v1/images", content=FILE, headers=PNG)
    assert body.status_code == 200
    assert set(body.json()) == {"image_id", "height", "width", "cached", "milliseconds"}
    form = client.post("/v1/images", files={"image": ("../../etc/passwd", FILE, "image/png")})
    assert form.json()["image_id"] == body.json()["image_id"]
    assert (form.json()["cached"], form.json()["height"], form.json()["width"]) == (True, 24, 31)
    named = client.put("/v1/images/my.own-id", content=FILE, headers=PNG)
    assert named.json()["image_id"] == "my.own-id"
    found = client.get("/v1/images/my.own-id")
    assert found.json() | {"milliseconds": 0} == named.json() | {"cached": True, "milliseconds": 0}
    gone = client.delete("/v1/images/my.own-id")
    assert (gone.status_code, gone.content) == (204, b"")
    assert client.get("/v1/images/my.own-id").status_code == 404
    assert client.delete("/v1/images/my.own-id").status_code == 404


@pytest.mark.parametrize("form", ["png", "bits"])
@pytest.mark.parametrize("multimask", [True, False])
def test_masks_of_several_objects(
    multimask: bool, form: str, client: TestClient, image_id: str, toy: SegmentationModel
) -> None:
    objects = clicks(12, 24, 31)
    plain = [
        {"points": one.points, "labels": one.labels} | ({"box": one.box} if one.box else {})
        for one in objects
    ]
    question = {"objects": plain, "multimask": multimask, "format": form}
    answer = client.post(f"/v1/images/{image_id}/masks", json=question).json()
    predictor = SAM3InteractiveImagePredictor(toy)
    predictor.set_image(IMAGE)
    assert (answer["height"], answer["width"], answer["format"]) == (24, 31, form)
    for number, one in enumerate(objects):
        masks, scores, _ = predicted(predictor, one, multimask)
        found = answer["objects"][number]
        np.testing.assert_array_equal(masks_of(answer, number), masks)
        assert found["scores"] == scores.tolist()
        assert found["refined"] is False
        for mask, box in zip(masks, found["boxes"], strict=True):
            if box is None:
                assert not mask.any()
            else:
                x0, y0, x1, y1 = box
                assert mask[y0:y1, x0:x1].sum() == mask.sum()
                inner = mask[y0:y1, x0:x1]
                assert inner[0].any()
                assert inner[-1].any()
                assert inner[:, 0].any()
                assert inner[:, -1].any()


def test_run_lengths_and_polygons(
    client: TestClient, image_id: str, toy: SegmentationModel
) -> None:
    predictor = SAM3InteractiveImagePredictor(toy)
    predictor.set_image(IMAGE)
    masks, _, _ = predicted(predictor, ObjectPrompt([(12, 9)], [1]))
    path = f"/v1/images/{image_id}/masks"
    (found,) = client.post(path, json=QUESTION | {"format": "rle"}).json()["objects"]
    for rle, mask in zip(found["masks"], masks, strict=True):
        assert rle["size"] == [24, 31]
        np.testing.assert_array_equal(mask_of(decompress(rle["counts"]), (24, 31)), mask)
    (found,) = client.post(path, json=QUESTION | {"format": "polygons"}).json()["objects"]
    for polygons, mask in zip(found["masks"], masks, strict=True):
        rings = [np.array(ring).reshape(-1, 2) for ring in polygons]
        assert all(signed_area(ring) > 0 for ring in rings)
        # Without those of holes, the outlines enclose the mask at least.
        assert sum(map(signed_area, rings)) >= mask.sum()
    asked = QUESTION | {"format": "polygons", "tolerance": 5}
    (coarse,) = client.post(path, json=asked).json()["objects"]
    assert len(str(coarse["masks"])) < len(str(found["masks"]))


def test_what_is_served(client: TestClient, toy: SegmentationModel) -> None:
    answer = client.get("/v1/model").json()
    assert answer["fingerprint"] == toy.manifest.fingerprint
    assert (answer["family"], answer["image_size"]) == ("mobile_sam", [8, 8])
    assert (answer["backend"], answer["precision"]) == ("onnxruntime", "fp32")
    assert answer["score_unit"] == "iou"
    assert answer["limits"]["objects"] == 64
    assert client.get("/livez").text == "alive\n"


# --- refusals -------------------------------------------------------------------------------------


IMAGES, MASKS = "/v1/images", "/v1/images/cat/masks"
FORM, JSON = "multipart/form-data", "application/json"


@pytest.mark.parametrize(
    ("method", "path", "content", "media_type", "status", "kind"),
    [
        ("POST", IMAGES, b"garbage", "image/png", 400, "ImageError"),
        ("POST", IMAGES, b"", "image/jpeg", 400, "ImageError"),
        ("POST", IMAGES, FILE, "text/plain", 415, "HTTPException"),
        ("POST", IMAGES, FILE, "", 415, "HTTPException"),
        ("POST", IMAGES, bytes(5000), "image/png", 413, "TooLargeError"),
        ("POST", IMAGES, LARGE_FILE, "image/png", 413, "TooLargeError"),
        ("POST", IMAGES, b"no form", FORM, 400, "HTTPException"),
        ("POST", IMAGES, b"no form", f"{FORM}; boundary=x", 400, "HTTPException"),
        ("PUT", f"{IMAGES}/a%20b", FILE, "image/png", 404, "UnknownImageError"),
        ("PUT", f"{IMAGES}/{'a' * 129}", FILE, "image/png", 404, "UnknownImageError"),
        ("GET", f"{IMAGES}/..%2f..%2fetc%2fpasswd", b"", "", 404, "HTTPException"),
        ("GET", f"{IMAGES}/nobody", b"", "", 404, "UnknownImageError"),
        ("GET", f"{IMAGES}/nobody/embedding", b"", "", 404, "UnknownImageError"),
        ("POST", f"{IMAGES}/no/masks", json.dumps(QUESTION), JSON, 404, "UnknownImageError"),
        ("POST", MASKS, b"{", JSON, 400, "DecodeError"),
        ("POST", MASKS, b"\xff", JSON, 400, "DecodeError"),
        ("POST", MASKS, b'{"\xe9": 1}', JSON, 400, "DecodeError"),
        ("POST", MASKS, b'{"format": "\xed\xa0\x80"}', JSON, 400, "DecodeError"),
        ("POST", MASKS, b'{"objects":' + b"[" * 100_000, JSON, 400, "ValidationError"),
        ("POST", MASKS, b'{"objects":[{"points":[[1e999,1]]}]}', JSON, 400, "ValidationError"),
        ("POST", MASKS, b"{}", JSON, 400, "ValidationError"),
        ("POST", MASKS, b"{}", "text/plain", 415, "HTTPException"),
        ("POST", MASKS, b" " * (5 << 20), JSON, 413, "TooLargeError"),
        ("GET", "/v1", b"", "", 404, "HTTPException"),
        ("GET", f"{IMAGES}/nobody/", b"", "", 404, "HTTPException"),
        ("PATCH", IMAGES, b"", "", 405, "HTTPException"),
    ],
)
def test_bad_requests_are_refused(
    method: str,
    path: str,
    content: bytes | str,
    media_type: str,
    status: int,
    kind: str,
    serve: Callable[..., TestClient],
) -> None:
    client = serve(image_bytes=4000, pixels=5000)
    client.put("/v1/images/cat", content=FILE, headers=PNG)
    headers = {"content-type": media_type} if media_type else {}
    answer = client.request(method, path, content=content, headers=headers)
    assert (answer.status_code, answer.json()["kind"]) == (status, kind)
    assert answer.json()["error"]
    assert client.post("/v1/images/cat/masks", json=QUESTION).status_code == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": []}, "objects"),
        ({"objects": 3}, "objects"),
        ({"objects": [{}]}, "no prompt"),
        ({"objects": [{"points": [[1, 2, 3]], "labels": [1]}]}, "points"),
        ({"objects": [{"points": [[1, "2"]], "labels": [1]}]}, "points"),
        ({"objects": [{"points": [[1, 2]], "labels": [4]}]}, "labels"),
        ({"objects": [{"points": [[1, 2]], "labels": [1, 1]}]}, "labels"),
        ({"objects": [{"labels": [1]}]}, "labels"),
        ({"objects": [{"box": [5, 5, 1, 1]}]}, "box"),
        ({"objects": [{"image": "/etc/passwd"}]}, "image"),
        ({"format": "gif"}, "format"),
        ({"session": "../a"}, "session"),
        ({"url": "http://example.org/cat.png"}, "url"),
    ],
)
def test_bad_prompts_are_named(
    change: dict[str, Any], message: str, client: TestClient, image_id: str
) -> None:
    answer = client.post(f"/v1/images/{image_id}/masks", json=QUESTION | change)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_limits_of_objects_and_points(serve: Callable[..., TestClient]) -> None:
    client = serve(objects=2, points=3)
    client.put("/v1/images/cat", content=FILE, headers=PNG)
    for objects in (
        QUESTION["objects"] * 3,
        [{"points": [[1, 2]] * 4, "labels": [1] * 4}],
    ):
        answer = client.post("/v1/images/cat/masks", json={"objects": objects})
        assert (answer.status_code, answer.json()["kind"]) == (413, "TooLargeError")


def test_the_deadline_and_a_full_queue(
    toy: SegmentationModel, serve: Callable[..., TestClient]
) -> None:
    gate = threading.Event()
    gate.set()
    model = wrapped(toy, on_decode=lambda outputs: gate.wait(10))
    client = serve(model, seconds=0.2, waiting_clicks=1)
    client.put("/v1/images/cat", content=FILE, headers=PNG)
    gate.clear()
    found = []

    def click() -> None:
        found.append(client.post("/v1/images/cat/masks", json=QUESTION))

    # Two or more are with the threads, one waits, and others find no room.
    threads = [threading.Thread(target=click) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.set()
    assert {answer.status_code for answer in found} == {429, 504}
    (busy, *_) = (answer for answer in found if answer.status_code == 429)
    assert (busy.headers["retry-after"], busy.json()["kind"]) == ("1", "BusyError")
    assert client.post("/v1/images/cat/masks", json=QUESTION).status_code == 200


def test_a_failing_model_is_an_error_of_one_request(
    toy: SegmentationModel, serve: Callable[..., TestClient]
) -> None:
    def no_number(outputs: dict[str, NDArray[np.float32]]) -> None:
        outputs["iou_scores"][:] = np.nan

    def no_memory(outputs: dict[str, NDArray[np.float32]]) -> None:
        raise MemoryError("9 TiB")

    fails: list[Callable[..., None]] = []
    client = serve(wrapped(toy, on_decode=lambda outputs: fails.pop()(outputs) if fails else None))
    client.put("/v1/images/cat", content=FILE, headers=PNG)
    for fail, kind in ((no_number, "BackendError"), (no_memory, "MemoryError")):
        fails.append(fail)
        answer = client.post("/v1/images/cat/masks", json=QUESTION)
        assert (answer.status_code, answer.json()["kind"]) == (500, kind)
        assert len(answer.headers["x-request-id"]) == 32
        assert client.post("/v1/images/cat/masks", json=QUESTION).status_code == 200


def test_the_key_is_asked_for(serve: Callable[..., TestClient]) -> None:
    page = Route("/", lambda request: PlainTextResponse("page"))
    client = serve(api_key="secret", routes=[page])
    for operation in OPERATIONS:
        path = operation.path.replace("{image_id}", "cat")
        for given in (None, "Bearer wrong", "secret", "Bearer secret\xe9"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            answer = client.request(operation.method, path, headers=headers)
            assert (answer.status_code == 401) != operation.is_public
        answer = client.request(operation.method, path, headers={"authorization": "Bearer secret"})
        assert answer.status_code != 401
    assert client.get("/").text == "page"
    assert client.get("/openapi.json").headers["www-authenticate"] == "Bearer"


# --- what it tells about itself -------------------------------------------------------------------


def test_a_model_that_is_not_well_is_not_ready(serve: Callable[..., TestClient]) -> None:
    # The small model's parity record holds random bytes.
    answer = serve().get("/readyz")
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert answer.json()["problem"]


def test_metrics(serve: Callable[..., TestClient]) -> None:
    client = serve()
    client.put("/v1/images/cat", content=FILE, headers=PNG)
    client.post("/v1/images/cat/masks", json=QUESTION)
    client.post("/v1/images/nobody/masks", json=QUESTION)
    client.get("/nothing/here")
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'sam3rt_requests_total{method="PUT",route="/v1/images/{image_id}",status="200"} 1.0',
        'sam3rt_requests_total{method="GET",route="other",status="404"} 1.0',
        'sam3rt_errors_total{kind="UnknownImageError"} 1.0',
        'sam3rt_stage_seconds_count{stage="encode"} 1.0',
        'sam3rt_stage_seconds_count{stage="decode"} 1.0',
        "sam3rt_run_objects_sum 1.0",
        'sam3rt_waiting{queue="clicks"} 0.0',
        "sam3rt_cache_entries 1.0",
        'sam3rt_cache_uses_total{result="hit"} 1.0',
    ):
        assert line in lines


def test_a_request_is_a_line_of_json(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sam3rt_serve.requests"):
        answer = client.get("/v1/images/no%0Abody", headers={"x-request-id": "r-1"})
        client.get("/livez", headers={"x-request-id": "not\tone"})
    assert answer.headers["x-request-id"] == "r-1"
    lines = [JsonFormatter().format(record) for record in caplog.records]
    first, second = map(json.loads, lines)
    assert "\n" not in lines[0]
    assert (first["request_id"], first["status"], first["method"]) == ("r-1", 404, "GET")
    assert first["path"] == "/v1/images/no\nbody"
    assert len(second["request_id"]) == 32


def test_the_description_names_every_operation(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    assert described == {(operation.method, operation.path) for operation in OPERATIONS}

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if "$ref" in value:
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    schemas = document["components"]["schemas"]
    assert {name.rpartition("/")[2] for name in references(document)} <= set(schemas)
    assert schemas["MasksQuestion"]["properties"]["objects"]["minItems"] == 1


def test_shutting_down_closes_the_service(toy: SegmentationModel, tmp_path: Path) -> None:
    service = Service(toy)
    with TestClient(create_app(service)) as client:
        assert client.get("/livez").status_code == 200
    assert not any(thread.is_alive() for thread in service.clicks.threads)
