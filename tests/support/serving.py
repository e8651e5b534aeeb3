"""What the tests of serving share: image files, a small model, and what ``predict`` answers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from tests.support import disk_cache
from tests.support.helpers import edit_manifest
from tests.support.runnable_bundle import runnable_bundle

from sam3rt import SAM3InteractiveImagePredictor, SegmentationModel, load_model
from sam3rt_serve.core import ObjectPrompt

ROOT = Path(__file__).resolve().parents[2]
CAT = ROOT / "tests" / "photos" / "chelsea.png"
# What `environment("triton")` and `environment("ray")` take. Triton's Python backend was built for
# NumPy 1.
TRITON_PACKAGES = (
    *("nvidia-pytriton==0.7.0", "numpy<2", "tritonclient[http,grpc]"),
    *("onnxruntime", "msgspec", "pillow", "safetensors"),
)
RAY_PACKAGES = (
    *("ray[serve]==2.60.0", "starlette", "uvicorn", "prometheus-client", "python-multipart"),
    *("numpy", "onnxruntime", "msgspec", "pillow", "safetensors"),
)
_LAYOUT = """
import json, pathlib, pytriton, sys, sysconfig
print(json.dumps([str(pathlib.Path(pytriton.__file__).parent / "tritonserver"),
    str(pathlib.Path(pytriton.__file__).parents[1] / "nvidia_pytriton.libs"),
    sysconfig.get_config_var("LIBDIR"), "%d.%d" % sys.version_info[:2]]))
"""


def image_file(image: NDArray[np.uint8], form: str = "PNG", **options: Any) -> bytes:
    """An image as a file's content."""
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, form, **options)
    return stream.getvalue()


def toy_model(folder: Path) -> SegmentationModel:
    """A model of 8 px images and a few nodes, in a new folder."""
    bundle = runnable_bundle(folder)

    def edit(document: dict[str, Any]) -> None:
        # SAM 3's 256 pixels are more than a mask has here: all would be filled.
        document["masks"]["max_hole_area"] = 2
        # Of SAM 3, the parity record says what the scores are, and there is none here.
        document["model_type"] = "mobile_sam"

    edit_manifest(folder, edit)
    return load_model(bundle.path, backend="onnxruntime", device="cpu")


def clicks(count: int, height: int, width: int, seed: int = 0) -> list[ObjectPrompt]:
    """Objects with one to three points, and every other one with a box."""
    rng = np.random.default_rng(seed)
    objects = []
    for number in range(count):
        points = rng.uniform((0, 0), (width, height), (1 + number % 3, 2)).tolist()
        corners = np.sort(rng.uniform(0, (width, height), (2, 2)), axis=0).ravel().tolist()
        labels = [1] * (len(points) - 1) + [number % 2]
        objects.append(ObjectPrompt(points, labels, corners if number % 2 else None))
    return objects


def predicted(
    predictor: SAM3InteractiveImagePredictor,
    one: ObjectPrompt,
    multimask: bool = True,
    mask: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """What the predictor says of one object by itself."""
    masks, scores, low_res = predictor.predict(
        one.points or None,
        one.labels or None,
        one.box,
        None if mask is None else mask[None],
        multimask,
    )
    return masks.astype(np.bool_), scores, low_res


def check_equal(found: Sequence[Any], expected: Sequence[NDArray[Any]]) -> None:
    """Masks, scores and low-resolution masks are the same, bit for bit."""
    for array, other in zip(found[:3], expected, strict=True):
        np.testing.assert_array_equal(array, other)


def environment(name: str, *packages: str) -> Path:
    """The Python of a virtual environment with packages, made once for many runs.

    The variable ``SAM3RT_<NAME>_ENV`` may name one that is there already. The test is skipped where
    neither that nor ``SAM3RT_TEST_SERVERS`` is set: Triton and Ray are a gigabyte to fetch.
    """
    given = os.environ.get(f"SAM3RT_{name.upper()}_ENV")
    if given:
        return Path(given) / "bin" / "python"
    if not os.environ.get("SAM3RT_TEST_SERVERS"):
        pytest.skip(f"`make test-servers` fetches {name} and runs it")

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=True)
        # It is moved when it is whole, and its Python finds everything from where it lies then.
        install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(install, check=True)

    key = hashlib.sha256(repr((sys.version, packages)).encode()).hexdigest()[:16]
    return disk_cache.cached_folder(f"venv_{name}", key, make) / "bin" / "python"


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def hostile_calls(port: int, file: bytes) -> list[Callable[[], None]]:
    """Ways to misbehave; none of them waits for an answer that may not come.

    Args:
        port: of the server on this machine.
        file: an image file.
    """

    def raw(content: bytes, wait: bool = True) -> None:
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        # The server may close it before all is sent.
        with connection, contextlib.suppress(OSError):
            connection.sendall(content)
            if wait:
                connection.recv(1 << 16)

    def post(path: str, media_type: str, body: bytes, length: int | None = None) -> bytes:
        return (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {media_type}\r\n"
            f"content-length: {len(body) if length is None else length}\r\n\r\n"
        ).encode() + body

    rng = np.random.default_rng(0)
    prompts = b'{"objects":[{"points":[[1,1]],"labels":[1]}]}'
    return [
        lambda: raw(rng.bytes(2000)),
        lambda: raw(b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * (1 << 20) + b"\r\n\r\n"),
        lambda: raw(b"GET /" + b"a" * (1 << 18) + b" HTTP/1.1\r\nhost: x\r\n\r\n"),
        lambda: raw(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n"),
        lambda: raw(post("/v1/images", "image/png", rng.bytes(5000))),
        lambda: raw(post("/v1/images", "image/png", file[:80], 1 << 40)),
        lambda: raw(post("/v1/images", "image/png", file[:80], 1 << 20), wait=False),
        lambda: raw(post("/v1/images", "image/png", file, -5)),
        lambda: raw(post("/v1/images", "multipart/form-data; boundary=x", b"--x\r\n" * 5000)),
        lambda: raw(post("/v1/images/cat/masks", "application/json", prompts), wait=False),
        lambda: raw(post("/v1/images/cat/masks", "application/json", b'{"objects":[' * 9999)),
        lambda: raw(b"POST /v1/images HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz"),
        lambda: raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ]


def answers(process: subprocess.Popen[Any], url: str) -> bool:
    """Whether a server answers at an address within two minutes, while its process runs."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return True
        time.sleep(0.1)
    return False


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process, and wait for it."""
    process.terminate()
    try:
        process.wait(60)
    finally:
        process.kill()


class ServerProcess:
    """``sam3rt serve`` as a process of its own, for a ``with`` statement.

    Args:
        arguments: of the command line.
        environment: variables beside those of this process.
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = ["--port", str(self.port), "--threads", "1", *arguments]
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> ServerProcess:
        self.log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "sam3rt", "serve", *self._arguments]
        self.process = subprocess.Popen(command, env=self._environment, stderr=self.log)
        if not answers(self.process, f"{self.url}/livez"):
            stop(self.process)
            raise AssertionError(self.lines())
        return self

    def __exit__(self, *error: object) -> None:
        stop(self.process)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged so far; every line is JSON."""
        self.log.seek(0)
        return [json.loads(line) for line in self.log]


class TritonServer:
    """The real server on a model repository, for a ``with`` statement.

    Args:
        python: of an environment with :data:`TRITON_PACKAGES`; it writes the repository too, for
            the server imports from where the repository was written.
        folder: for the repository, the backend and the log.
        arguments: of ``sam3rt triton``.

    Attributes:
        http, grpc: ports.
    """

    def __init__(self, python: Path, folder: Path, *arguments: str) -> None:
        self._folder = folder
        self._log = folder / "log"
        self._variables = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
        code = (
            "import argparse, sys; from sam3rt_serve import triton; p = argparse.ArgumentParser(); "
            "triton.add_arguments(p); sys.exit(triton.run(p.parse_args()))"
        )
        write = [python, "-c", code, folder / "repository", *arguments]
        subprocess.run(write, env=self._variables, check=True, stdout=subprocess.DEVNULL)
        asked = subprocess.run([python, "-c", _LAYOUT], check=True, capture_output=True)
        self._server, libraries, python_library, version = json.loads(asked.stdout)
        backend = folder / "backends" / "python"
        backend.mkdir(parents=True)
        stub = Path(self._server, "python_backend_stubs", version, "triton_python_backend_stub")
        for path in (*Path(self._server, "backends", "python").iterdir(), stub):
            (backend / path.name).symlink_to(path)
        paths = [libraries, f"{self._server}/external_libs", python_library]
        self._variables["LD_LIBRARY_PATH"] = ":".join(paths)

    def __enter__(self) -> TritonServer:
        self.http, self.grpc, metrics = (free_port() for _ in range(3))
        command = [f"{self._server}/bin/tritonserver"]
        command += [f"--model-repository={self._folder / 'repository'}"]
        command += [f"--backend-directory={self._folder / 'backends'}"]
        # The response cache is on, as it may be anywhere.
        command += [
            f"--cache-directory={self._server}/caches",
            "--cache-config=local,size=10485760",
        ]
        for name, port in (("http", self.http), ("grpc", self.grpc), ("metrics", metrics)):
            command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, env=self._variables, stdout=log, stderr=log)
        if not answers(self._process, f"http://127.0.0.1:{self.http}/v2/health/ready"):
            stop(self._process)
            raise AssertionError(self.log()[-4000:])
        return self

    def __exit__(self, *error: object) -> None:
        stop(self._process)

    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text()
