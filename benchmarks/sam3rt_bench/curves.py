"""How durations depend on objects, points, sizes, callers and the like."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3rt.embedding import ImageEmbedding
from sam3rt.geometry import geometry
from sam3rt.machine import usable_cores
from sam3rt.predictor import SAM3InteractiveImagePredictor
from sam3rt.prompts import Prompts

from .candidates import Candidate
from .document import Curve, CurvePoint, Times
from .scene import click, many_points
from .stages import Progress
from .timing import Effort, alternate, summarize, timed

OBJECTS = (1, 2, 4, 8, 16, 32, 64)
POINTS = (1, 2, 4, 8, 16, 32)
PROMPTS = (1, 2, 4, 8, 16, 32, 64)
IMAGES = (1, 2, 4, 8)
CALLERS = (1, 2, 4, 8)
SIZES = {
    "VGA": (480, 640),
    "720p": (720, 1280),
    "1080p": (1080, 1920),
    "4K": (2160, 3840),
    "8K": (4320, 7680),
}
# An encoder slower than this is not run many times for one curve.
_SLOW_SECONDS = 1.0


class CurveMaker:
    """Measures the curves of one candidate.

    Args:
        candidate: what to measure.
        image: uint8 [H, W, 3].
        effort: how often, for each point.
        quick: fewer points.
        progress: told what is measured.
    """

    def __init__(
        self,
        candidate: Candidate,
        image: NDArray[np.uint8],
        effort: Effort,
        quick: bool,
        progress: Progress,
    ) -> None:
        self._candidate = candidate
        self._model = candidate.model
        self._image = image
        self._effort = effort
        self._quick = quick
        self._progress = progress
        start = time.perf_counter()
        self._embedding = self._model.encode(image)
        self._encode_seconds = time.perf_counter() - start

    @property
    def embedding(self) -> ImageEmbedding:
        """The image's."""
        return self._embedding

    def curves(self) -> Iterator[Curve]:
        """All of them, as they are measured."""
        yield self.objects()
        yield self.points()
        yield self.prompts_per_image()
        yield self.image_size()
        yield self.images_per_batch()
        yield self.callers()
        yield self.embedding_files()

    def objects(self) -> Curve:
        """The decoder, one click per object."""
        return self._decoder_curve("objects per call", "objects", OBJECTS, lambda n: (n, 1))

    def points(self) -> Curve:
        """The decoder, one object."""
        return self._decoder_curve("points per object", "points", POINTS, lambda n: (1, n))

    def prompts_per_image(self) -> Curve:
        """An image and then clicks on it, all together, from one run."""
        predictor = SAM3InteractiveImagePredictor(self._model)
        arguments = click(self._image.shape[:2]).arguments()
        predictor.set_image(self._image)
        predictor.predict(**arguments)
        counts = self._thin(PROMPTS)
        runs: list[list[float]] = []
        for _ in range(self._encoder_runs()):
            start = time.perf_counter()
            predictor.set_image(self._image)
            passed = []
            for _ in range(counts[-1]):
                predictor.predict(**arguments)
                passed.append(time.perf_counter() - start)
            runs.append(passed)
        points = [
            self._point(n, str(n), [passed[n - 1] for passed in runs], calls=n) for n in counts
        ]
        return self._curve("prompts per image", "prompts", "set_image and the prompts", points)

    def image_size(self) -> Curve:
        """One click, which the encoder's fixed input keeps apart from the image's size."""
        points = []
        for label, size in list(SIZES.items())[: 3 if self._quick else None]:
            self._progress(f"curves: {self._candidate.name}, image size {label}")
            place = geometry(self._model.manifest.image, size)
            predictor = SAM3InteractiveImagePredictor(self._model)
            predictor.set_embedding(dataclasses.replace(self._embedding, geometry=place))
            arguments = click(size).arguments()
            times = alternate({"call": partial(predictor.predict, **arguments)}, self._effort)
            points.append(
                CurvePoint(size[0] * size[1] / 1e6, label, times["call"], _rate(times["call"]))
            )
        return self._curve("image size", "megapixels", "predict, one click", tuple(points))

    def images_per_batch(self) -> Curve:
        """``set_image_batch``."""
        predictor = SAM3InteractiveImagePredictor(self._model)
        counts = self._thin(IMAGES)
        if self._encode_seconds > _SLOW_SECONDS:
            counts = counts[:2]
        points = []
        for count in counts:
            self._progress(f"curves: {self._candidate.name}, {count} images per batch")
            images = [self._image] * count
            call = partial(predictor.set_image_batch, images)
            seconds = [timed(call)[0] for _ in range(self._encoder_runs())]
            points.append(self._point(count, str(count), seconds, calls=count))
        return self._curve("images per batch", "images", "set_image_batch", points)

    def callers(self) -> Curve:
        """Clicks from several threads at once, each with a predictor of its own."""
        points = []
        arguments = click(self._image.shape[:2]).arguments()
        calls = 4 if self._quick else 16
        for count in self._thin(CALLERS):
            self._progress(f"curves: {self._candidate.name}, {count} callers at once")
            barrier = threading.Barrier(count)

            def work(_: int, barrier: threading.Barrier = barrier) -> list[float]:
                predictor = SAM3InteractiveImagePredictor(self._model)
                predictor.set_embedding(self._embedding)
                predictor.predict(**arguments)
                barrier.wait()
                return [timed(lambda: predictor.predict(**arguments))[0] for _ in range(calls)]

            with ThreadPoolExecutor(count) as pool:
                lists = list(pool.map(work, range(count)))
            seconds = [value for values in lists for value in values]
            rate = sum(len(values) / sum(values) for values in lists)
            points.append(CurvePoint(count, str(count), summarize(seconds), round(rate, 3)))
        return self._curve("concurrent callers", "callers", "predict, one click", tuple(points))

    def embedding_files(self) -> Curve:
        """Saving an embedding and loading it to the device."""
        self._progress(f"curves: {self._candidate.name}, embedding files")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.embedding"
            self._embedding.save(path)
            times = alternate(
                {
                    "save": lambda: self._embedding.save(path),
                    "load": lambda: self._model.load_embedding(path),
                },
                self._effort,
            )
        points = tuple(
            CurvePoint(self._embedding.nbytes / 1e6, name, t, _rate(t)) for name, t in times.items()
        )
        return self._curve("embedding files", "megabytes", "save, and load to the device", points)

    def _decoder_curve(
        self, name: str, unit: str, counts: Iterable[int], shape: Callable[[int], tuple[int, int]]
    ) -> Curve:
        points = []
        for count in self._thin(tuple(counts)):
            self._progress(f"curves: {self._candidate.name}, {count} {unit}")
            prompts = many_points(self._embedding.original_size, *shape(count))
            times = alternate({"call": partial(self._decode, prompts)}, self._effort)["call"]
            points.append(CurvePoint(count, str(count), times, _rate(times, count)))
        return self._curve(name, unit, "decode, without the masks' final size", tuple(points))

    def _encoder_runs(self) -> int:
        return 1 if self._quick or self._encode_seconds > _SLOW_SECONDS else 3

    def _decode(self, prompts: Prompts) -> Any:
        embedding: ImageEmbedding = self._embedding
        return self._model.decode(embedding, prompts, multimask_output=True)

    def _thin(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Every second of the counts where it is to be quick."""
        return counts[::2][:3] if self._quick else counts

    def _point(self, x: float, label: str, seconds: list[float], calls: int) -> CurvePoint:
        times = summarize(seconds)
        return CurvePoint(x, label, times, _rate(times, calls))

    def _curve(self, name: str, unit: str, call: str, points: Iterable[CurvePoint]) -> Curve:
        return Curve(self._candidate.name, name, unit, call, tuple(points))


def thread_counts(quick: bool) -> tuple[int, ...]:
    """1, 2, 4 and so on, up to the cores this process may use."""
    cores = usable_cores()
    counts = [2**i for i in range(cores.bit_length()) if 2**i < cores]
    counts.append(cores)
    return tuple(counts[:2] if quick else counts)


def threads_curve(
    load: Callable[[int], Candidate],
    name: str,
    image: NDArray[np.uint8],
    embedding_of: ImageEmbedding,
    effort: Effort,
    quick: bool,
    progress: Progress,
) -> Curve:
    """One click by the threads of the backend; each number of threads is a model of its own."""
    points = []
    for count in thread_counts(quick):
        progress(f"curves: {name}, {count} threads")
        candidate = load(count)
        model = candidate.model
        embedding = dataclasses.replace(
            embedding_of, features=model.backend.upload(embedding_of.features.numpy())
        )
        prompts = click(image.shape[:2]).prompts
        times = alternate({"call": partial(model.decode, embedding, prompts)}, effort)
        points.append(CurvePoint(count, str(count), times["call"], _rate(times["call"])))
    return Curve(name, "threads", "threads", "decode, one click", tuple(points))


def _rate(times: Times, calls: int = 1) -> float:
    """Calls per second at the median."""
    return round(1e3 * calls / max(times.median_ms, 1e-6), 3)
