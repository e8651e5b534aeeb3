"""Clicks a second and their latency against the number of users, by several ways of serving them.

    python -m benchmarks.serving --output FILE [--quick] [--only loop,http]

Every user clicks on one image, waits for the masks and clicks again. The ways:

- ``loop``: ``predict`` calls one after another, whoever asks; users wait in line.
- ``core``: the service in this process, without sharing decoder runs.
- ``batching``: the service in this process; clicks that wait together share decoder runs.
- ``http``: ``sam3rt serve`` as a process of its own, through the client of ``sam3rt_serve``.

Besides, one user's click over HTTP is compared with a plain ``predict`` call, the two in
turn, so that a machine that is busy with other things slows both alike. Two more sections:

- ``soak``: an hour of an annotator as fast as it goes, 60 images with 20 clicks each; the server's
  memory.
- ``hostile``: what a well-behaved user notices of a thousand callers with half a request, of
  garbage, and of ten thousand unknown images.

Every mask that comes is compared with that of ``predict``. The file is written anew after each
figure. It takes about ten minutes on two idle cores; ``--quick`` three. Longer than other modules,
as all sections share one model and one load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from benchmarks.hardening.soak import slope
from benchmarks.report import conditions, resident_mb
from benchmarks.triton_load import Click, load, percentiles, problems
from numpy.typing import NDArray
from tests.support.serving import (
    ROOT,
    ServerProcess,
    hostile_calls,
    image_file,
)

from sam3rt import SAM3InteractiveImagePredictor, SegmentationModel, load_model
from sam3rt.bundle.files import atomic_write
from sam3rt.image_files import read_image
from sam3rt.machine import usable_cores
from sam3rt_serve.client import Client, ServerError
from sam3rt_serve.core import ObjectPrompt, Service
from sam3rt_serve.limits import Limits

POINTS = 16
_QUICK = {"users": "1,16", "seconds": 2.0, "images": 6, "ids": 1000}
Report = Callable[..., None]
# Makes a click and returns its seconds.
Step = Callable[[int], float]


class Answers:
    """An image, the points that users click on, and what ``predict`` says of each.

    Args:
        model: that is asked.
        pixels: the image, uint8 [H, W, 3].
        multimask: three masks for a click, or one.
    """

    def __init__(
        self, model: SegmentationModel, pixels: NDArray[np.uint8], multimask: bool = True
    ) -> None:
        self.file = image_file(pixels)
        self.pixels = pixels
        self.multimask = multimask
        height, width = pixels.shape[:2]
        rng = np.random.default_rng(0)
        self.points = rng.uniform((0, 0), (width, height), (POINTS, 2)).astype(np.float32).tolist()
        self._predictor = SAM3InteractiveImagePredictor(model, mask_dtype=np.bool_)
        self._predictor.set_image(pixels)
        self.masks = [self.predict(number) for number in range(POINTS)]

    def predict(self, number: int) -> NDArray[np.bool_]:
        """A plain call."""
        masks, _, _ = self._predictor.predict(
            [self.points[number]], [1], multimask_output=self.multimask
        )
        return masks

    def over_http(self, url: str) -> Click:
        """A user of a server, with a connection of its own."""
        client = Client(url, timeout=600)
        image_id = client.add_image(self.file)["image_id"]

        def click(number: int) -> NDArray[np.bool_]:
            point = {"points": [self.points[number]], "labels": [1]}
            return client.segment(image_id, [point], self.multimask)[0].masks

        return click


class Bench:
    """What the sections share.

    Args:
        options: of the command line.
        report: takes results as they come.
    """

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options = options
        self.report = report
        self.model = load_model(
            options.bundle, backend=options.backend, device="cpu", threads=options.threads
        )
        self.pixels = read_image(options.image)
        self.large = np.asarray(PIL.Image.fromarray(self.pixels).resize((1920, 1080)))
        self.answers = Answers(self.model, self.pixels)
        self.users = [int(count) for count in options.users.split(",")]

    def arguments(self, *more: str) -> list[str]:
        """The command line that serves the same model in the same way."""
        options = self.options
        arguments = ["--bundle", str(self.model.bundle.path), "--backend", options.backend]
        return [*arguments, "--threads", str(options.threads), *more]

    def load(self, way: str, new_user: Callable[[], Click]) -> None:
        """One way with each number of users."""
        for count in self.users:
            found = load(new_user, POINTS, self.answers.masks, count, self.options.seconds)
            self.report("runs", {"way": way, "users": count} | found)

    def overhead(self, way: str, served: Step, answers: Answers, server: ServerProcess) -> None:
        """Medians of a plain call and of one that is served, made in turn.

        Args:
            way: its name.
            served: makes one, and returns its seconds.
            answers: the plain ones.
            server: whose processor time is counted, with that of the client.
        """
        plain: list[float] = []
        there: list[float] = []
        spent = [0.0, 0.0]
        deadline = time.monotonic() + 2 * self.options.seconds
        while time.monotonic() < deadline:
            number = len(plain) % POINTS
            start = processor_seconds(server)
            plain.append(timed(answers.predict)(number))
            middle = processor_seconds(server)
            there.append(served(number))
            spent[0] += middle - start
            spent[1] += processor_seconds(server) - middle
        usual, over = np.percentile(plain, (25, 50)) * 1e3, np.percentile(there, (25, 50)) * 1e3
        self.report(
            "overhead",
            {
                "way": way,
                "image": list(answers.pixels.shape[:2]),
                "masks": len(answers.masks[0]),
                "clicks": len(plain),
                "predict_p50_ms": round(usual[1], 2),
                "served_p50_ms": round(over[1], 2),
                "overhead_p50_ms": round(over[1] - usual[1], 2),
                # What other work on the machine disturbs less.
                "overhead_p25_ms": round(over[0] - usual[0], 2),
            }
            | {"overhead_processor_ms": round((spent[1] - spent[0]) / len(plain) * 1e3, 2)},
        )

    # --- the sections -----------------------------------------------------------------------------

    def loop(self) -> None:
        line = threading.Lock()

        def click(number: int) -> NDArray[np.bool_]:
            with line:
                return self.answers.predict(number)

        self.load("loop", lambda: click)

    def core(self, way: str = "core", objects_at_once: int = 1) -> None:
        service = Service(
            self.model,
            Limits(seconds=600),
            threads=self.options.workers,
            objects_at_once=objects_at_once,
        )
        image_id = service.add_image(self.answers.file).result().image_id

        def click(number: int) -> NDArray[np.bool_]:
            point = ObjectPrompt([tuple(self.answers.points[number])], [1])
            masks: NDArray[np.bool_] = service.segment(image_id, [point]).result()[0].masks
            return masks

        self.load(way, lambda: click)
        service.close()

    def batching(self) -> None:
        self.core("batching", 8)

    def http(self) -> None:
        arguments = self.arguments("--workers", str(self.options.workers), "--deadline", "600")
        with ServerProcess(*arguments) as server:
            self.load("http", lambda: self.answers.over_http(server.url))
            for answers in (
                self.answers,
                Answers(self.model, self.large),
                Answers(self.model, self.large, multimask=False),
            ):
                self.overhead("http", timed(answers.over_http(server.url)), answers, server)

    def soak(self) -> None:
        samples: list[tuple[int, float]] = []
        number = 0
        start = time.monotonic()
        with ServerProcess(*self.arguments("--cache-mb", "64")) as server:
            client = Client(server.url, timeout=600)
            for image in range(self.options.images):
                pixels = self.pixels.copy()
                pixels[0, 0] = image
                client.add_image(image_file(pixels), f"i-{image}")
                # The sixteenth from last has left the cache, and its session goes now.
                with contextlib.suppress(ServerError):
                    client.remove_image(f"i-{image - 16}")
                for _ in range(20):
                    number += 1
                    point = {"points": [self.answers.points[number % POINTS]], "labels": [1]}
                    client.segment(f"i-{image}", [point], session=f"s-{image}")
                samples.append((number, resident_mb(server.process.pid)))
            files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
        # The first images fill the cache.
        later = samples[len(samples) // 3 :]
        self.report(
            "soak",
            {
                "images": self.options.images,
                "clicks": number,
                "seconds": round(time.monotonic() - start, 1),
                "resident_mb_after_a_third": round(later[0][1], 1),
                "resident_mb_at_the_end": round(later[-1][1], 1),
                "mb_per_1000_clicks": round(1e3 * slope(*map(list, zip(*later, strict=True))), 2),
                "open_files_at_the_end": files,
            },
        )

    def hostile(self) -> None:
        with ServerProcess(*self.arguments("--deadline", "10")) as server:
            click = self.answers.over_http(server.url)
            self.report("hostile", {"callers": "none"} | self._notice(click, server, lambda: None))
            found = self._notice(click, server, lambda: misbehave(server, self.options.ids))
            self.report("hostile", {"callers": f"1000 half, {self.options.ids} ids"} | found)

    def _notice(
        self, click: Click, server: ServerProcess, happening: Callable[[], None]
    ) -> dict[str, Any]:
        """What a user's clicks are like while something happens, and for a while at least."""
        thread = threading.Thread(target=happening)
        thread.start()
        deadline = time.monotonic() + self.options.seconds
        latencies: list[float] = []
        failures: list[str] = []
        while time.monotonic() < deadline or thread.is_alive():
            number = len(latencies) % POINTS
            start = time.perf_counter()
            try:
                masks = click(number)
            except (ServerError, OSError) as error:
                failures.append(str(error))
                continue
            latencies.append(time.perf_counter() - start)
            if not np.array_equal(masks, self.answers.masks[number]):
                failures.append("other masks")
        thread.join()
        return (
            percentiles(latencies)
            | problems(failures)
            | {
                "clicks": len(latencies),
                "resident_mb": round(resident_mb(server.process.pid), 1),
            }
        )


SECTIONS = ("loop", "core", "batching", "http", "soak", "hostile")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, help="default: the bundled MobileSAM")
    parser.add_argument("--image", type=Path, default=ROOT / "tests" / "photos" / "chelsea.png")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1, help="of an operator")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="that answer clicks")
    parser.add_argument("--users", default="1,2,4,8,16,32,64")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each figure")
    parser.add_argument("--images", type=int, default=60, help="of the soak, 20 clicks each")
    parser.add_argument("--ids", type=int, default=10_000, help="unknown images asked for")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter figures")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    if "--quick" in sys.argv:
        parser.set_defaults(**_QUICK)
    options = parser.parse_args()
    sections = options.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    results: dict[str, Any] = {}

    def report(section: str, result: dict[str, Any]) -> None:
        print(json.dumps({"section": section} | result), flush=True)
        results.setdefault(section, []).append(result)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(options.output) as stream:
            stream.write((json.dumps(results, indent=2) + "\n").encode())

    bench = Bench(options, report)
    results |= conditions(options.backend, "numpy", "uvicorn") | {
        "model": {
            "name": bench.model.manifest.name,
            "fingerprint": bench.model.manifest.fingerprint,
            "precision": bench.model.backend.precision,
            "threads": options.threads,
            "workers": options.workers,
        },
        "image": list(bench.pixels.shape[:2]),
    }
    for section in sections:
        getattr(bench, section)()


def timed(call: Click) -> Step:
    """The seconds that a click takes."""

    def measured(number: int) -> float:
        start = time.perf_counter()
        call(number)
        return time.perf_counter() - start

    return measured


def misbehave(server: ServerProcess, ids: int) -> None:
    """A thousand callers with half a request, garbage, and images that nobody has sent."""
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            caller = stack.enter_context(server.connect())
            head = b"POST /v1/images HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n"
            caller.sendall(head + b"content-length: 99\r\n\r\nx" * (number % 2))
        garbage = hostile_calls(server.port, image_file(np.zeros((9, 9, 3), np.uint8)))
        client = Client(server.url)
        point = {"points": [[1, 1]], "labels": [1]}
        for number in range(ids):
            with contextlib.suppress(ServerError):
                client.segment(f"id-{number}", [point], session=f"s-{number}")
            if number % 50 == 0:
                garbage[number // 50 % len(garbage)]()


def processor_seconds(server: ServerProcess) -> float:
    """Spent so far by this process and, in whole hundredths, by a server."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
