"""Load on a repository of ``sam3rt triton`` in a running server, as ``perf_analyzer`` makes it.

    python -m benchmarks.triton_load --image photo.jpg --http localhost:8000 --grpc localhost:8001

Needs ``tritonclient[http,grpc]`` and NumPy, and nothing of sam3rt. The image is encoded once; then,
for each protocol and each number of clients, every client sends a click, waits for its masks and
sends the next. A line of JSON says for each: clicks a second, percentiles of the latency in
milliseconds, and errors.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PROTOCOLS = ("http", "grpc")
_TYPES = {"float32": "FP32", "int32": "INT32", "uint8": "UINT8", "object": "BYTES"}
# Masks go out as they are; the rest of an answer is not asked for.
_OUTPUTS = ("masks", "scores")

Click = Callable[[int], NDArray[np.bool_]]


class User:
    """A client of its own.

    Args:
        protocol: ``"http"`` or ``"grpc"``.
        address: HOST:PORT.
    """

    def __init__(self, protocol: str, address: str) -> None:
        self._library = importlib.import_module(f"tritonclient.{protocol}")
        self._client = self._library.InferenceServerClient(address)

    def call(self, model: str, outputs: tuple[str, ...], **arrays: NDArray[Any]) -> Any:
        """Ask a model; the result has ``as_numpy``."""
        inputs = []
        for name, array in arrays.items():
            kind = _TYPES[array.dtype.name]
            inputs.append(self._library.InferInput(name, array.shape, kind))
            inputs[-1].set_data_from_numpy(array)
        wanted = [self._library.InferRequestedOutput(name) for name in outputs]
        return self._client.infer(model, inputs, outputs=wanted)

    def encode(self, file: bytes) -> tuple[NDArray[Any], list[int]]:
        """An image's id as ``sam3rt_decode`` takes it, and its (height, width)."""
        stored = self.call(
            "sam3rt_encode", ("image_id", "size"), image=np.frombuffer(file, np.uint8)
        )
        return stored.as_numpy("image_id")[None], stored.as_numpy("size").tolist()

    def clicks(self, file: bytes, points: list[list[float]]) -> Click:
        """Encode an image; what is returned gives the masks of a point's object, bool [C, H, W]."""
        image_id, _ = self.encode(file)
        labels = np.ones((1, 1, 1), np.int32)

        def click(number: int) -> NDArray[np.bool_]:
            point = np.array(points[number], np.float32).reshape(1, 1, 1, 2)
            prompt = {"image_id": image_id, "points": point, "labels": labels}
            found = self.call("sam3rt_decode", _OUTPUTS, **prompt)
            masks: NDArray[np.bool_] = found.as_numpy("masks")[0, 0]
            return masks

        return click


def load(
    new_click: Callable[[], Click],
    points: int,
    masks: Sequence[NDArray[np.bool_]] | None,
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    """What so many clients get in a time: each clicks, waits for the masks and clicks again.

    Args:
        new_click: makes a client of its own; it is called with the number of a point.
        points: how many there are.
        masks: what must come for each point, unless that is not known.
        clients: how many.
        seconds: how long.

    Returns:
        Clicks a second, percentiles of the latency in milliseconds, and errors.
    """
    latencies: list[float] = []
    errors: list[str] = []
    start, over = threading.Barrier(clients + 1), threading.Event()
    turn = threading.Lock()

    def client(number: int) -> None:
        try:
            # Sixty-four images at once would be refused, as more than may wait for the encoder.
            with turn:
                click = new_click()
            click(number % points)
            start.wait()
        except BaseException:
            start.abort()
            raise
        while not over.is_set():
            number = (number + 1) % points
            began = time.perf_counter()
            try:
                found = click(number)
            except Exception as error:  # what the server refuses is counted
                errors.append(str(error))
                continue
            latencies.append(time.perf_counter() - began)
            if masks is not None and not np.array_equal(found, masks[number]):
                errors.append("other masks than expected")

    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    over.set()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    rate = {"clicks": len(latencies), "clicks_a_second": round(len(latencies) / took, 2)}
    return rate | percentiles(latencies) | problems(errors)


def percentiles(latencies: list[float]) -> dict[str, float]:
    """Of latencies in seconds, in milliseconds; zeros if there is none."""
    found = np.percentile(latencies or [0.0], (50, 95, 99)) * 1e3
    return {f"p{p}_ms": round(ms, 2) for p, ms in zip((50, 95, 99), found.tolist(), strict=True)}


def problems(errors: list[str]) -> dict[str, Any]:
    """How many there were, and the first."""
    return {"errors": len(errors)} | ({"first_error": errors[0]} if errors else {})


def main() -> int:
    """Make the load and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=Path, required=True, metavar="FILE")
    parser.add_argument("--http", metavar="HOST:PORT")
    parser.add_argument("--grpc", metavar="HOST:PORT")
    parser.add_argument("--clients", default="1,2,4,8,16,32,64", help="numbers of them, in turn")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number")
    parser.add_argument("--output", type=Path, metavar="FILE", help="what is printed, as a list")
    options = parser.parse_args()
    file = options.image.read_bytes()
    addresses = {name: getattr(options, name) for name in _PROTOCOLS if getattr(options, name)}
    if not addresses:
        parser.error("--http, --grpc or both are needed")
    name, address = next(iter(addresses.items()))
    _, (height, width) = User(name, address).encode(file)
    points = np.random.default_rng(0).uniform((0, 0), (width, height), (16, 2)).tolist()
    runs = []
    for protocol, address in addresses.items():

        def new_click(protocol: str = protocol, address: str = address) -> Click:
            return User(protocol, address).clicks(file, points)

        for clients in map(int, options.clients.split(",")):
            found = load(new_click, len(points), None, clients, options.seconds)
            runs.append({"protocol": protocol, "users": clients} | found)
            print(json.dumps(runs[-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(runs, indent=2) + "\n")
    return int(any(run["errors"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
