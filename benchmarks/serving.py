"""Clicks a second and their latency against the number of users, by several ways of serving them.

    python -m benchmarks.serving --output FOLDER

Every user clicks on one image, waits for the masks and clicks again. The ways:

- ``loop``: ``predict`` calls one after another, whoever asks; users wait in line.
- ``core``: the service in this process, without sharing decoder runs.
- ``batching``: the service in this process; clicks that wait together share decoder runs.
- ``http``: ``sam3rt serve`` as a process of its own, through the client of ``sam3rt_serve``.

Besides, one user's click over HTTP is compared with a plain ``predict`` call, the two in turn, so
that a machine that is busy with other things slows both alike. Every mask that comes is compared
with that of ``predict``. Results go to ``serving.json`` in the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3rt import SAM3InteractiveImagePredictor, SegmentationModel, load_model
from sam3rt.bundle.files import atomic_write
from sam3rt.image_files import read_image
from sam3rt.machine import processor_name, usable_cores
from sam3rt_serve.client import Client, ServerError
from sam3rt_serve.core import Limits, ObjectPrompt, Service

WAYS = ("loop", "core", "batching", "http")
POINTS = 16

Click = Callable[[int], NDArray[np.bool_]]


class Answers:
    """The image, the points that users click on, and what ``predict`` says of each."""

    def __init__(self, model: SegmentationModel, image: Path) -> None:
        self.file = image.read_bytes()
        self.pixels = read_image(image)
        height, width = self.pixels.shape[:2]
        self.size = [height, width]
        rng = np.random.default_rng(0)
        self.points = rng.uniform((0, 0), (width, height), (POINTS, 2)).round(1).tolist()
        self._predictor = SAM3InteractiveImagePredictor(model, mask_dtype=np.bool_)
        self._predictor.set_image(self.pixels)
        self.masks = [self.predict(number) for number in range(POINTS)]

    def predict(self, number: int) -> NDArray[np.bool_]:
        """A plain call."""
        masks, _, _ = self._predictor.predict([self.points[number]], [1])
        return masks


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--bundle", type=Path, help="default: the bundled MobileSAM")
    parser.add_argument("--image", type=Path, default=root / "tests" / "photos" / "chelsea.png")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1, help="of an operator")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="that answer clicks")
    parser.add_argument("--users", default="1,2,4,8,16,32,64")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each figure")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    model = load_model(
        options.bundle, backend=options.backend, device="cpu", threads=options.threads
    )
    answers = Answers(model, options.image)
    users = [int(count) for count in options.users.split(",")]
    results: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "machine": {
            "processor": processor_name(),
            "cores": usable_cores(),
            "python": platform.python_version(),
        },
        "model": {
            "name": model.manifest.name,
            "fingerprint": model.manifest.fingerprint,
            "backend": model.backend.name,
            "precision": model.backend.precision,
            "threads": options.threads,
            "workers": options.workers,
        },
        "image": answers.size,
        "runs": [],
    }
    for way in options.ways.split(","):
        with globals()[f"serve_{way}"](options, model, answers) as new_user:
            for count in users:
                run = {"way": way, "users": count}
                run |= clicks_of(count, new_user, answers, options.seconds)
                results["runs"].append(run)
                print(json.dumps(run), flush=True)
            if way == "http":
                results["overhead"] = overhead(new_user(), answers, options.seconds)
                print(json.dumps(results["overhead"]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.output / "serving.json") as stream:
        stream.write((json.dumps(results, indent=2) + "\n").encode())


@contextmanager
def serve_loop(
    options: argparse.Namespace, model: SegmentationModel, answers: Answers
) -> Iterator[Callable[[], Click]]:
    """One ``predict`` call at a time."""
    line = threading.Lock()

    def click(number: int) -> NDArray[np.bool_]:
        with line:
            return answers.predict(number)

    yield lambda: click


@contextmanager
def serve_core(
    options: argparse.Namespace,
    model: SegmentationModel,
    answers: Answers,
    objects_at_once: int = 1,
) -> Iterator[Callable[[], Click]]:
    """The service in this process."""
    service = Service(
        model, Limits(seconds=600), threads=options.workers, objects_at_once=objects_at_once
    )
    image_id = service.add_image(answers.file).result().image_id

    def click(number: int) -> NDArray[np.bool_]:
        point = ObjectPrompt([answers.points[number]], [1])
        masks: NDArray[np.bool_] = service.segment(image_id, [point]).result()[0].masks
        return masks

    yield lambda: click
    service.close()


def serve_batching(options: argparse.Namespace, model: SegmentationModel, answers: Answers) -> Any:
    """The service in this process, with decoder runs of up to eight objects."""
    return serve_core(options, model, answers, 8)


@contextmanager
def serve_http(
    options: argparse.Namespace, model: SegmentationModel, answers: Answers
) -> Iterator[Callable[[], Click]]:
    """A process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "sam3rt", "serve", "--port", str(port), "--deadline", "600"]
    command += ["--backend", options.backend, "--threads", str(options.threads)]
    command += ["--workers", str(options.workers)]
    command += ["--bundle", str(options.bundle)] if options.bundle else []
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        image_id = when_ready(port, answers.file)

        def new_user() -> Click:
            client = Client(f"http://127.0.0.1:{port}", timeout=600)

            def click(number: int) -> NDArray[np.bool_]:
                point = {"points": [answers.points[number]], "labels": [1]}
                return client.segment(image_id, [point])[0].masks

            return click

        yield new_user
    finally:
        process.terminate()
        process.wait()


def when_ready(port: int, file: bytes) -> str:
    """Send the image once the server is there, and return its id."""
    deadline = time.monotonic() + 300
    while True:
        try:
            with Client(f"http://127.0.0.1:{port}", timeout=300) as client:
                image_id: str = client.add_image(file)["image_id"]
                return image_id
        except (OSError, ServerError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def clicks_of(
    count: int, new_user: Callable[[], Click], answers: Answers, seconds: float
) -> dict[str, Any]:
    """What so many users get in a time: clicks a second, and percentiles of the latency in ms."""
    latencies: list[float] = []
    wrong: list[int] = []
    failed: list[BaseException] = []
    start = threading.Barrier(count + 1)
    over = threading.Event()

    def user(first: int) -> None:
        try:
            click = new_user()
            click(first % POINTS)
            number = first
            start.wait()
            while not over.is_set():
                number += 1
                began = time.perf_counter()
                masks = click(number % POINTS)
                latencies.append(time.perf_counter() - began)
                if not np.array_equal(masks, answers.masks[number % POINTS]):
                    wrong.append(number)
        except BaseException as error:
            failed.append(error)
            start.abort()
            raise

    threads = [threading.Thread(target=user, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    over.set()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if failed or wrong:
        raise SystemExit(f"{len(wrong)} answers were wrong, {len(failed)} users failed")
    return {"clicks": len(latencies), "clicks_a_second": round(len(latencies) / took, 2)} | {
        f"p{p}_ms": round(float(np.percentile(latencies, p)) * 1e3, 2) for p in (50, 95, 99)
    }


def overhead(click: Click, answers: Answers, seconds: float) -> dict[str, Any]:
    """Medians of a plain call and of one over HTTP, made in turn."""
    plain: list[float] = []
    served: list[float] = []
    deadline = time.monotonic() + 2 * seconds
    number = 0
    while time.monotonic() < deadline:
        number = (number + 1) % POINTS
        for call, times in ((answers.predict, plain), (click, served)):
            began = time.perf_counter()
            call(number)
            times.append(time.perf_counter() - began)
    median, over_http = (float(np.median(times)) * 1e3 for times in (plain, served))
    return {
        "clicks": len(plain),
        "predict_p50_ms": round(median, 2),
        "http_p50_ms": round(over_http, 2),
        "overhead_p50_ms": round(over_http - median, 2),
    }


if __name__ == "__main__":
    main()
