"""The parity record: small inputs and the FP32 outputs a model must give for them.

A record is an ``.npz`` file without pickled objects. ``description`` is a JSON text that lists
the cases, and says so where the model predicts log-odds in place of IoUs; the other arrays hold
inputs whole and expected outputs subsampled:

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

from ..bundle import Bundle, Manifest, ParityLimits, check_file
from ..bundle.contract import has_object_score
from ..bundle.files import atomic_write
from ..errors import BundleError
from ..prompts import PackedPrompts
from .metrics import Measurement, cosine, largest_error, mask_ious, relative_error
from .npz import read_arrays

_VERSION = 1
_LOG_ODDS = "log_odds"
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
        *,
        log_odds: bool = False,
    ) -> ParityRecord:
        """Collect inputs and reference outputs, subsampling the outputs.

        Args:
            images: uint8 [H, W, 3] each.
            features: the feature maps of each image, float32 [1, C, h, w] each.
            cases: decoder calls and their outputs.
            log_odds: the model predicts log(s / (1 - s)) in place of an IoU s, as SAM 3.1 does.
        """
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
        if log_odds:
            description["iou_unit"] = _LOG_ODDS
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
        """Refuse a record that lacks what its description lists, or lists a case twice.

        Raises:
            ValueError, KeyError, TypeError: it does.
        """
        images = self.images()
        for index in range(len(images)):
            for level in range(self._description["levels"]):
                self._arrays[f"features_{index}_{level}"]
        cases = self.cases()
        if len({case.name for case in cases}) < len(cases):
            raise ValueError("two cases have one name")
        for case in cases:
            if not 0 <= case.image < len(images):
                raise ValueError(f"case {case.name} is about image {case.image}")
            for part in ("logits", "masks", "iou"):
                self._arrays[f"{case.name}/{part}"]

    def check_coverage(self, manifest: Manifest) -> None:
        """Refuse a record that leaves an output of the model or its mask prompts unproven.

        Raises:
            ValueError: it has no image, no decoder call, none with or none without a mask prompt,
                or an output of another shape or type than the model's.
        """
        images, cases = self.images(), self.cases()
        if not images or not cases:
            raise ValueError(f"it has {len(images)} images and {len(cases)} decoder calls")
        with_mask = sum(case.prompts.masks is not None for case in cases)
        if with_mask in (0, len(cases)):
            raise ValueError(f"{with_mask} of its {len(cases)} decoder calls have a mask prompt")
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"image {index} is {image.dtype} of shape {image.shape}")
        if self._description["levels"] != len(manifest.encoder.outputs):
            raise ValueError(
                f"it has {self._description['levels']} feature maps, the encoder makes "
                f"{len(manifest.encoder.outputs)}"
            )
        for index in range(len(images)):
            for level in range(self._description["levels"]):
                array = self._arrays[f"features_{index}_{level}"]
                if array.dtype != np.float32 or not array.size:
                    raise ValueError(
                        f"image {index} has features {level} that are {array.dtype} of shape "
                        f"{array.shape}"
                    )
        height, width = manifest.masks.low_res_size
        masks = manifest.masks.multimask + 1
        rows, columns = -(-height // LOGIT_STRIDE), -(-width // LOGIT_STRIDE)
        for case in cases:
            objects = case.prompts.labels.shape[0] if case.prompts.labels.ndim else 0
            shapes = {"logits": (objects, masks, rows, columns), "iou": (objects, masks)}
            if has_object_score(manifest) or f"{case.name}/object_score" in self._arrays:
                shapes["object_score"] = (objects,)
            shapes["masks"] = (-(-objects * masks * height * width // 8),)
            for part, shape in shapes.items():
                found = self._arrays.get(f"{case.name}/{part}")
                dtype = np.uint8 if part == "masks" else np.float32
                if not objects or found is None or found.shape != shape or found.dtype != dtype:
                    raise ValueError(
                        f"case {case.name} has {part} of "
                        f"{None if found is None else (found.shape, found.dtype)}, expected "
                        f"{(shape, np.dtype(dtype))}"
                    )
                if not np.isfinite(found).all():
                    raise ValueError(f"case {case.name} has {part} that are not finite")
            points, labels, prompt = case.prompts.points, case.prompts.labels, case.prompts.masks
            if (
                labels.ndim != 2
                or labels.dtype != np.int64
                or points.dtype != np.float32
                or points.shape != (*labels.shape, 2)
                or not np.isfinite(points).all()
            ):
                raise ValueError(
                    f"case {case.name} has points that are {points.dtype} of shape {points.shape}"
                )
            if prompt is not None and (
                prompt.dtype != np.float32
                or prompt.shape
                not in ((1, *manifest.prompts.mask_size), (objects, *manifest.prompts.mask_size))
            ):
                raise ValueError(
                    f"case {case.name} has a mask prompt that is {prompt.dtype} of shape "
                    f"{prompt.shape}"
                )

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
            actual = _nan_unless_finite(subsample_features(array), array)
            case, output = f"image {index}", f"features {level}"
            yield Measurement(
                case, output, "cosine", cosine(actual, expected), limits.feature_cosine, True
            )
            yield Measurement(
                case,
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
            relative_error(
                _nan_unless_finite(_subsample_logits(actual.logits), actual.logits), logits
            ),
            limits.logit_error,
        )
        bits = self._arrays[f"{case.name}/masks"]
        expected = np.unpackbits(bits, count=actual.logits.size).astype(bool)
        ious = mask_ious(actual.logits, expected.reshape(actual.logits.shape))
        for metric, value, limit in (
            ("mean IoU", float(ious.mean()), limits.mask_iou),
            ("least IoU", float(ious.min()), limits.least_mask_iou),
        ):
            yield Measurement(case.name, "masks", metric, value, limit, True)
        yield Measurement(
            case.name,
            "predicted IoU",
            "error",
            largest_error(*map(self._as_iou, (actual.iou, self._arrays[f"{case.name}/iou"]))),
            limits.iou_error,
        )
        score = self._arrays.get(f"{case.name}/object_score")
        if score is not None:
            said = actual.object_score
            error = math.inf if said is None else largest_error(said, score)
            yield Measurement(
                case.name,
                "object score",
                "relative error",
                error / self._largest_score(),
                limits.logit_error,
            )

    @property
    def log_odds(self) -> bool:
        """Whether the model predicts log-odds in place of IoUs."""
        return bool(self._description.get("iou_unit") == _LOG_ODDS)

    def _as_iou(self, predicted: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predictions as IoUs, in which limits are given, whatever the model's unit is."""
        predicted = _nan_unless_finite(predicted, predicted)
        if not self.log_odds:
            return predicted
        with np.errstate(over="ignore"):  # the limit of exp is right
            return np.float32(1) / (np.float32(1) + np.exp(-predicted))

    def _largest_score(self) -> float:
        """The largest absolute object score of all cases.

        One case has one score per object, and one near zero says "perhaps": an error relative to
        itself would be of no meaning.
        """
        scores = (self._arrays.get(f"{case.name}/object_score") for case in self.cases())
        return max(1e-6, *(float(np.abs(s).max()) for s in scores if s is not None), 0.0)


def load_record(bundle: Bundle) -> ParityRecord:
    """The parity record of a bundle.

    Raises:
        BundleError: it is damaged, not the file the manifest describes, or does not cover every
            output of the bundle's graphs, with and without a mask prompt.
    """
    entry = bundle.manifest.parity.record
    check_file(bundle.path, entry)
    record = ParityRecord.load(bundle.file(entry))
    try:
        record.check_coverage(bundle.manifest)
    except ValueError as error:
        raise BundleError(f"proves nothing: {error}", entry.file) from error
    return record


def subsample_features(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every fourth channel and about 24 rows and columns of a map [1, C, h, w]."""
    stride = max(1, array.shape[-1] // 24)
    return np.ascontiguousarray(array[0, ::CHANNEL_STRIDE, ::stride, ::stride])


def _nan_unless_finite(part: NDArray[np.float32], whole: NDArray[np.float32]) -> NDArray[Any]:
    """What is compared: a number that is not finite may lie between those on record."""
    return part if np.isfinite(whole).all() else np.full_like(part, np.nan)


def _subsample_logits(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(logits[..., ::LOGIT_STRIDE, ::LOGIT_STRIDE])
