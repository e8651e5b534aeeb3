"""The parity record: small inputs and the FP32 outputs a model must give for them.

A record is an ``.npz`` file without pickled objects. ``description`` is a JSON text that lists
the cases; the other arrays hold inputs whole and expected outputs subsampled:

* ``image_I``: uint8 [H, W, 3].
* ``features_I_L``: float32, feature map L of image I, ``[0, ::cs, ::s, ::s]``.
* ``CASE/points``, ``CASE/labels``: packed prompts, as the decoder graph reads them.
* ``CASE/mask_prompt``: float32 [M, h, w], where the case has one.
* ``CASE/logits``: float32 [P, C, ...], the multi-mask logits and then the single mask's,
  ``[..., ::s, ::s]``.
* ``CASE/masks``: ``numpy.packbits`` of the same logits > 0, unsubsampled.
* ``CASE/iou``: float32 [P, C]; ``CASE/object_score``: float32 [P], where the model has one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle, ParityLimits, check_length
from ..bundle.files import atomic_write
from ..embedding import ImageEmbedding
from ..errors import BundleError
from ..model import SegmentationModel
from ..prompts import PackedPrompts
from .npz import read_arrays

_VERSION = 1
LOGIT_STRIDE = 8
CHANNEL_STRIDE = 4


@dataclass(frozen=True)
class ParityCase:
    """One decoder call of the record.

    Attributes:
        name: what to call it.
        image: index of the image it is about.
        prompts: its prompts, packed.
    """

    name: str
    image: int
    prompts: PackedPrompts


@dataclass(frozen=True)
class ExpectedCase:
    """Reference outputs of one decoder call, unsubsampled.

    Attributes:
        logits: float32 [P, C, h, w], the multi-mask logits, then the single mask's.
        iou: float32 [P, C].
        object_score: float32 [P], or ``None``.
    """

    logits: NDArray[np.float32]
    iou: NDArray[np.float32]
    object_score: NDArray[np.float32] | None


@dataclass(frozen=True)
class Measurement:
    """One comparison with the record.

    Attributes:
        place: the image or case.
        output: which of the outputs.
        metric: what was measured.
        value: the figure; NaN where outputs hold NaN.
        limit: the figure allowed.
        at_least: whether the figure must reach the limit rather than stay below it.
    """

    place: str
    output: str
    metric: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def subject(self) -> str:
        """The place and the output in words."""
        return f"{self.place} {self.output}"

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit; NaN never is."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def badness(self) -> float:
        """Grows as the figure gets worse; infinite for NaN. Compares one metric's figures."""
        if math.isnan(self.value):
            return math.inf
        return -self.value if self.at_least else self.value


class ParityRecord:
    """A record in memory.

    Args:
        arrays: the arrays listed in the module's documentation.
        description: the parsed ``description``.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]], description: dict[str, Any]) -> None:
        self._arrays = arrays
        self._description = description

    @classmethod
    def build(
        cls,
        images: list[NDArray[np.uint8]],
        features: list[tuple[NDArray[np.float32], ...]],
        cases: list[tuple[ParityCase, ExpectedCase]],
    ) -> ParityRecord:
        """Collect inputs and reference outputs, subsampling the outputs."""
        arrays: dict[str, NDArray[Any]] = {}
        levels = len(features[0])
        for index, (image, maps) in enumerate(zip(images, features, strict=True)):
            arrays[f"image_{index}"] = image
            for level, array in enumerate(maps):
                arrays[f"features_{index}_{level}"] = subsample_features(array)
        for case, expected in cases:
            arrays[f"{case.name}/points"] = case.prompts.points
            arrays[f"{case.name}/labels"] = case.prompts.labels
            if case.prompts.masks is not None:
                arrays[f"{case.name}/mask_prompt"] = case.prompts.masks
            arrays[f"{case.name}/logits"] = _subsample_logits(expected.logits)
            arrays[f"{case.name}/masks"] = np.packbits(expected.logits > 0)
            arrays[f"{case.name}/iou"] = expected.iou
            if expected.object_score is not None:
                arrays[f"{case.name}/object_score"] = expected.object_score
        description = {
            "version": _VERSION,
            "images": len(images),
            "levels": levels,
            "cases": [{"name": case.name, "image": case.image} for case, _ in cases],
        }
        return cls(arrays, description)

    def save(self, path: Path) -> None:
        """Write the record, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        arrays: dict[str, Any] = {"description": np.array(json.dumps(self._description))}
        with atomic_write(path) as stream:
            np.savez_compressed(stream, **(arrays | self._arrays))

    @classmethod
    def load(cls, path: Path) -> ParityRecord:
        """Read a record.

        Raises:
            BundleError: the file is missing or damaged.
        """
        try:
            arrays = read_arrays(path)
            description = json.loads(str(arrays.pop("description")))
            if description["version"] != _VERSION:
                raise BundleError(f"has version {description['version']}", path.name)
            record = cls(arrays, description)
            record._check()
            return record
        except BundleError:
            raise
        except Exception as error:  # zipfile, zlib, struct and NumPy raise classes of their own
            raise BundleError(f"is not a parity record: {error}", path.name) from error

    def _check(self) -> None:
        """Refuse a record that lacks what its description lists.

        Raises:
            ValueError, KeyError, TypeError: it does.
        """
        images = self.images()
        for index in range(len(images)):
            for level in range(self._description["levels"]):
                self._arrays[f"features_{index}_{level}"]
        for case in self.cases():
            if not 0 <= case.image < len(images):
                raise ValueError(f"case {case.name} is about image {case.image}")
            for part in ("logits", "masks", "iou"):
                self._arrays[f"{case.name}/{part}"]

    def images(self) -> list[NDArray[np.uint8]]:
        """The images, uint8 [H, W, 3] each."""
        return [self._arrays[f"image_{i}"] for i in range(self._description["images"])]

    def cases(self) -> list[ParityCase]:
        """The decoder calls."""
        return [
            ParityCase(
                entry["name"],
                entry["image"],
                PackedPrompts(
                    self._arrays[f"{entry['name']}/points"],
                    self._arrays[f"{entry['name']}/labels"],
                    self._arrays.get(f"{entry['name']}/mask_prompt"),
                ),
            )
            for entry in self._description["cases"]
        ]

    def compare_features(
        self, index: int, maps: tuple[NDArray[np.float32], ...], limits: ParityLimits
    ) -> Iterator[Measurement]:
        """Compare one image's feature maps, float32 [1, C, h, w] each, with the record."""
        if len(maps) != self._description["levels"]:
            raise BundleError(
                f"holds {self._description['levels']} feature maps, the model returned {len(maps)}"
            )
        for level, array in enumerate(maps):
            expected = self._arrays[f"features_{index}_{level}"]
            actual = subsample_features(array)
            if not np.isfinite(array).all():  # one number may lie between those on record
                actual = np.full_like(actual, np.nan)
            place, output = f"image {index}", f"features {level}"
            yield Measurement(
                place, output, "cosine", _cosine(actual, expected), limits.feature_cosine, True
            )
            yield Measurement(
                place,
                output,
                "relative error",
                relative_error(actual, expected),
                limits.feature_error,
            )

    def compare_case(
        self, case: ParityCase, actual: ExpectedCase, limits: ParityLimits
    ) -> Iterator[Measurement]:
        """Compare one decoder call's outputs with the record."""
        logits = self._arrays[f"{case.name}/logits"]
        yield Measurement(
            case.name,
            "logits",
            "relative error",
            relative_error(_subsample_logits(actual.logits), logits),
            limits.logit_error,
        )
        bits = self._arrays[f"{case.name}/masks"]
        expected = np.unpackbits(bits, count=actual.logits.size).astype(bool)
        ious = _mask_ious(actual.logits, expected.reshape(actual.logits.shape))
        for metric, value, limit in (
            ("mean IoU", float(ious.mean()), limits.mask_iou),
            ("least IoU", float(ious.min()), limits.least_mask_iou),
        ):
            yield Measurement(case.name, "masks", metric, value, limit, True)
        yield Measurement(
            case.name,
            "predicted IoU",
            "error",
            _largest_error(actual.iou, self._arrays[f"{case.name}/iou"]),
            limits.iou_error,
        )
        score = self._arrays.get(f"{case.name}/object_score")
        if score is not None:
            said = actual.object_score
            error = math.inf if said is None else _largest_error(said, score)
            yield Measurement(
                case.name,
                "object score",
                "relative error",
                error / self._largest_score(),
                limits.logit_error,
            )

    def _largest_score(self) -> float:
        """The largest absolute object score of all cases.

        One case has one score per object, and one near zero says "perhaps": an error relative to
        itself would be of no meaning.
        """
        scores = (self._arrays.get(f"{case.name}/object_score") for case in self.cases())
        return max(1e-6, *(float(np.abs(s).max()) for s in scores if s is not None), 0.0)


def verify_model(
    model: SegmentationModel, record: ParityRecord, limits: ParityLimits
) -> Iterator[Measurement]:
    """Run a model on a record, encoder and decoder, and compare every output.

    Args:
        model: what to check.
        record: its bundle's record.
        limits: the differences allowed.

    Yields:
        One measurement per output and metric, as they are made.
    """
    embeddings: list[ImageEmbedding] = []
    for index, image in enumerate(record.images()):
        embedding = model.encode(image)
        embeddings.append(embedding)
        yield from record.compare_features(index, embedding.features.numpy(), limits)
    for case in record.cases():
        yield from record.compare_case(case, run_case(model, embeddings[case.image], case), limits)


def restate(model: SegmentationModel, record: ParityRecord) -> ParityRecord:
    """A record of the same inputs that expects what this model returns for them."""
    images = record.images()
    embeddings = [model.encode(image) for image in images]
    cases = [(case, run_case(model, embeddings[case.image], case)) for case in record.cases()]
    return ParityRecord.build(images, [e.features.numpy() for e in embeddings], cases)


def run_case(model: SegmentationModel, embedding: ImageEmbedding, case: ParityCase) -> ExpectedCase:
    """A model's outputs for one case, multi-mask and single-mask together."""
    multi = model.decode_packed(embedding, case.prompts, multimask_output=True)
    single = model.decode_packed(embedding, case.prompts, multimask_output=False)
    return ExpectedCase(
        np.concatenate([multi.low_res_masks, single.low_res_masks], axis=1),
        np.concatenate([multi.iou_predictions, single.iou_predictions], axis=1),
        multi.object_score_logits,
    )


def load_record(bundle: Bundle) -> ParityRecord:
    """The parity record of a bundle.

    Raises:
        BundleError: it is damaged, or not the file the manifest describes.
    """
    entry = bundle.manifest.parity.record
    check_length(bundle.path, entry)
    return ParityRecord.load(bundle.file(entry))


def subsample_features(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every fourth channel and about 24 rows and columns of a map [1, C, h, w]."""
    stride = max(1, array.shape[-1] // 24)
    return np.ascontiguousarray(array[0, ::CHANNEL_STRIDE, ::stride, ::stride])


def _subsample_logits(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(logits[..., ::LOGIT_STRIDE, ::LOGIT_STRIDE])


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest absolute difference over the largest absolute expected value.

    NaN where either holds one, infinity where the shapes differ.
    """
    return _largest_error(actual, expected) / max(float(np.abs(expected).max()), 1e-6)


def _largest_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max())


def _cosine(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    if actual.shape != expected.shape:
        return float("nan")
    a, b = actual.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))


def _mask_ious(logits: NDArray[np.float32], expected: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The IoU of each mask, [P, C]; two empty masks agree. NaN where a logit is NaN."""
    actual = logits > 0
    both = (actual & expected).sum(axis=(-2, -1))
    either = (actual | expected).sum(axis=(-2, -1))
    ious = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    broken: NDArray[np.float64] = np.where(np.isnan(logits).any(axis=(-2, -1)), np.nan, ious)
    return broken
