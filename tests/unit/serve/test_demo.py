"""What ``sam3rt demo`` adds to the server, in this process; ``tests/browser`` has the page."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from starlette.testclient import TestClient
from tests.support.serving import CAT

from sam3rt import SegmentationModel
from sam3rt.errors import InvalidInputError
from sam3rt.results import Segmentation
from sam3rt_serve import demo
from sam3rt_serve.core import Service
from sam3rt_serve.demo_page import PAGE, Guard, page_routes
from sam3rt_serve.http import create_app

HOST = "127.0.0.1:8123"
MASKS = np.random.default_rng(0).random((2, 5, 7)) > 0.5
SCORES = (0.9375, 0.5)


@pytest.fixture(scope="module")
def client(toy: SegmentationModel) -> Iterator[TestClient]:
    routes = page_routes(toy.bundle, {"ort.mjs": b"export {}"})
    app = Guard(create_app(Service(toy), routes=routes), {HOST})
    with TestClient(app, base_url=f"http://{HOST}") as made:
        yield made


def question(form: str, count: int = 2) -> dict[str, Any]:
    objects = [
        {
            "number": number,
            "score": score,
            "mask": base64.b64encode(np.packbits(mask, axis=1)).decode(),
        }
        for number, (mask, score) in enumerate(zip(MASKS, SCORES, strict=True), 1)
    ]
    return {
        "format": form,
        "file_name": "zoë.png",
        "height": 5,
        "width": 7,
        "objects": objects[:count],
    }


def read_png(content: bytes) -> Any:
    return np.asarray(PIL.Image.open(io.BytesIO(content)))


def test_png_of_one_object_and_of_several(client: TestClient) -> None:
    answer = client.post("/page/export", json=question("png", 1))
    assert answer.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(read_png(answer.content), MASKS[0] * 255)
    answer = client.post("/page/export", json=question("png"))
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["object-1.png", "object-2.png"]
        np.testing.assert_array_equal(read_png(archive.read("object-2.png")), MASKS[1] * 255)


def test_documents_are_those_of_a_result(client: TestClient) -> None:
    expected = Segmentation(MASKS, (5, 7), np.array(SCORES, np.float32), np.array([1, 2]))
    coco = client.post("/page/export", json=question("coco")).json()
    assert coco == json.loads(json.dumps(expected.to_coco("zoë.png")))
    document = client.post("/page/export", json=question("polygons")).json()
    assert {name: document[name] for name in ("file_name", "height", "width")} == {
        "file_name": "zoë.png",
        "height": 5,
        "width": 7,
    }
    for one, rings, score in zip(
        document["objects"], expected.polygons(1.0, holes=True), SCORES, strict=True
    ):
        assert one["score"] == score
        assert one["polygons"] == [ring.tolist() for ring in rings]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "tiff"}, "Invalid enum value"),
        ({"objects": []}, "length >= 1"),
        ({"height": 9}, "mask: got 5 bytes, expected 9 for 7 x 9 pixels"),
        ({"height": 1 << 20, "width": 1 << 20}, "objects: got too many pixels"),
        ({"path": "/etc/passwd"}, "unknown field"),
    ],
)
def test_exports_that_make_no_sense(client: TestClient, change: dict[str, Any], said: str) -> None:
    answer = client.post("/page/export", json=question("coco") | change)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_an_export_that_is_too_long(client: TestClient) -> None:
    answer = client.post("/page/export", content=bytes(50 << 20))
    assert answer.status_code == 413


def test_every_file_of_the_page_is_served_as_what_it_is(client: TestClient) -> None:
    media_types = {
        ".css": "text/css",
        ".html": "text/html",
        ".jpg": "image/jpeg",
        ".js": "text/javascript",
        ".svg": "image/svg+xml",
    }
    names = [path.name for path in PAGE.iterdir() if path.is_file()]
    assert {"index.html", "app.js", "worker.js"} <= set(names)
    for name in names:
        answer = client.get(f"/page/{name}")
        assert answer.content == (PAGE / name).read_bytes()
        assert answer.headers["content-type"].split(";")[0] == media_types[Path(name).suffix]
    assert client.get("/").content == (PAGE / "index.html").read_bytes()


def test_what_decodes_in_the_page(client: TestClient, toy: SegmentationModel) -> None:
    facts = client.get("/page/facts.json").json()
    assert facts["onnxruntime_web"] is True
    assert facts["manifest"]["fingerprint"] == toy.manifest.fingerprint
    entry = toy.manifest.decoder.model
    graph = client.get(f"/page/decoder/{entry.file}")
    assert graph.content == toy.bundle.file(entry).read_bytes()
    script = client.get("/page/onnxruntime/ort.mjs")
    assert (script.text, script.headers["content-type"]) == (
        "export {}",
        "text/javascript; charset=utf-8",
    )


@pytest.mark.parametrize(
    "path",
    ["decoder/encoder.onnx", "decoder/bundle.json", "onnxruntime/x.wasm", "..%2Fdemo.py", "x.js"],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(f"/page/{path}").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": f"http://{HOST}"}, 200),
        ({"host": "127.0.0.1"}, 403),
        ({"host": "evil.example:8123"}, 403),
        ({"host": "localhost:8123"}, 403),  # the client fixture names one host alone
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": f"https://{HOST}"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_the_page_alone_uses_the_server(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    headers = {"content-type": "image/png", **headers}
    answer = client.post("/v1/images", content=CAT.read_bytes(), headers=headers)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    if status == 403:
        assert answer.json()["kind"] == "ForbiddenError"


@pytest.mark.parametrize("host", ["example.org", "0.0.0.0", "::", ""])
def test_it_listens_at_one_address(host: str) -> None:
    with pytest.raises(InvalidInputError, match="--host"):
        demo.check_host(host)


def test_another_package_than_the_registrys(tmp_path: Path) -> None:
    path = tmp_path / "onnxruntime-web.tgz"
    path.write_bytes(b"something else")
    with pytest.raises(InvalidInputError, match="--onnxruntime-web"):
        demo.read_onnxruntime_web(path)
    with pytest.raises(FileNotFoundError):
        demo.read_onnxruntime_web(tmp_path / "nothing.tgz")
