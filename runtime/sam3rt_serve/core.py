"""The service itself, without a network: images in, embeddings kept, masks out.

Calls return futures. Images and clicks wait in queues of their own, so that no click waits for
an encoder run.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sam3rt.backends.base import OBJECTS_AT_ONCE
from sam3rt.embedding import ImageEmbedding
from sam3rt.embedding_cache import EmbeddingCache
from sam3rt.errors import ImageError, PromptError
from sam3rt.image_files import upright_rgb
from sam3rt.machine import usable_cores
from sam3rt.model import SegmentationModel
from sam3rt.prompts import Prompts

from .errors import TooLargeError, UnknownImageError
from .work import WorkQueue

# What Pillow decodes in this process by code that many others use.
_FORMATS = ("JPEG", "PNG")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait.

    Attributes:
        image_bytes: length of an image file.
        pixels: of an image.
        objects: in a request.
        points: of an object.
        mask_pixels: of all masks of a request together.
        waiting_images: images that may wait for the encoder.
        waiting_clicks: requests for masks that may wait for the decoder.
        seconds: time that a request has.
        session_bytes: memory for the low-resolution masks of all sessions.
    """

    image_bytes: int = 32 << 20
    pixels: int = 1 << 26
    objects: int = 64
    points: int = 256
    mask_pixels: int = 1 << 28
    waiting_images: int = 16
    waiting_clicks: int = 256
    seconds: float = 30.0
    session_bytes: int = 64 << 20


class StoredImage(NamedTuple):
    """An image that is ready for clicks.

    Attributes:
        image_id: what to call it.
        size: (height, width) of the upright image, pixels.
        is_new: whether it had to be encoded.
    """

    image_id: str
    size: tuple[int, int]
    is_new: bool


@dataclass(frozen=True)
class ObjectPrompt:
    """One object's prompts; coordinates are pixels of the upright image.

    Attributes:
        points: (x, y) of each click.
        labels: one for each point, 1 foreground, 0 background.
        box: x0, y0, x1, y1, or ``None``.
    """

    points: Sequence[tuple[float, float]] = ()
    labels: Sequence[int] = ()
    box: tuple[float, float, float, float] | None = None


class ObjectMasks(NamedTuple):
    """What was found of one object.

    Attributes:
        masks: bool [C, H, W] of the image's size.
        scores: predicted IoUs, float32 [C].
        low_res_masks: float32 [C, h, w], as ``predict`` returns them.
        is_refined: whether the session's earlier mask of this object was a prompt too.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    low_res_masks: NDArray[np.float32]
    is_refined: bool


class _Click(NamedTuple):
    """A request for masks."""

    image_id: str
    objects: tuple[ObjectPrompt, ...]
    multimask: bool
    session: str | None
    finish: Callable[[list[ObjectMasks]], Any]


class _Upload(NamedTuple):
    """A request to store an image."""

    image_id: str
    content: bytes


class Service:
    """One model for many users. Every method is safe to call from threads.

    Masks are those of ``SAM3InteractiveImagePredictor.predict`` with its defaults, bit for bit.

    Args:
        model: what to serve.
        limits: what a request may ask for.
        cache_bytes: memory for embeddings, where the decoder runs.
        cache_folder: a second level for embeddings; see :class:`EmbeddingCache`.
        max_folder_bytes: what the files there may take.
        threads: that answer clicks; ``None`` for one a core, at least two and at most eight.

    Attributes:
        cache: the embeddings.
        uploads: the queue of images.
        clicks: the queue of requests for masks.
        on_run: told how many objects were in each decoder run.
    """

    def __init__(
        self,
        model: SegmentationModel,
        limits: Limits | None = None,
        *,
        cache_bytes: int = 1 << 30,
        cache_folder: str | Path | None = None,
        max_folder_bytes: int = 1 << 36,
        threads: int | None = None,
    ) -> None:
        self.model = model
        self.limits = limits or Limits()
        self.cache = EmbeddingCache(model, cache_bytes, cache_folder, max_folder_bytes)
        self.on_run: Callable[[int], None] = lambda objects: None
        self._sessions = _Sessions(self.limits.session_bytes)
        # While one image is encoded, the next is read.
        self._encoder = threading.Lock()
        self.uploads: WorkQueue[_Upload, StoredImage] = WorkQueue(
            self._store, "upload", threads=2, most_waiting=self.limits.waiting_images
        )
        self.clicks: WorkQueue[_Click, Any] = WorkQueue(
            self._click,
            "click",
            threads=threads or min(8, max(2, usable_cores())),
            most_waiting=self.limits.waiting_clicks,
            most_together=OBJECTS_AT_ONCE,
        )

    def close(self) -> None:
        """Answer what is waiting and take nothing more."""
        self.uploads.close()
        self.clicks.close()

    def add_image(
        self, content: bytes, image_id: str | None = None, *, deadline: float | None = None
    ) -> Future[StoredImage]:
        """Encode an image file, unless that has been done.

        Args:
            content: a JPEG or PNG file. An EXIF orientation is applied.
            image_id: what to call it; a hash of the content by default. An id that is known stays
                with the image that it has.
            deadline: seconds of ``time.monotonic``; the limits' time from now by default.

        Returns:
            The stored image. Its exceptions: ``ImageError``, ``TooLargeError``, ``BackendError``,
            and ``DeadlineError`` where its turn does not come in time.

        Raises:
            TooLargeError: the file is longer than the limit.
            BusyError: too many images wait already.
        """
        if len(content) > self.limits.image_bytes:
            raise TooLargeError(
                f"an image of {len(content)} bytes, at most {self.limits.image_bytes} are taken"
            )
        upload = _Upload(image_id or hashlib.sha256(content).hexdigest(), content)
        return self.uploads.submit(upload, self._deadline(deadline))

    def find_image(self, image_id: str) -> StoredImage:
        """An image that was stored.

        Raises:
            UnknownImageError: there is none under this id.
        """
        with self.cache.use(image_id) as embedding:
            if embedding is None:
                raise UnknownImageError(f"no image {image_id!r}: send it (again)")
            return StoredImage(image_id, embedding.original_size, False)

    def embedding_file(self, image_id: str) -> bytes:
        """What ``ImageEmbedding.save`` would write.

        Raises:
            UnknownImageError: there is no image under this id.
        """
        with self.cache.use(image_id) as embedding:
            if embedding is None:
                raise UnknownImageError(f"no image {image_id!r}: send it (again)")
            return embedding.to_bytes()

    def remove_image(self, image_id: str) -> None:
        """Forget an image and its sessions.

        Raises:
            UnknownImageError: there is none under this id.
        """
        self._sessions.discard(image_id)
        if not self.cache.discard(image_id):
            raise UnknownImageError(f"no image {image_id!r}")

    def segment(
        self,
        image_id: str,
        objects: Sequence[ObjectPrompt],
        multimask: bool = True,
        *,
        session: str | None = None,
        finish: Callable[[list[ObjectMasks]], Any] = list,
        deadline: float | None = None,
    ) -> Future[Any]:
        """Ask for objects' masks.

        Requests on one image that wait at the same time share decoder runs.

        Args:
            image_id: of an image that was stored.
            objects: each with a point or a box at least.
            multimask: three masks of each object, or the best one.
            session: a name under which each object's best low-resolution mask is kept, by the
                object's position. In the session's next request on this image, it is a prompt too.
            finish: makes the answer of what was found, on the queue's thread.
            deadline: seconds of ``time.monotonic``; the limits' time from now by default.

        Returns:
            What ``finish`` made of a list of :class:`ObjectMasks`. Its exceptions:
            ``UnknownImageError``, ``TooLargeError``, ``PromptError``, ``BackendError``, and
            ``DeadlineError`` where its turn does not come in time.

        Raises:
            TooLargeError: more objects or points than the limits allow.
            PromptError: an object has no prompt, or not as many labels as points.
            BusyError: too many requests wait already.
        """
        self._check(objects)
        click = _Click(image_id, tuple(objects), bool(multimask), session, finish)
        kind = (image_id, click.multimask)
        return self.clicks.submit(click, self._deadline(deadline), kind=kind, size=len(objects))

    def _deadline(self, given: float | None) -> float:
        return time.monotonic() + self.limits.seconds if given is None else given

    def _check(self, objects: Sequence[ObjectPrompt]) -> None:
        if not objects:
            raise PromptError("objects", "none", "at least one object")
        if len(objects) > self.limits.objects:
            raise TooLargeError(f"{len(objects)} objects, at most {self.limits.objects} are taken")
        for number, one in enumerate(objects):
            if len(one.points) > self.limits.points:
                raise TooLargeError(
                    f"objects[{number}] has {len(one.points)} points, at most "
                    f"{self.limits.points} are taken"
                )
            if len(one.labels) != len(one.points):
                raise PromptError(
                    f"objects[{number}].labels",
                    f"{len(one.labels)} labels",
                    f"one per point ({len(one.points)})",
                )
            if not one.points and one.box is None:
                raise PromptError(f"objects[{number}]", "no prompt", "at least one point or a box")

    # --- on the queues' threads -------------------------------------------------------------------

    def _store(self, uploads: Sequence[_Upload]) -> list[StoredImage]:
        (upload,) = uploads
        image_id = upload.image_id
        with self.cache.use(image_id) as embedding:
            if embedding is not None:
                return [StoredImage(image_id, embedding.original_size, False)]
        image = read_image(upload.content, self.limits.pixels)
        with self._encoder:
            with self.cache.use(image_id) as embedding:
                if embedding is not None:  # the same image came twice at the same time
                    return [StoredImage(image_id, embedding.original_size, False)]
            embedding = self.model.encode(image)
            self.cache.add(image_id, embedding)
        return [StoredImage(image_id, embedding.original_size, True)]

    def _click(self, clicks: Sequence[_Click]) -> list[Any]:
        """Answer clicks on one image, all multi-mask or all single-mask."""
        first = clicks[0]
        with self.cache.use(first.image_id) as embedding:
            if embedding is None:
                raise UnknownImageError(f"no image {first.image_id!r}: send it (again)")
            height, width = embedding.original_size
            channels = self.model.manifest.masks.multimask if first.multimask else 1
            most = self.limits.mask_pixels // (channels * height * width)
            together = sum(len(click.objects) for click in clicks)
            if together > most and len(clicks) > 1:
                return [self._click([click])[0] for click in clicks]
            if together > most:
                raise TooLargeError(
                    f"{together} objects' masks of {width} x {height} pixels, at most {most} "
                    "objects of this image are taken in a request"
                )
            found = self._segment(embedding, clicks)
        return [click.finish(masks) for click, masks in zip(clicks, found, strict=True)]

    def _segment(
        self, embedding: ImageEmbedding, clicks: Sequence[_Click]
    ) -> list[list[ObjectMasks]]:
        """Decode all objects of all clicks in as few runs as leave each object's result as it is.

        Objects of one run have equal numbers of points: padding would change logits in their last
        bits.
        """
        runs = defaultdict(list)
        for at, click in enumerate(clicks):
            earlier = self._sessions.get(click.image_id, click.session, len(click.objects))
            for number, (one, mask) in enumerate(zip(click.objects, earlier, strict=True)):
                shape = (len(one.points), one.box is not None, mask is not None)
                runs[shape].append(((at, number), one, mask))
        found: dict[tuple[int, int], ObjectMasks] = {}
        rules = self.model.manifest.masks
        for (points, has_box, is_refined), run in runs.items():
            places, objects, masks = zip(*run, strict=True)
            self.on_run(len(run))
            decoded, finished = self.model.segment(
                embedding,
                Prompts(
                    np.array([one.points for one in objects], np.float32) if points else None,
                    np.array([one.labels for one in objects]) if points else None,
                    np.array([one.box for one in objects], np.float32) if has_box else None,
                    np.stack(masks)[:, None] if is_refined else None,
                ),
                clicks[0].multimask,
                max_hole_area=rules.max_hole_area,
                dtype=np.bool_,
            )
            low_res = decoded.low_res_masks
            if rules.low_res_limit is not None:
                low_res = np.clip(low_res, -rules.low_res_limit, rules.low_res_limit)
            answers = zip(finished, decoded.iou_predictions, low_res, strict=True)
            for place, answer in zip(places, answers, strict=True):
                found[place] = ObjectMasks(*answer, is_refined)
        results = [
            [found[at, number] for number in range(len(click.objects))]
            for at, click in enumerate(clicks)
        ]
        for click, result in zip(clicks, results, strict=True):
            if click.session is not None:
                best = [one.low_res_masks[int(np.argmax(one.scores))] for one in result]
                self._sessions.put(click.image_id, click.session, best)
        return results


class _Sessions:
    """Low-resolution masks of the objects of each session's last request, in bounded memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._masks: OrderedDict[tuple[str, str], list[NDArray[np.float32]]] = OrderedDict()

    def get(
        self, image_id: str, session: str | None, objects: int
    ) -> list[NDArray[np.float32] | None]:
        """The mask of each object, ``None`` for those that were not in the last request."""
        with self._lock:
            known = self._masks.get((image_id, session or "")) if session is not None else None
        masks = (known or [])[:objects]
        return [*masks, *[None] * (objects - len(masks))]

    def put(self, image_id: str, session: str, masks: list[NDArray[np.float32]]) -> None:
        """Keep masks, and forget those of the sessions that were used longest ago."""
        copies = [mask.copy() for mask in masks]  # not views of whole runs
        with self._lock:
            self._drop((image_id, session))
            self._masks[image_id, session] = copies
            self._bytes += sum(mask.nbytes for mask in copies)
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._masks)))

    def discard(self, image_id: str) -> None:
        """Forget all sessions on an image."""
        with self._lock:
            for key in [key for key in self._masks if key[0] == image_id]:
                self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        self._bytes -= sum(mask.nbytes for mask in self._masks.pop(key, ()))


def read_image(content: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a JPEG or PNG file, upright.

    Args:
        content: the file's content.
        max_pixels: of the largest image that is decoded; larger ones are refused by their header.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: it is no such image, or a damaged one.
        TooLargeError: it has more pixels.
    """
    try:
        with PIL.Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise TooLargeError(
                    f"an image of {image.width} x {image.height} pixels, at most {max_pixels} "
                    "pixels are taken"
                )
            return upright_rgb(image)
    except (ImageError, TooLargeError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise TooLargeError(f"an image of too many pixels: {error}") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError("image", "something else", "a JPEG or PNG file") from error
    except Exception as error:  # Pillow's plugins raise many classes on damaged files
        raise ImageError(
            "image", str(error) or type(error).__name__, "a JPEG or PNG file"
        ) from error
