"""SAM 3's interactive predictor over a bundle: the reference's names, defaults and results."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .arguments import flag, instance, number, renamed
from .embedding import ImageEmbedding
from .errors import ImageError, InvalidInputError, PromptError, StateError, StateWarning
from .geometry import Image, to_rgb
from .masks import MaskOptions, clamp
from .masks.postprocess import mask_dtype as check_mask_dtype
from .model import SegmentationModel
from .prompts import Prompts


class _ModelDefault(float):
    """A default value that yields to the model's own; every other value is the caller's."""


# What SAM 3's predictor fills. MobileSAM's fills no holes, so its bundle says 0.
MAX_HOLE_AREA = _ModelDefault(256.0)

Prediction = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]


class SAM3InteractiveImagePredictor:
    """Segments objects of one image, or of a batch of images, from clicks, boxes and masks.

    Keeps the embeddings of the images set last; everything else is
    :class:`~sam3rt.model.SegmentationModel`. One predictor serves one thread at a time, and raises
    :class:`StateError` where two call it at once: the image of one would answer the other. Where
    their calls take turns, the predictor cannot know whose image is meant, and warns with
    :class:`StateWarning`. Many predictors may share one model; they cost next to nothing. A call
    that raises leaves the predictor as it was.

    Args:
        sam_model: from :func:`sam3rt.load_model`.
        mask_threshold: logits above it are foreground.
        max_hole_area: background components of at most this many low-resolution pixels are
            filled; 0 disables. Unless given, it is the default of the model's own predictor: 256
            for SAM 3, and 0 for MobileSAM, which knows no hole filling.
        max_sprinkle_area: foreground components of at most this many low-resolution pixels are
            removed; 0 disables.
        mask_dtype: type of the returned masks. The reference's is float32 with values 0 and 1;
            ``bool`` or ``numpy.uint8`` take a quarter of the memory.

    Raises:
        InvalidInputError: an argument makes no sense.
    """

    def __init__(
        self,
        sam_model: SegmentationModel,
        mask_threshold: float = 0.0,
        max_hole_area: float = MAX_HOLE_AREA,
        max_sprinkle_area: float = 0.0,
        *,
        mask_dtype: DTypeLike = np.float32,
    ) -> None:
        instance("sam_model", sam_model, SegmentationModel, "a model from sam3rt.load_model")
        self.model = sam_model
        self.mask_threshold = number("mask_threshold", mask_threshold)
        if max_hole_area is MAX_HOLE_AREA:
            max_hole_area = sam_model.manifest.masks.max_hole_area
        self.max_hole_area = number("max_hole_area", max_hole_area)
        self.max_sprinkle_area = number("max_sprinkle_area", max_sprinkle_area)
        self.mask_dtype = check_mask_dtype("mask_dtype", mask_dtype)
        self._embeddings: list[ImageEmbedding] = []
        self._is_batch = False
        self._in_use = threading.Lock()
        # Which setting of images is the latest, and which one each thread made.
        self._latest_setting = object()
        self._of_this_thread = threading.local()

    def __repr__(self) -> str:
        if not self._embeddings:
            what = "no image set"
        elif self._is_batch:
            what = f"a batch of {len(self._embeddings)} images set"
        else:
            height, width = self._embeddings[-1].original_size
            what = f"an image of {width} x {height} pixels set"
        return f"<SAM3InteractiveImagePredictor on {self.model!r}: {what}>"

    def set_image(self, image: Image) -> None:
        """Encode an image, so that :meth:`predict` can be called on it.

        Args:
            image: uint8 [H, W, 3] RGB or a PIL image. EXIF orientation is not applied.

        Raises:
            ImageError: it is not such an image, or larger than
                :data:`sam3rt.geometry.MAX_PIXELS` allows; the image set before stays set.
            BackendError: the backend failed.
            StateError: another thread is using this predictor.
        """
        with self._one_caller():
            self._set([self.model.encode(image)])

    def set_embedding(self, embedding: ImageEmbedding) -> None:
        """Use an embedding made or loaded earlier in place of an image.

        Raises:
            InvalidInputError: it is not an embedding.
            EmbeddingError: it came from bytes or by pickle, and from another bundle.
            StateError: another thread is using this predictor.
        """
        instance("embedding", embedding, ImageEmbedding, "an ImageEmbedding")
        with self._one_caller():
            self._set([self.model.upload(embedding)])

    def set_embedding_batch(self, embeddings: Sequence[ImageEmbedding]) -> None:
        """Use embeddings made or loaded earlier, so that :meth:`predict_batch` can be called.

        :meth:`predict` then uses the last of them.

        Args:
            embeddings: at least one; one may come more than once.

        Raises:
            InvalidInputError: it is not such a list; what was set before stays set.
            EmbeddingError, StateError: see :meth:`set_embedding`.
        """
        _check_list("embeddings", embeddings, "embedding", InvalidInputError)
        for index, embedding in enumerate(embeddings):
            instance(f"embeddings[{index}]", embedding, ImageEmbedding, "an ImageEmbedding")
        with self._one_caller():
            self._set([self.model.upload(e) for e in embeddings], is_batch=True)

    def set_image_batch(self, image_list: Sequence[Image]) -> None:
        """Encode several images, so that :meth:`predict_batch` can be called on them.

        :meth:`predict` then uses the last of them.

        Args:
            image_list: at least one image, each as for :meth:`set_image`; sizes may differ.

        Raises:
            ImageError: it is not such a list; what was set before stays set.
            BackendError: the backend failed.
            StateError: another thread is using this predictor.
        """
        _check_list("image_list", image_list, "image", ImageError)
        # All are checked before the first is encoded: encoding is the expensive part.
        arrays = [to_rgb(image, f"image_list[{i}]") for i, image in enumerate(image_list)]
        with self._one_caller():
            self._set(self.model.encode_batch(arrays), is_batch=True)

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> Prediction:
        """Predict masks from prompts on the image set last.

        With B > 1 objects (B boxes, or [B, N, 2] points) every result has a leading axis B.

        Args:
            point_coords: [N, 2] or [B, N, 2], (x, y) in pixels of the image, or a list of B arrays
                whose N differ.
            point_labels: [N] or [B, N], or a list likewise: 1 foreground, 0 background, -1 "not a
                point", which has no place and still changes the masks.
            box: [4] or [B, 4], x0, y0, x1, y1 in pixels of the image.
            mask_input: [1, h, w] or [B, 1, h, w], low-resolution logits of an earlier call; h
                and w are those of the third result.
            multimask_output: three masks of different extent, or the single best guess.
            return_logits: return logits of the image's size instead of thresholded masks.
            normalize_coords: coordinates are pixels; ``False`` takes them as already in [0, 1].

        Returns:
            Masks [C, H, W] of the image's size, 0 and 1 in the predictor's ``mask_dtype`` (float32
            logits with ``return_logits``); predicted IoUs, float32 [C]; low-resolution logits,
            float32 [C, h, w], for ``mask_input`` of a later call.

        Raises:
            StateError: no image is set, or another thread is using this predictor.
            PromptError: a prompt is malformed.
            BackendError: the backend failed.
        """
        with self._one_caller():
            embeddings = self._embeddings[-1:]
            if not embeddings:
                raise StateError("an image must be set with set_image before predict")
            self._warn_of_another_threads_image()
            prompts = Prompts(point_coords, point_labels, box, mask_input, normalize_coords)
            (prediction,) = self._predict(embeddings, [prompts], multimask_output, return_logits)
            return prediction

    def predict_batch(
        self,
        point_coords_batch: Sequence[ArrayLike | None] | None = None,
        point_labels_batch: Sequence[ArrayLike | None] | None = None,
        box_batch: Sequence[ArrayLike | None] | None = None,
        mask_input_batch: Sequence[ArrayLike | None] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[NDArray[Any]], list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        """Predict masks on every image of the batch set last.

        Args:
            point_coords_batch: one ``point_coords`` (or ``None``) per image, or ``None``.
            point_labels_batch: likewise.
            box_batch: likewise.
            mask_input_batch: likewise.
            multimask_output: as for :meth:`predict`.
            return_logits: as for :meth:`predict`.
            normalize_coords: as for :meth:`predict`.

        Returns:
            Three lists with one entry per image, each as :meth:`predict` returns it.

        Raises:
            StateError: no batch is set, or another thread is using this predictor.
            PromptError: a list has the wrong length, or a prompt is malformed.
            BackendError: the backend failed.
        """
        with self._one_caller():
            embeddings = self._embeddings
            if not self._is_batch:
                raise StateError(
                    "a batch must be set with set_image_batch or set_embedding_batch before "
                    "predict_batch"
                )
            lists = [
                _batch_argument(name, value, len(embeddings))
                for name, value in (
                    ("point_coords_batch", point_coords_batch),
                    ("point_labels_batch", point_labels_batch),
                    ("box_batch", box_batch),
                    ("mask_input_batch", mask_input_batch),
                )
            ]
            self._warn_of_another_threads_image()
            prompts = [
                Prompts(coords, labels, box, mask, normalize_coords)
                for coords, labels, box, mask in zip(*lists, strict=True)
            ]
            try:
                results = self._predict(embeddings, prompts, multimask_output, return_logits)
            except PromptError as error:  # "prompts[1].box", or "box" where there is one image
                which, _, name = error.argument.rpartition(".")
                error.rename(f"{name}_batch{which.removeprefix('prompts') or '[0]'}")
                raise
        masks, scores, low_res = zip(*results, strict=True)
        return list(masks), list(scores), list(low_res)

    def get_image_embedding(self) -> NDArray[np.float32]:
        """The coarsest feature map of the image, float32 [1, C, h, w] ([B, ...] for a batch).

        Raises:
            StateError: no image is set.
        """
        embeddings = self._embeddings
        if not embeddings:
            raise StateError("an image must be set with set_image before get_image_embedding")
        return np.concatenate([embedding.features.numpy()[-1] for embedding in embeddings])

    def reset_predictor(self) -> None:
        """Forget the image or batch that was set."""
        self._embeddings, self._is_batch = [], False

    @property
    def device(self) -> str:
        """Where the model runs, such as ``"cpu"`` or ``"cuda:0"``."""
        return self.model.device

    def _set(self, embeddings: list[ImageEmbedding], is_batch: bool = False) -> None:
        self._embeddings, self._is_batch = embeddings, is_batch
        self._latest_setting = self._of_this_thread.setting = object()

    def _warn_of_another_threads_image(self) -> None:
        own = getattr(self._of_this_thread, "setting", self._latest_setting)
        if own is not self._latest_setting:
            warnings.warn(
                "another thread set an image on this predictor after this thread did, and that "
                "image answers: give each thread or request a SAM3InteractiveImagePredictor of "
                "its own; they can share one model",
                StateWarning,
                stacklevel=3,
            )

    @contextmanager
    def _one_caller(self) -> Iterator[None]:
        """Refuse a second caller for the length of the block.

        Raises:
            StateError: another thread is in such a block.
        """
        if not self._in_use.acquire(blocking=False):
            raise StateError(
                "this predictor is being used by another thread, whose image would answer this "
                "call: give each thread or request a SAM3InteractiveImagePredictor of its own; "
                "they can share one model"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _predict(
        self,
        embeddings: Sequence[ImageEmbedding],
        prompts: Sequence[Prompts],
        multimask_output: bool,
        return_logits: bool,
    ) -> list[Prediction]:
        with renamed(threshold="mask_threshold", dtype="mask_dtype"):
            options = MaskOptions(
                self.mask_threshold,
                self.max_hole_area,
                self.max_sprinkle_area,
                flag("return_logits", return_logits),
                self.mask_dtype,
            )
        found = self.model.segment_batch(embeddings, prompts, multimask_output, options)
        predictions = []
        for decoded, masks in found:
            scores, low_res = decoded.iou_predictions, decoded.low_res_masks
            low_res = clamp(low_res, self.model.manifest.masks)
            if len(masks) == 1:
                predictions.append((masks[0], scores[0], low_res[0]))
            else:
                predictions.append((masks, scores, low_res))
        return predictions


def _check_list(argument: str, value: Any, of: str, error: type[InvalidInputError]) -> None:
    is_list = isinstance(value, list | tuple)
    if not is_list or not value:
        got = "an empty list" if is_list else type(value).__qualname__
        raise error(argument, got, f"a list of at least one {of}")


def _batch_argument(name: str, value: Any, count: int) -> Sequence[Any]:
    if value is None:
        return [None] * count
    if not isinstance(value, list | tuple) and not (isinstance(value, np.ndarray) and value.ndim):
        raise PromptError(name, type(value).__qualname__, f"a list of {count}, one per image")
    if len(value) != count:
        raise PromptError(name, f"{len(value)} entries", f"one per image of the batch ({count})")
    return list(value)
