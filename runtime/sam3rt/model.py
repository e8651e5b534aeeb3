"""The stateless model: images to embeddings, embeddings and prompts to masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .accuracy.gate import Health, check_health
from .accuracy.record import load_record
from .arguments import file_path, flag, instance, renamed
from .backends.base import Backend, ImageCall, StageListener, timed
from .bundle import Bundle, Manifest
from .bundle.contract import decoder_outputs, has_object_score
from .embedding import ImageEmbedding, check_maker, check_maps, read_embedding
from .errors import BackendError, EmbeddingError, InvalidInputError, PromptError, StateError
from .features import Features, HostFeatures
from .geometry import Image, ImageGeometry, geometry, to_rgb
from .image_files import load_image
from .masks import MaskOptions, clamp
from .object_prompts import WRITTEN_AS, by_object, with_labels
from .overlay import ScoreUnit
from .prompts import PackedPrompts, Prompts, pack
from .results import Segmentation


@dataclass(frozen=True, repr=False)
class DecodedMasks:
    """What the decoder says of P objects.

    Attributes:
        low_res_masks: float32 [P, C, h, w], unclamped logits; C is 1 in a single-mask call.
        iou_predictions: float32 [P, C], the predicted IoU of each mask.
        object_score_logits: float32 [P], positive where the model sees an object; ``None`` for
            models without that head.
    """

    low_res_masks: NDArray[np.float32]
    iou_predictions: NDArray[np.float32]
    object_score_logits: NDArray[np.float32] | None

    def __repr__(self) -> str:
        objects, masks, height, width = self.low_res_masks.shape
        return f"<DecodedMasks: {objects} x {masks} masks of {width} x {height} logits>"


class SegmentationModel:
    """A bundle on a backend. Holds no per-image state; every method is safe to call from threads.

    Args:
        bundle: an opened bundle.
        backend: what runs it.

    Attributes:
        on_stage: a timing hook, or ``None``: called after each stage of a call with its name and
            its seconds, on the call's own thread. Stages are ``"preprocess"``, ``"encode"``,
            ``"pack prompts"``, ``"decode"`` and ``"postprocess"``; one that a backend does
            together with the next on its device is counted with that.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.backend = backend
        self.on_stage: StageListener | None = None
        self._score_unit: ScoreUnit | None = None
        self._names = tuple(spec.name for spec in bundle.manifest.encoder.outputs)

    def __reduce__(self) -> NoReturn:
        raise StateError(
            "a model cannot be pickled: it holds loaded graphs. Send embeddings, which can be, and "
            f"load the model in each process: sam3rt.load_model({str(self.bundle.path)!r})"
        )

    def __repr__(self) -> str:
        how = f"{self.backend.name} {self.backend.precision} on {self.device}"
        fingerprint = self.manifest.fingerprint[:16]
        return f"<SegmentationModel {self.manifest.name}, {how}, bundle {fingerprint}>"

    @property
    def manifest(self) -> Manifest:
        """The bundle's description."""
        return self.bundle.manifest

    @property
    def device(self) -> str:
        """Where the graphs run, such as ``"cpu"`` or ``"cuda:0"``."""
        return self.backend.device

    def encode(self, image: Image) -> ImageEmbedding:
        """Run the encoder on one image.

        Args:
            image: uint8 [H, W, 3] RGB or a PIL image; see :func:`sam3rt.geometry.to_rgb`.

        Raises:
            ImageError: it is not such an image.
            BackendError: the backend failed.
        """
        rgb = to_rgb(image)
        where = self._geometry(rgb)
        return self._embedding(self.backend.encode_image(rgb, where, self.on_stage), where)

    def encode_batch(self, images: Sequence[Image]) -> list[ImageEmbedding]:
        """Run the encoder on several images, together where the backend gains by it.

        Args:
            images: each as for :meth:`encode`; sizes may differ.

        Raises:
            InvalidInputError: it is no list.
            ImageError, BackendError: see :meth:`encode`.
        """
        instance("images", images, list | tuple, "a list of images")
        arrays = [to_rgb(image, f"images[{i}]") for i, image in enumerate(images)]
        places = list(map(self._geometry, arrays))
        features = self.backend.encode_images(arrays, places, self.on_stage)
        return list(map(self._embedding, features, places))

    def decode(
        self, embedding: ImageEmbedding, prompts: Prompts, multimask_output: bool = True
    ) -> DecodedMasks:
        """Run the decoder on one image's prompts.

        Args:
            embedding: from :meth:`encode` or :meth:`load_embedding` of this bundle.
            prompts: see :class:`sam3rt.prompts.Prompts`.
            multimask_output: three masks per object, or the single one.

        Raises:
            PromptError: a prompt is malformed.
            InvalidInputError: another argument is none of its kind.
            EmbeddingError: the embedding belongs to another bundle or backend.
            BackendError: the backend failed.
        """
        embedding = self.upload(embedding)
        packed = self._pack(prompts, embedding.geometry)
        outputs = decoder_outputs(self.manifest, flag("multimask_output", multimask_output))
        with timed("decode", self.on_stage):
            results = self.backend.decode(embedding.features, packed, outputs)
        return self._decoded(results)

    def segment(
        self,
        embedding: ImageEmbedding,
        prompts: Prompts,
        multimask_output: bool = True,
        *,
        threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        return_logits: bool = False,
        dtype: DTypeLike = np.float32,
    ) -> tuple[DecodedMasks, NDArray[Any]]:
        """:meth:`decode`, then masks of the image's size.

        Where the backend can, masks are made on its device, holes filled, so that they cross the
        bus as one byte per pixel.

        Args:
            embedding: as for :meth:`decode`.
            prompts: as for :meth:`decode`.
            multimask_output: as for :meth:`decode`.
            threshold: logits above it are foreground.
            max_hole_area: see :func:`sam3rt.masks.clean`.
            max_sprinkle_area: see :func:`sam3rt.masks.clean`.
            return_logits: logits of the image's size instead of masks.
            dtype: type of the masks: float32, bool or uint8.

        Returns:
            What the decoder says, and [P, C, H, W]: 0 and 1 in ``dtype``, or float32 logits.

        Raises:
            PromptError, EmbeddingError, BackendError: see :meth:`decode`.
        """
        options = MaskOptions(threshold, max_hole_area, max_sprinkle_area, return_logits, dtype)
        (found,) = self.segment_batch([embedding], [prompts], multimask_output, options)
        return found

    def segment_batch(
        self,
        embeddings: Sequence[ImageEmbedding],
        prompts: Sequence[Prompts],
        multimask_output: bool = True,
        options: MaskOptions | None = None,
    ) -> list[tuple[DecodedMasks, NDArray[Any]]]:
        """:meth:`segment` for several images, together where the backend gains by it.

        Args:
            embeddings: each as for :meth:`decode`; one may come more than once.
            prompts: those of each.
            multimask_output: as for :meth:`decode`.
            options: how logits become masks; the defaults are those of :meth:`segment`.

        Returns:
            What :meth:`segment` returns, for each embedding.

        Raises:
            InvalidInputError: these are no lists of the same length, or ``options`` are none.
            PromptError, EmbeddingError, BackendError: see :meth:`decode`.
        """
        instance("embeddings", embeddings, list | tuple, "a list of embeddings")
        instance("prompts", prompts, list | tuple, "a list of Prompts")
        options = MaskOptions() if options is None else options
        instance("options", options, MaskOptions, "sam3rt.masks.MaskOptions or None")
        if len(prompts) != len(embeddings):
            expected = f"one for each of {len(embeddings)} embeddings"
            raise InvalidInputError("prompts", f"{len(prompts)}", expected)
        uploaded = [self.upload(embedding) for embedding in embeddings]
        packed = []
        for index, (own, embedding) in enumerate(zip(prompts, uploaded, strict=True)):
            try:
                packed.append(self._pack(own, embedding.geometry))
            except PromptError as error:
                if len(prompts) > 1:
                    error.rename(f"prompts[{index}].{error.argument}")
                raise
        return self._segment(uploaded, packed, multimask_output, options)

    def segment_image(
        self,
        image: str | os.PathLike[str] | Image | ImageEmbedding,
        points: Any = None,
        labels: Any = None,
        boxes: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        *,
        multimask_output: bool = True,
        bgr: bool = False,
        threshold: float = 0.0,
        max_hole_area: float | None = None,
        max_sprinkle_area: float = 0.0,
    ) -> Segmentation:
        """Segment an image and give a result that draws, cuts out and exports itself.

        Args:
            image: a file's path, read upright; a PIL image or uint8 [H, W, 3] array, as
                :meth:`encode` takes them; or an embedding, which saves encoding the image again.
            points: (x, y) in pixels: one point, the points [N, 2] of one object, or for B objects
                [B, N, 2] or a list of B arrays whose N differ.
            labels: 1 the object, 0 background, for each point; 1 for all unless given.
            boxes: [4] or [B, 4], x0, y0, x1, y1 in pixels: one for each object.
            mask_input: low-resolution logits, of an earlier result on this image
                :attr:`Segmentation.mask_input`.
            multimask_output: three masks of different extent for each object, or one.
            bgr: the array's channels are blue, green, red, as OpenCV gives them.
            threshold: as for :meth:`segment`.
            max_hole_area: as for :meth:`segment`; ``None`` for that of the model's own predictor.
            max_sprinkle_area: as for :meth:`segment`.

        Raises:
            ImageError: the image cannot be read or used.
            InvalidInputError: ``bgr`` with anything but an array, or an option is no such value.
            PromptError, EmbeddingError, BackendError: see :meth:`decode`.
        """
        own = self.manifest.masks.max_hole_area
        holes = own if max_hole_area is None else max_hole_area
        options = MaskOptions(threshold, holes, max_sprinkle_area, dtype=np.bool_)
        multimask_output = flag("multimask_output", multimask_output)
        prompts = Prompts(*with_labels(points, labels), boxes, mask_input)
        # What is wrong with a prompt is said before the image is encoded.
        with renamed(**WRITTEN_AS):
            if isinstance(image, ImageEmbedding):
                if flag("bgr", bgr):
                    raise InvalidInputError("bgr", "True with an embedding", "False or an array")
                rgb, packed = None, self._pack(prompts, image.geometry)
                embedding = self.upload(image)
            else:
                rgb = load_image(image, bgr)
                packed = self._pack(prompts, self._geometry(rgb))
                embedding = self.encode(rgb)
        ((decoded, masks),) = self._segment([embedding], [packed], multimask_output, options)
        scores, low_res = decoded.iou_predictions, decoded.low_res_masks
        objects = np.repeat(np.arange(len(scores)), scores.shape[1])
        where = (objects, np.argsort(-scores, axis=1, kind="stable").ravel())
        seen = decoded.object_score_logits
        return Segmentation(
            masks[where],
            embedding.original_size,
            scores[where],
            objects,
            self.score_unit,
            rgb,
            by_object(prompts, len(scores)),
            clamp(low_res, self.manifest.masks)[where],
            None if seen is None else seen[objects],
        )

    @property
    def score_unit(self) -> ScoreUnit:
        """What the model's scores are: ``"iou"``, or ``"log_odds"`` of it (SAM 3.1).

        Raises:
            BundleError: the parity record, which says so, is damaged.
        """
        if self._score_unit is None:
            mobile = self.manifest.model_type == "mobile_sam"  # spares reading the record
            log_odds = not mobile and load_record(self.bundle).log_odds
            self._score_unit = "log_odds" if log_odds else "iou"
        return self._score_unit

    def _pack(self, prompts: Prompts, where: ImageGeometry) -> PackedPrompts:
        instance("prompts", prompts, Prompts, "sam3rt.Prompts")
        with timed("pack prompts", self.on_stage):
            return pack(prompts, self.manifest.prompts, where)

    def _segment(
        self,
        embeddings: Sequence[ImageEmbedding],
        prompts: Sequence[PackedPrompts],
        multimask_output: bool,
        options: MaskOptions,
    ) -> list[tuple[DecodedMasks, NDArray[Any]]]:
        calls = [
            ImageCall(e.features, p, e.geometry) for e, p in zip(embeddings, prompts, strict=True)
        ]
        outputs = decoder_outputs(self.manifest, flag("multimask_output", multimask_output))
        found = self.backend.decode_images(calls, outputs, options, self.on_stage)
        return [(self._decoded(results), masks) for results, masks in found]

    def _decoded(self, results: list[NDArray[np.float32]]) -> DecodedMasks:
        """Name the decoder's outputs, once they can be answers at all.

        Raises:
            BackendError: a value is not a finite number: a mask of NaN would be an empty one.
        """
        if not all(np.isfinite(result).all() for result in results):
            raise BackendError(
                f"the decoder returned values that are not finite ({self.backend.name}, "
                f"{self.backend.precision}): the embedding or a mask prompt is broken, or the "
                "model's values leave the range of what it computes in"
            )
        score = results[2][0, :, 0] if has_object_score(self.manifest) else None
        return DecodedMasks(results[0][0], results[1][0], score)

    def upload(self, embedding: ImageEmbedding) -> ImageEmbedding:
        """The embedding on this model's device: itself, unless it came from bytes or by pickle.

        Raises:
            EmbeddingError: it was made by another bundle.
            InvalidInputError: it is none.
        """
        instance("embedding", embedding, ImageEmbedding, "an ImageEmbedding")
        check_maker(embedding.fingerprint, self.manifest.fingerprint, "the embedding")
        if not isinstance(embedding.features, HostFeatures):
            return embedding
        maps = dict(zip(embedding.names, embedding.features.maps, strict=True))
        check_maps(maps, self.manifest.encoder.outputs, "the embedding")
        self._check_geometry(embedding.geometry, "the embedding")
        features = self.backend.upload([maps[name] for name in self._names])
        return self._embedding(features, embedding.geometry)

    def load_embedding(self, path: str | Path) -> ImageEmbedding:
        """Load an embedding that this bundle made. The encoder is not needed for it.

        Raises:
            EmbeddingError: the file is missing, damaged, or from another bundle.
            InvalidInputError: the path is none.
        """
        file, own = file_path("path", path), self.manifest
        maps, where = read_embedding(file, own.fingerprint, own.encoder.outputs)
        self._check_geometry(where, str(path))
        return self._embedding(self.backend.upload(maps), where)

    def _embedding(self, features: Features, where: ImageGeometry) -> ImageEmbedding:
        return ImageEmbedding(features, where, self.manifest.fingerprint, self._names)

    def _geometry(self, rgb: NDArray[np.uint8]) -> ImageGeometry:
        return geometry(self.manifest.image, (rgb.shape[0], rgb.shape[1]))

    def _check_geometry(self, where: ImageGeometry, subject: str) -> None:
        if where != geometry(self.manifest.image, where.original_size):
            raise EmbeddingError(f"{subject}: its image geometry contradicts this model's")

    def warm_up(self) -> None:
        """Load both graphs and run each once, so that the first request is not the slow one."""
        self.backend.prepare()
        embedding = self.encode(np.zeros((8, 8, 3), np.uint8))
        self.decode(embedding, Prompts(point_coords=[[4.0, 4.0]], point_labels=[1]))

    def close(self) -> None:
        """Give back the memory that the backend holds, once the calls under way are done.

        Embeddings keep theirs. Every call from now on raises :class:`sam3rt.StateError`.
        """
        self.backend.close()

    def health(self) -> Health:
        """Put a known question to the model and judge the answer, as a readiness probe.

        Takes about as long as one request. Raises nothing for a model that is not well.
        """
        backend = self.backend
        return check_health(backend, self.bundle, backend.name, backend.device, backend.precision)
