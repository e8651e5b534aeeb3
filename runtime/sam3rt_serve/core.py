"""The service without a network: images in, embeddings kept, masks out.

Calls return futures. Images and clicks wait in queues of their own, so that no click waits for
an encoder run.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import force_setattr
from numpy.typing import NDArray

from sam3rt.backends.base import OBJECTS_AT_ONCE
from sam3rt.embedding import ImageEmbedding
from sam3rt.embedding_cache import CacheFullError, EmbeddingCache
from sam3rt.errors import InvalidInputError, PromptError
from sam3rt.machine import usable_cores
from sam3rt.masks import MaskOptions, clamp
from sam3rt.model import SegmentationModel
from sam3rt.prompts import Prompts

from .errors import TooLargeError, UnknownImageError
from .images import content_id, read_image
from .joining import joining_pays
from .limits import Limits
from .sessions import Sessions
from .work import WorkQueue


class StoredImage(NamedTuple):
    """An image that is ready for clicks; ``size`` is (height, width) of it upright, pixels."""

    image_id: str
    size: tuple[int, int]
    is_new: bool


class ObjectPrompt(Struct, frozen=True, forbid_unknown_fields=True):
    """One object's points, box or both, (x, y) in pixels of the upright image."""

    points: list[tuple[float, float]] = []
    labels: Annotated[
        list[Annotated[int, Meta(ge=-1, le=3)]],
        Meta(
            description="one per point: 1 the object, 0 background; -1, 2 and 3 as predict has "
            "them; 1 for all where they are left out"
        ),
    ] = []
    box: Annotated[tuple[float, float, float, float] | None, Meta(description="x0, y0, x1, y1")] = (
        None
    )

    def __post_init__(self) -> None:
        if not self.labels:
            force_setattr(self, "labels", [1] * len(self.points))


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
    image_id: str
    objects: Sequence[ObjectPrompt]
    multimask: bool
    session: str | None
    finish: Callable[[list[ObjectMasks]], Any]


class _Upload(NamedTuple):
    image_id: str
    content: bytes | NDArray[np.uint8]


class Service:
    """One model for many users. Every method is safe to call from threads.

    Masks are those of ``SAM3InteractiveImagePredictor.predict`` with its defaults, bit for bit.

    Args:
        model: what to serve.
        limits: what a request may ask for.
        cache_bytes: memory for embeddings, where the decoder runs.
        cache_folder: a second level; see :class:`EmbeddingCache`.
        max_folder_bytes: what the files there may take.
        threads: that answer clicks; ``None`` for one a core, from two to eight.
        objects_at_once: objects of several requests in a decoder run, at most.

    Attributes:
        cache: the embeddings.
        uploads: the queue of images.
        clicks: the queue of requests for masks.
        on_run: told how many objects were decoded together, each time.

    Raises:
        InvalidInputError: ``cache_bytes`` holds not even one embedding.
        OSError: the folder cannot be made.
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
        objects_at_once: int = OBJECTS_AT_ONCE,
    ) -> None:
        self.model = model
        self.limits = limits or Limits()
        shapes = [spec.shape[1:] for spec in model.manifest.encoder.outputs]
        embedding = 4 * sum(math.prod(map(int, shape)) for shape in shapes)
        if cache_bytes < embedding:
            expected = f"{embedding} at least, for one image (--cache-mb {-(-embedding >> 20)})"
            raise InvalidInputError("cache_bytes", str(cache_bytes), expected)
        self.cache = EmbeddingCache(model, cache_bytes, cache_folder, max_folder_bytes)
        self.on_run: Callable[[int], None] = lambda objects: None
        self._sessions = Sessions(self.limits.session_bytes)
        self._encoder = threading.Lock()
        self._joins_images = joining_pays(model)
        # Two threads: while one encodes, the other reads what comes next.
        self.uploads: WorkQueue[_Upload, StoredImage] = WorkQueue(
            self._store,
            "upload",
            threads=2,
            most_waiting=self.limits.waiting_images,
            most_together=model.backend.images_at_once,
        )
        self.clicks: WorkQueue[_Click, Any] = WorkQueue(
            self._answer,
            "click",
            threads=threads or min(8, max(2, usable_cores())),
            most_waiting=self.limits.waiting_clicks,
            most_together=objects_at_once,
        )

    def close(self) -> None:
        """Answer what is waiting and take nothing more."""
        self.uploads.close()
        self.clicks.close()

    def add_image(
        self,
        content: bytes | NDArray[np.uint8],
        image_id: str | None = None,
        *,
        deadline: float | None = None,
    ) -> Future[StoredImage]:
        """Encode an image, unless that has been done: one that is known does not wait.

        Whether it is known takes a hash of the content and, perhaps, a file to be read.

        Args:
            content: a JPEG or PNG file, whose EXIF orientation is applied, or uint8 [H, W, 3] RGB.
            image_id: what to call it; a hash of the content by default. An id that is known stays
                with the image that it has.
            deadline: by ``time.monotonic``; the limits' time from now by default.

        Returns:
            The stored image. Its exceptions: ``ImageError``, ``TooLargeError``, ``BackendError``,
            ``CacheFullError``, and ``DeadlineError`` where its turn does not come in time.

        Raises:
            TooLargeError: the file is longer than the limit, or the array has too many pixels.
            BusyError: too many images wait already.
        """
        if isinstance(content, bytes):
            size, most = len(content), self.limits.image_bytes
        else:
            size, most = content.nbytes, 3 * self.limits.pixels
        if size > most:
            raise TooLargeError(f"an image of {size} bytes, at most {most} are taken")
        image_id = image_id or content_id(content)
        # Where the cache has no room for an image of its folder, there may be some after a while.
        with contextlib.suppress(UnknownImageError, CacheFullError):
            known: Future[StoredImage] = Future()
            known.set_result(self.find_image(image_id))
            return known
        upload = _Upload(image_id, content)
        return self.uploads.submit(upload, self._deadline(deadline), kind="image")

    @contextlib.contextmanager
    def embedding(self, image_id: str) -> Iterator[ImageEmbedding]:
        """An image's embedding, which stays in the cache for the length of the block.

        Raises:
            UnknownImageError: there is no image under this id.
        """
        with self.cache.use(image_id) as embedding:
            if embedding is None:
                raise UnknownImageError(f"no image {image_id!r}: send it (again)")
            yield embedding

    def find_image(self, image_id: str) -> StoredImage:
        """An image that was stored, or ``UnknownImageError``."""
        with self.embedding(image_id) as embedding:
            return StoredImage(image_id, embedding.original_size, False)

    def embedding_file(self, image_id: str) -> bytes:
        """What ``ImageEmbedding.save`` would write, or ``UnknownImageError``."""
        with self.embedding(image_id) as embedding:
            return embedding.to_bytes()

    def remove_image(self, image_id: str) -> None:
        """Forget an image and its sessions, or ``UnknownImageError``."""
        self._sessions.discard(image_id)
        if not self.cache.discard(image_id):
            raise UnknownImageError(f"no image {image_id!r}")

    def forget_session(self, session: str) -> None:
        """Let a session's next request begin anew, on any image."""
        self._sessions.discard(session=session)

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

        Requests on one image that wait together share decoder runs, and so do those on several
        where that is faster; see :func:`.joining.joining_pays`.

        Args:
            image_id: of an image that was stored.
            objects: each with a point or a box at least.
            multimask: three masks of each object, or the best one.
            session: a name under which each object's best low-resolution mask is kept, by the
                object's position. In the session's next request on this image, it is a prompt too.
            finish: makes the answer of what was found, on the queue's thread.
            deadline: by ``time.monotonic``; the limits' time from now by default.

        Returns:
            What ``finish`` made of a list of :class:`ObjectMasks`. Its exceptions:
            ``UnknownImageError``, ``TooLargeError``, ``PromptError``, ``BackendError``,
            ``CacheFullError``, and ``DeadlineError`` where its turn does not come in time.

        Raises:
            TooLargeError: more objects or points than the limits allow.
            PromptError: an object has no prompt, or not as many labels as points.
            BusyError: too many requests wait already.
        """
        self._check(objects)
        click = _Click(image_id, objects, multimask, session, finish)
        kind = ("" if self._joins_images else image_id, multimask)
        return self.clicks.submit(click, self._deadline(deadline), kind=kind, size=len(objects))

    def _deadline(self, given: float | None) -> float:
        return time.monotonic() + self.limits.seconds if given is None else given

    def _check(self, objects: Sequence[ObjectPrompt]) -> None:
        if not objects:
            raise PromptError("objects", "none", "at least one object")
        if len(objects) > self.limits.objects:
            raise TooLargeError(f"{len(objects)} objects, at most {self.limits.objects} are taken")
        for number, one in enumerate(objects):
            points, labels, most = len(one.points), len(one.labels), self.limits.points
            if points > most:
                raise TooLargeError(f"objects[{number}]: {points} points, at most {most} are taken")
            if labels != points:
                raise PromptError(
                    f"objects[{number}].labels", f"{labels} labels", f"one a point ({points})"
                )
            if not points and one.box is None:
                raise PromptError(f"objects[{number}]", "no prompt", "a point or a box")

    # --- on the queues' threads -------------------------------------------------------------------

    def _store(self, uploads: Sequence[_Upload]) -> list[StoredImage]:
        new = {
            image_id: read_image(content, self.limits.pixels)
            if isinstance(content, bytes)
            else content
            for image_id, content in uploads
        }
        stored: dict[str, StoredImage] = {}
        with self._encoder:
            for image_id in list(new):
                with contextlib.suppress(UnknownImageError):  # it came twice at the same time
                    stored[image_id] = self.find_image(image_id)
                    del new[image_id]
            embeddings = self.model.encode_batch(list(new.values()))
            for image_id, embedding in zip(new, embeddings, strict=True):
                self.cache.add(image_id, embedding)
                stored[image_id] = StoredImage(image_id, embedding.original_size, True)
        return [stored[image_id] for image_id, _ in uploads]

    def _answer(self, clicks: Sequence[_Click]) -> list[Any]:
        """Answer clicks, all multi-mask or all single-mask, and on one image unless these join."""
        with contextlib.ExitStack() as stack:
            embeddings = {
                image_id: stack.enter_context(self.embedding(image_id))
                for image_id in {click.image_id for click in clicks}
            }
            channels = self.model.manifest.masks.multimask if clicks[0].multimask else 1
            pixels = sum(
                len(click.objects) * channels * math.prod(embeddings[click.image_id].original_size)
                for click in clicks
            )
            if pixels > self.limits.mask_pixels:
                if len(clicks) > 1:
                    return [self._answer([click])[0] for click in clicks]
                height, width = embeddings[clicks[0].image_id].original_size
                raise TooLargeError(
                    f"{len(clicks[0].objects)} objects on an image of {width} x {height} pixels, "
                    f"at most {self.limits.mask_pixels // (channels * height * width)} are taken "
                    "on one of this size"
                )
            found = self._segment(embeddings, clicks)
        return [click.finish(masks) for click, masks in zip(clicks, found, strict=True)]

    def _segment(
        self, embeddings: Mapping[str, ImageEmbedding], clicks: Sequence[_Click]
    ) -> list[list[ObjectMasks]]:
        """Decode all objects of all clicks in as few runs as leave each object's result as it is.

        Objects of one run have equal numbers of points: padding would change logits in their last
        bits.
        """
        runs = defaultdict(list)
        sizes = Counter[tuple[int, bool, bool]]()
        for at, click in enumerate(clicks):
            earlier = self._sessions.get(click.image_id, click.session, len(click.objects))
            for number, (one, mask) in enumerate(zip(click.objects, earlier, strict=True)):
                shape = (len(one.points), one.box is not None, mask is not None)
                runs[click.image_id, shape].append(((at, number), one, mask))
                sizes[shape] += 1
        for size in sizes.values():
            self.on_run(size)
        found: dict[tuple[int, int], ObjectMasks] = {}
        rules = self.model.manifest.masks
        prompts = []
        for (_, (points, has_box, is_refined)), run in runs.items():
            _, objects, masks = zip(*run, strict=True)
            prompts.append(
                Prompts(
                    np.array([one.points for one in objects]) if points else None,
                    np.array([one.labels for one in objects]) if points else None,
                    np.array([one.box for one in objects]) if has_box else None,
                    np.stack(masks)[:, None] if is_refined else None,
                )
            )
        answered = self.model.segment_batch(
            [embeddings[image_id] for image_id, _ in runs],
            prompts,
            clicks[0].multimask,
            MaskOptions(max_hole_area=rules.max_hole_area, dtype=np.bool_),
        )
        for (key, run), (decoded, finished) in zip(runs.items(), answered, strict=True):
            is_refined = key[1][2]
            low_res = clamp(decoded.low_res_masks, rules)
            answers = zip(finished, decoded.iou_predictions, low_res, strict=True)
            for (place, *_), answer in zip(run, answers, strict=True):
                found[place] = ObjectMasks(*answer, is_refined)
        results = []
        for at, click in enumerate(clicks):
            result = [found[at, number] for number in range(len(click.objects))]
            results.append(result)
            if click.session is not None:
                best = [one.low_res_masks[int(np.argmax(one.scores))] for one in result]
                self._sessions.put(click.image_id, click.session, best)
        return results
