"""A real server: what the client gets, callers who misbehave, and how it ends."""

from __future__ import annotations

import base64
import contextlib
import http.client
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import uvicorn
from numpy.typing import NDArray
from tests.support.helpers import noise, photo, wrapped
from tests.support.serving import (
    CAT,
    ServerProcess,
    clicks,
    free_port,
    hostile_calls,
    image_file,
    predicted,
)

from sam3rt import (
    BackendError,
    InvalidInputError,
    Prompts,
    SAM3InteractiveImagePredictor,
    SegmentationModel,
    load_model,
)
from sam3rt.cli import main
from sam3rt_serve import cli, wire
from sam3rt_serve.client import Client, ServerError
from sam3rt_serve.connections import BoundedProtocol
from sam3rt_serve.core import ObjectPrompt, Service
from sam3rt_serve.http import create_app
from sam3rt_serve.limits import Limits

IMAGE = noise(24, 31)
FILE = image_file(IMAGE)
POINT = {"points": [[12, 9]], "labels": [1]}


@contextlib.contextmanager
def running(service: Service, connections: int | None = None, **options: Any) -> Iterator[str]:
    """A server in a thread; the address that it listens to."""
    app = create_app(service, **options)
    config = uvicorn.Config(
        *(app,), port=0, http=Impatient, log_config=None, limit_concurrency=connections
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


class Impatient(BoundedProtocol):
    """As ``sam3rt serve`` has it, with less patience."""

    seconds = 0.3


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_client_gets_what_predict_says(toy: SegmentationModel, tmp_path: Path) -> None:
    predictor = SAM3InteractiveImagePredictor(toy)
    predictor.set_image(IMAGE)
    (tmp_path / "image.png").write_bytes(FILE)
    with running(Service(toy), api_key="key") as url, Client(url, api_key="key") as client:
        stored = client.add_image(tmp_path / "image.png")
        assert client.add_image(FILE)["cached"]
        objects = clicks(5, 24, 31)
        plain: list[dict[str, Any]] = [
            {"points": np.array(one.points), "labels": np.array(one.labels)}
            | ({} if one.box is None else {"box": np.array(one.box)})
            for one in objects
        ]
        found = client.segment(stored["image_id"], plain, session="s")
        for one, result in zip(objects, found, strict=True):
            masks, scores, _ = predicted(predictor, one)
            np.testing.assert_array_equal(result.masks, masks)
            np.testing.assert_array_equal(result.scores, scores)
        assert [r.refined for r in client.segment(stored["image_id"], plain, session="s")] == [
            True
        ] * 5
        embedding = client.embedding(stored["image_id"])
        prompts = Prompts([[12, 9]], [1])
        np.testing.assert_array_equal(
            toy.decode(embedding, prompts).low_res_masks,
            toy.decode(toy.encode(IMAGE), prompts).low_res_masks,
        )
        assert client.model()["fingerprint"] == toy.manifest.fingerprint
        assert client.add_image(FILE, "mine")["image_id"] == "mine"
        client.remove_image("mine")
        with pytest.raises(ServerError, match="'mine'") as caught:
            client.segment("mine", [POINT])
        assert (caught.value.status, caught.value.kind) == (404, "UnknownImageError")
        with Client(url) as stranger, pytest.raises(ServerError, match="key"):
            stranger.model()


def test_the_client_reads_any_png(toy: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own quickly, and others' by Pillow, such as with filters."""

    def by_pillow(mask: NDArray[np.bool_], bits: NDArray[np.uint8]) -> str:
        return base64.b64encode(image_file(mask)).decode()  # type: ignore[arg-type]

    found = []
    with running(Service(toy)) as url, Client(url) as client:
        client.add_image(FILE, "cat")
        found.append(client.segment("cat", [POINT])[0].masks)
        monkeypatch.setattr(wire, "_png", by_pillow)
        found.append(client.segment("cat", [POINT])[0].masks)
    assert found[0].any()
    np.testing.assert_array_equal(*found)


def test_the_client_comes_back_to_a_server_that_closed_its_connection(
    toy: SegmentationModel,
) -> None:
    with running(Service(toy)) as url, Client(url) as client:
        client.model()
        assert client._connection.sock is not None
        client._connection.sock.shutdown(socket.SHUT_RDWR)
        assert client.model()
    with pytest.raises(OSError, match="refused"):
        client.model()


def test_the_client_goes_on_after_an_answer_that_was_cut() -> None:
    whole = b'HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"a": 12}'
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for content in (whole[:-3], b"SSH-2.0\r\n", whole):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(content)

        thread = threading.Thread(target=answer)
        thread.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            for cut in ("IncompleteRead", "BadStatusLine"):
                with pytest.raises(ConnectionError, match=cut):
                    client.model()
            assert client.model() == {"a": 12}
        thread.join()


@pytest.mark.parametrize("image", [IMAGE, None, PIL.Image.fromarray(IMAGE)], ids=type)
def test_the_client_wants_a_file(image: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"image: got \w+, expected a path"):
        Client().add_image(image)


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "ftp://localhost", "", "http://", "http://host:port", "http://a b"),
        *("http://host:99999", "http://[::1"),
    ],
)
def test_the_client_wants_an_address(url: str) -> None:
    with pytest.raises(InvalidInputError, match="url"):
        Client(url)


HEAD = b"POST /v1/images HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n"


def connected(url: str, content: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)
    connection.sendall(content)
    return connection


def test_who_hangs_up_takes_no_turn(toy: SegmentationModel) -> None:
    gate, decoded = threading.Event(), []

    def held(outputs: dict[str, Any]) -> None:
        decoded.append(1)
        assert gate.wait(10)

    service = Service(wrapped(toy, on_decode=held), threads=1)
    with running(service) as url, Client(url) as client:
        client.add_image(FILE, "cat")
        first = threading.Thread(target=client.segment, args=("cat", [POINT]))
        first.start()
        eventually(lambda: len(decoded) == 1)
        body = b'{"objects":[{"points":[[12,9]],"labels":[1]}]}'
        head = (
            b"POST /v1/images/cat/masks HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        )
        with connected(url, head + b"content-length: %d\r\n\r\n" % len(body) + body):
            eventually(lambda: service.clicks.waiting == 1)
        eventually(lambda: all(job.future.cancelled() for job in service.clicks._waiting))
        gate.set()
        first.join()
        assert client.segment("cat", [POINT])
    assert len(decoded) == 2


def test_a_body_that_comes_too_slowly(toy: SegmentationModel) -> None:
    half = HEAD + b"content-length: 1000\r\n\r\nhalf"
    with running(Service(toy, Limits(seconds=0.2))) as url, connected(url, half) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def trickle(connection: socket.socket, content: bytes) -> None:
    """Send it so that each byte is in time, but the whole is not."""
    for byte in content:
        connection.sendall(bytes([byte]))
        time.sleep(0.02)


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes it before this side's patience ends."""
    try:
        while connection.recv(1 << 16):
            pass
    except OSError as error:
        return isinstance(error, ConnectionResetError)
    return True


def test_a_header_that_comes_too_slowly(toy: SegmentationModel) -> None:
    with running(Service(toy)) as url:
        for content in (b"", b"GET /li", HEAD):
            with connected(url, content) as connection:
                assert is_closed(connection)
        with connected(url) as connection, pytest.raises(OSError):  # noqa: PT011 - reset or broken
            trickle(connection, HEAD)
        with connected(url, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n") as connection:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            connection.sendall(b"GET /li")  # the second header is under the same rule
            assert is_closed(connection)


def test_a_body_that_goes_on_after_its_refusal(toy: SegmentationModel) -> None:
    head = HEAD + b"content-length: 1000000\r\n\r\n"
    with running(Service(toy, Limits(image_bytes=50))) as url, connected(url, head) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
        with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe
            trickle(connection, b"x" * 200)


def test_no_request_hides_in_another(toy: SegmentationModel) -> None:
    body = b"0\r\n\r\nGET /v1/model HTTP/1.1\r\nhost: x\r\n\r\n"
    length = b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n" % len(body)
    with running(Service(toy)) as url:
        for head in (HEAD, b"GET /livez HTTP/1.1\r\nhost: x\r\n"):
            with connected(url, head + length + body) as connection:
                answer = b"".join(iter(lambda c=connection: c.recv(1 << 16), b""))
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_may_take_longer_than_a_header(toy: SegmentationModel) -> None:
    service = Service(wrapped(toy, on_decode=lambda outputs: time.sleep(0.6)))
    with running(service) as url, Client(url) as client:
        client.add_image(FILE, "cat")
        assert client.segment("cat", [POINT])


def test_who_reads_no_answer_is_left(toy: SegmentationModel) -> None:
    image = image_file(np.zeros((1500, 1500, 3), np.uint8))
    question = b'{"objects":[%s],"format":"bits"}' % b",".join(
        [b'{"points":[[12,9]],"labels":[1]}'] * 16
    )
    with running(Service(toy), connections=100) as url, Client(url) as client:
        client.add_image(image, "large")
        head = b"POST /v1/images/large/masks HTTP/1.1\r\nhost: x\r\n"
        head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
        with connected(url, head % len(question) + question) as connection:
            connection.settimeout(0.1)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.5)
                with contextlib.suppress(OSError):
                    # A connection that was closed takes no more; the answer is some 18 MB.
                    connection.sendall(b"x")
                    continue
                break
            else:
                pytest.fail("still open")


def test_a_full_server_takes_new_callers(toy: SegmentationModel) -> None:
    with running(Service(toy), connections=20) as url, contextlib.ExitStack() as stack:
        with Client(url) as client:
            client.add_image(FILE, "cat")
        half = [HEAD, HEAD + b"content-length: 99\r\n\r\nx", b""]
        hostile = [stack.enter_context(connected(url, half[n % 3])) for n in range(60)]
        with Client(url) as client:
            for _ in range(3):
                assert client.segment("cat", [POINT])
        assert is_closed(hostile[0])


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "--port: got 99999, expected a number from 0 to 65535"),
        (["--host", "no host"], "--host: got 'no host', expected an address of this machine"),
        (["--port", "{taken}"], "cannot listen on 127.0.0.1, port {taken}: Address already in use"),
    ],
)
def test_an_address_that_cannot_be_had_shows_at_once(
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli, "load_from_options", load)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", *(one.format(taken=port) for one in options)]) == 1
    assert capsys.readouterr().err == f"sam3rt serve: {said.format(taken=port)}\n"


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "secret", False)],
)
def test_nobody_is_let_in_before_the_model_is_loaded_nor_anybody_unsaid(
    host: str,
    key: str | None,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_port()

    def load(options: object) -> None:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        raise BackendError("no model")

    monkeypatch.setattr(cli, "load_from_options", load)
    monkeypatch.setattr(cli.logging, "basicConfig", lambda **options: None)
    monkeypatch.delenv("SAM3RT_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("SAM3RT_API_KEY", key)
    with warnings.catch_warnings():
        assert main(["serve", "--host", host, "--port", str(port)]) == 1
    assert capsys.readouterr().err == "sam3rt serve: no model\n"
    assert ("no API key" in caplog.text) == warns


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *[("serve", "--bundle"), ("serve", "--cache-folder"), ("serve", "--api-key-file")],
        *[("demo", "--bundle"), ("demo", "--onnxruntime-web")],
        *[("triton", "--bundle"), ("triton", "--cache-folder")],
    ],
)
def test_an_empty_path_is_not_the_folder_here(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, option, "", "repository"])
    assert f"argument {option}: an empty path" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_serves_the_cat_and_ends_when_it_has_answered(
    tmp_path: Path,
) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    arguments = ["--backend", "onnxruntime", "--api-key-file", str(key)]
    folder = ["--cache-folder", str(tmp_path / "cache")]
    model = load_model(backend="onnxruntime", device="cpu", threads=1)
    predictor = SAM3InteractiveImagePredictor(model)
    predictor.set_image(photo("chelsea"))
    masks, scores, _ = predictor.predict([[225, 150]], [1])
    click = [{"points": [[225, 150]], "labels": [1]}]
    with ServerProcess(*arguments, *folder) as server:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as plain:
            plain.request("GET", "/readyz")
            answer = plain.getresponse()
            assert (answer.status, b'"ready":true' in answer.read()) == (200, True)
        with Client(server.url, api_key="secret") as client:
            image_id = client.add_image(CAT)["image_id"]
            (found,) = client.segment(image_id, click)
            np.testing.assert_array_equal(found.masks, masks.astype(bool))
            np.testing.assert_array_equal(found.scores, scores)
            # Many clicks are on their way when the signal comes: all are answered.
            answers: list[Any] = []

            def ask() -> None:
                with Client(server.url, api_key="secret") as other:
                    answers.append(other.segment(image_id, click)[0])

            threads = [threading.Thread(target=ask) for _ in range(6)]
            for thread in threads:
                thread.start()
            time.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
            assert server.process.wait(30) == 0
        assert len(answers) == 6
        for found in answers:
            np.testing.assert_array_equal(found.masks, masks.astype(bool))
        said = [line["message"] for line in server.lines()]
        assert f"serving mobile_sam at {server.url}" in said
        requests = [line for line in server.lines() if line["message"] == "request"]
        assert [line["status"] for line in requests if line["path"].endswith("/masks")] == [200] * 7
    # Another server with the same folder knows the image.
    with (
        ServerProcess(*arguments, *folder) as server,
        Client(server.url, api_key="secret") as client,
    ):
        (found,) = client.segment(image_id, click)
        np.testing.assert_array_equal(found.masks, masks.astype(bool))


@pytest.mark.slow
def test_misbehaving_callers_disturb_nobody(toy: SegmentationModel, tmp_path: Path) -> None:
    predictor = SAM3InteractiveImagePredictor(toy)
    predictor.set_image(IMAGE)
    expected = predicted(predictor, ObjectPrompt([(12, 9)], [1]))[0]
    bundle = str(toy.bundle.path)
    limits = ["--deadline", "3", "--cache-mb", "1", "--cache-folder", str(tmp_path)]
    with ServerProcess("--bundle", bundle, "--backend", "onnxruntime", *limits) as server:
        over = threading.Event()
        times: list[float] = []
        problems: list[str] = []

        def well_behaved() -> None:
            with Client(server.url) as client:
                while not over.is_set():
                    start = time.perf_counter()
                    client.add_image(FILE, "cat")
                    (found,) = client.segment("cat", [POINT])
                    times.append(time.perf_counter() - start)
                    if not np.array_equal(found.masks, expected):
                        problems.append("other masks")

        def many_ids() -> None:
            with Client(server.url) as client:
                for number in range(500):
                    with contextlib.suppress(ServerError):
                        client.segment(f"id-{number}", [POINT], session=f"s-{number}")
                    if number % 5 == 0:
                        client.add_image(FILE, f"id-{number}")

        good = threading.Thread(target=well_behaved)
        good.start()
        # Headers and bodies that never end, from more callers than may be connected.
        slow = []
        for number in range(1000):
            body = b"content-length: 99\r\n\r\nx" * (number % 2)
            slow.append(connected(server.url, HEAD + body))
        ids = threading.Thread(target=many_ids)
        ids.start()
        for _ in range(5):
            for call in hostile_calls(server.port, FILE):
                call()
        ids.join()
        over.set()
        good.join()
        for connection in slow:
            connection.close()
        assert not problems
        assert len(times) > 50
        assert np.median(times) < 0.5
        assert server.process.poll() is None
        lines = server.lines()
        assert not [line for line in lines if "exception" in line]
        assert 500 not in {line.get("status") for line in lines}
        with Client(server.url) as client:
            assert client.segment("cat", [POINT])


@pytest.mark.slow
def test_the_description_holds(toy: SegmentationModel) -> None:
    """Schemathesis: what the document allows is answered as it says, and nothing is an error."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    with running(Service(toy, Limits(mask_pixels=1 << 20))) as url:
        with Client(url) as client:
            client.add_image(FILE, "cat")
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path == "/readyz":
                continue  # the small model is not well

            @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def check(case: Any) -> None:
                if case.path_parameters:
                    case.path_parameters["image_id"] = "cat"
                case.call_and_validate(excluded_checks=[positive_data_acceptance])

            check()
