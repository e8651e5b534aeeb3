"""What a backend offers. A backend runs the two graphs of one bundle on one device."""

from __future__ import annotations

import abc
import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import masks
from ..accuracy.select import Recipe
from ..bundle import Bundle
from ..errors import BackendError, EmbeddingError, StateError
from ..features import Features
from ..geometry import ImageGeometry, preprocess
from ..machine import usable_cores
from ..masks import MaskOptions
from ..prompts import PackedPrompts
from .kept import CLOSED, check_fork

F = TypeVar("F", bound=Features)
# Told how long each stage of a call took: its name and the seconds.
StageListener = Callable[[str, float], None]

# Objects in one run of the decoder. More are decoded in several runs, so that memory does not grow
# with their number; runs of this size are as fast as larger ones.
OBJECTS_AT_ONCE = 8


@contextlib.contextmanager
def timed(name: str, listener: StageListener | None) -> Iterator[None]:
    """Tell a listener, if there is one, how long the block took, unless it raises."""
    start = time.perf_counter()
    yield
    if listener is not None:
        listener(name, time.perf_counter() - start)


class ImageCall(NamedTuple):
    """What is asked about one image.

    Attributes:
        features: from :meth:`Backend.encode` or :meth:`Backend.upload`.
        prompts: of P objects.
        geometry: where the image lies in the encoder's input.
    """

    features: Features
    prompts: PackedPrompts
    geometry: ImageGeometry


class Backend(abc.ABC):
    """Runs encoder and decoder. Every method may be called from many threads at once.

    A subclass implements :meth:`_encode`, :meth:`_decode`, :meth:`upload`, :meth:`prepare` and
    :meth:`versions`. What surrounds the two graphs (resizing, normalization, upsampling) is done
    on the host; a backend that can do it on its device, or gains by several images at once,
    overrides :meth:`encode_image`, :meth:`encode_images` and :meth:`decode_images`.

    Args:
        bundle: an opened bundle.
        device: such as ``"cpu"`` or ``"cuda:0"``.
        precision: what it computes in: ``"fp32"`` or the name of a precision recipe.
        objects_at_once: objects in one run of the decoder, at most.

    Attributes:
        name: such as ``"onnxruntime"``.
        bundle: the bundle.
        device: where it computes.
        precision: what it computes in.
        joins_images: whether several images' objects share runs of the decoder, which makes
            answering them together faster than one image after another.
        images_at_once: images that :meth:`encode_images` gains by encoding together; 1 for none.
    """

    name: str
    joins_images = False
    images_at_once = 1

    def __init__(
        self,
        bundle: Bundle,
        device: str,
        precision: str,
        *,
        objects_at_once: int = OBJECTS_AT_ONCE,
    ) -> None:
        self.bundle = bundle
        self.device = device
        self.precision = precision
        self._objects_at_once = objects_at_once
        # What the decoder reads where there is no mask prompt.
        self._no_mask = np.zeros((1, 1, *bundle.manifest.prompts.mask_size), np.float32)
        # One encoder run uses the whole machine and, at full size, gigabytes of memory.
        self._encoder_turn = threading.BoundedSemaphore(1)
        self._decoder_turn = threading.BoundedSemaphore(max(2, usable_cores()))
        self._process = os.getpid()
        self._is_closed = False
        _loaded.add(self)

    @abc.abstractmethod
    def _encode(self, pixels: NDArray[np.float32]) -> Features:
        """Run the encoder on float32 [1, 3, H, W]; the features stay on the device."""

    @abc.abstractmethod
    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Run the decoder once and bring the named outputs to the host."""

    @abc.abstractmethod
    def upload(self, maps: Sequence[NDArray[np.float32]]) -> Features:
        """Bring feature maps, float32 [1, C, h, w] each, to the device."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Load both graphs now instead of at their first use."""

    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of what the backend is made of."""

    def encode(self, pixels: NDArray[np.float32]) -> Features:
        """Run the encoder. Calls from several threads take turns.

        Args:
            pixels: float32 [1, 3, H, W] of the encoder's size.

        Raises:
            BackendError: the backend failed, for example for lack of memory.
            StateError: the process was forked after the model was loaded.
        """
        self.check_process()
        with self._encoder_turn:
            return self._encode(pixels)

    def decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Run the decoder and bring the named outputs to the host, in the order asked for.

        Many objects are decoded in several runs.

        Args:
            features: from :meth:`encode` or :meth:`upload` of this backend.
            prompts: of P objects.
            outputs: names of decoder outputs.

        Returns:
            float32 [1, P, ...] each.

        Raises:
            EmbeddingError: the features belong to another backend.
            BackendError: the backend failed.
            StateError: the process was forked after the model was loaded.
        """
        self.check_process()
        objects, at_once = len(prompts.labels), self._objects_at_once
        if 0 < objects <= at_once:
            with self._decoder_turn:
                return self._decode(features, prompts, outputs)
        # Joined as they come: parts and the whole side by side would be twice the memory.
        results = self._room(objects, outputs)
        for index, part in enumerate(prompts.split(at_once)):
            with self._decoder_turn:
                run = self._decode(features, part, outputs)
            for whole, piece in zip(results, run, strict=True):
                whole[:, index * at_once :][:, : piece.shape[1]] = piece
        return results

    def encode_image(
        self,
        image: NDArray[np.uint8],
        geometry: ImageGeometry,
        on_stage: StageListener | None = None,
    ) -> Features:
        """Preprocess an image and run the encoder.

        Args:
            image: uint8 [H, W, 3] RGB.
            geometry: where it lies in the encoder's input.
            on_stage: told how long ``"preprocess"`` and ``"encode"`` took.

        Raises:
            BackendError, StateError: see :meth:`encode`.
        """
        with timed("preprocess", on_stage):
            pixels = preprocess(self.bundle.manifest.image, image)[0]
        with timed("encode", on_stage):
            return self.encode(pixels)

    def decode_images(
        self,
        calls: Sequence[ImageCall],
        outputs: Sequence[str],
        options: MaskOptions,
        on_stage: StageListener | None = None,
    ) -> list[tuple[list[NDArray[np.float32]], NDArray[Any]]]:
        """Run the decoder and make masks of each image's size from its first output.

        One image after another, unless the backend gains by several at once.

        Args:
            calls: what is asked about each image.
            outputs: names of decoder outputs; the first is the mask logits.
            options: how logits become masks.
            on_stage: told how long ``"decode"`` and ``"postprocess"`` took.

        Returns:
            For each call what :meth:`decode` returns, and masks (or logits), [P, C, H, W].

        Raises:
            EmbeddingError, BackendError, StateError: see :meth:`decode`.
        """
        rules, answers = self.bundle.manifest, []
        for features, prompts, where in calls:
            with timed("decode", on_stage):
                results = self.decode(features, prompts, outputs)
            with timed("postprocess", on_stage):
                made = masks.finish(results[0][0], where, rules.image, rules.masks, options)
            answers.append((results, made))
        return answers

    def encode_images(
        self,
        images: Sequence[NDArray[np.uint8]],
        geometries: Sequence[ImageGeometry],
        on_stage: StageListener | None = None,
    ) -> list[Features]:
        """:meth:`encode_image` for several images, one after another unless the backend gains.

        Raises:
            BackendError, StateError: see :meth:`encode`.
        """
        return [
            self.encode_image(image, where, on_stage)
            for image, where in zip(images, geometries, strict=True)
        ]

    def close(self) -> None:
        """Give back what the backend holds, once the calls under way are done.

        Features stay as they are; every call from now on raises :class:`StateError`.
        """
        self._is_closed = True

    def check_process(self) -> None:
        """Refuse to work once closed, and in a process that inherited the model.

        Raises:
            StateError: the model is closed, or the process was forked after it was loaded.
        """
        if self._is_closed:
            raise StateError(CLOSED)
        check_fork(self._process)

    @staticmethod
    def _own(features: Features, kind: type[F]) -> F:
        """The features, in the form in which this backend keeps them.

        Raises:
            EmbeddingError: another backend made them.
        """
        if not isinstance(features, kind):
            raise EmbeddingError(
                f"features are {type(features).__name__}, not this backend's; "
                "save the embedding and load it with this model"
            )
        return features

    def _room(self, objects: int, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        """Memory for the named outputs of so many objects, float32 [1, P, ...] each."""
        shapes = {spec.name: spec.shape for spec in self.bundle.manifest.decoder.outputs}
        return [
            np.empty([s if isinstance(s, int) else objects for s in shapes[name]], np.float32)
            for name in outputs
        ]


class UnfitError(BackendError):
    """There is something for a backend to run here, such as engines, and none of it serves."""


@dataclass(frozen=True)
class Offer:
    """The ways in which a backend can run one bundle here.

    Attributes:
        recipes: fastest first.
        open: loads one.
        advice: what to do where no recipe can serve, or empty.
    """

    recipes: tuple[Recipe, ...]
    open: Callable[[Recipe], Backend]
    advice: str = ""


_loaded: weakref.WeakSet[Backend] = weakref.WeakSet()


def _keep_inherited() -> None:
    """Never destroy, in a forked child, what the libraries below made in the parent.

    Their destructors wait for threads that a fork does not copy. Objects are kept by a reference
    too many. ONNX Runtime's own static objects are destroyed by an exit handler; where the C
    library has ``on_exit`` (glibc), one that was registered later ends the process before.
    """
    if not _loaded:
        return
    for backend in list(_loaded):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        # It is called with the exit status, which is all that _exit takes.
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)
