"""What was found in an image: masks with their scores, in the forms in which people use them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from .arguments import file_path, number
from .bundle.files import atomic_write
from .errors import InvalidInputError, StateError
from .geometry import Image, to_rgb
from .masks.polygons import Ring, outlines, signed_area
from .masks.rle import Runs, area_of, box_around, box_of, compress, mask_of, runs_of
from .object_prompts import ObjectPrompts
from .overlay import DrawnObject, ScoreUnit, draw_objects, score_text

# Labels of more objects than these would hide the picture.
_MOST_LABELS = 30
_NOTEBOOK_SIDE = 1024
# The attributes with one entry for each mask, beside the masks themselves.
PER_MASK = (
    *("scores", "objects", "low_res_masks", "object_score_logits"),
    *("stability_scores", "point_coords", "crop_boxes"),
)
_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MOST_PIXELS_A_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # what these formats and their coders take


@dataclass(frozen=True, repr=False, eq=False)
class Segmentation:
    """N masks of one image. Masks of an object stand together, the one of the best score first.

    A sequence: an index, a slice or an array of booleans or indices gives a part, which is a
    result itself, and so does iteration, mask by mask. ``result.best`` is the part with the best
    mask of each object. What takes time is computed when it is asked for.

    Attributes:
        encoded: the masks, bool [N, H, W] or as runs (:mod:`sam3rt.masks.rle`); see :attr:`masks`.
        size: (height, width) of the image, pixels.
        scores: float32 [N], the model's opinion of each mask, in ``score_unit``.
        objects: int64 [N], the number of each mask's object, from 0.
        score_unit: ``"iou"`` (predicted, about 0 to 1) or ``"log_odds"`` of it, which have no
            bounds (SAM 3.1). :attr:`confidence` is within 0 and 1 for both.
        image: uint8 [H, W, 3] RGB, or ``None`` where an embedding was segmented. Not a copy.
        prompts: what was asked of each object, by its number.
        low_res_masks: float32 [N, h, w] logits, or ``None``; see :attr:`mask_input`.
        object_score_logits: float32 [N], positive where the model sees an object at all; ``None``
            for models that do not say.
        stability_scores: float32 [N], of the automatic mask generator, or ``None``.
        point_coords: float64 [N, 2], the point that gave each of its masks, or ``None``.
        crop_boxes: int64 [N, 4], x0, y0, x1, y1 of the crop in which it found each, or ``None``.
    """

    encoded: NDArray[np.bool_] | tuple[Runs, ...]
    size: tuple[int, int]
    scores: NDArray[np.float32]
    objects: NDArray[np.int64]
    score_unit: ScoreUnit = "iou"
    image: NDArray[np.uint8] | None = None
    prompts: tuple[ObjectPrompts, ...] = ()
    low_res_masks: NDArray[np.float32] | None = None
    object_score_logits: NDArray[np.float32] | None = None
    stability_scores: NDArray[np.float32] | None = None
    point_coords: NDArray[np.float64] | None = None
    crop_boxes: NDArray[np.int64] | None = None

    def __repr__(self) -> str:
        height, width = self.size
        count = len(set(self.objects.tolist()))
        said = [f"{len(self)} mask{'s' * (len(self) != 1)}"]
        said.append(f"{count} object{'s' * (count != 1)}")
        if len(self):
            unit = "predicted IoU" if self.score_unit == "iou" else "log-odds of the IoU"
            said.append(f"best {unit} {self.scores.max():.3f}")
        return f"<Segmentation of an image of {width} x {height} pixels: {', '.join(said)}>"

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Segmentation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice | NDArray[Any]) -> Segmentation:
        """The part with these masks.

        Raises:
            IndexError: there is no such mask.
        """
        chosen = np.atleast_1d(np.arange(len(self))[index])
        if chosen.ndim > 1:
            raise IndexError(f"got {index!r}, expected an index, a slice or an array of one axis")
        encoded = self.encoded
        part = tuple(encoded[i] for i in chosen) if isinstance(encoded, tuple) else encoded[chosen]
        arrays = {name: getattr(self, name) for name in PER_MASK}
        return replace(
            self,
            encoded=part,
            **{name: array[chosen] for name, array in arrays.items() if array is not None},
        )

    @property
    def best(self) -> Segmentation:
        """The mask of the best score of each object."""
        order = np.argsort(-self.scores, kind="stable")
        _, first = np.unique(self.objects[order], return_index=True)
        return self[order[first]]

    @property
    def mask_input(self) -> NDArray[np.float32]:
        """Float32 [B, 1, h, w], the logits of each object's best mask, to refine in a later call.

        Raises:
            StateError: this result holds none.
        """
        if self.low_res_masks is None:
            raise StateError("masks found automatically have no logits left to refine")
        best = self.best.low_res_masks
        assert best is not None
        return best[:, None]

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """Bool [N, H, W]. Of a result that holds runs they are made at the first call, and kept."""
        if not isinstance(self.encoded, tuple):
            return self.encoded
        masks = np.empty((len(self), *self.size), np.bool_)
        for index, runs in enumerate(self.encoded):
            masks[index] = mask_of(runs, self.size)
        return masks

    def _mask(self, index: int) -> NDArray[np.bool_]:
        """One mask, bool [H, W], without keeping it."""
        if isinstance(self.encoded, tuple):
            return mask_of(self.encoded[index], self.size)
        mask: NDArray[np.bool_] = self.encoded[index]
        return mask

    @cached_property
    def _runs(self) -> tuple[Runs, ...]:
        if isinstance(self.encoded, tuple):
            return self.encoded
        return tuple(map(runs_of, self.encoded))

    @cached_property
    def area(self) -> NDArray[np.int64]:
        """Int64 [N], pixels in each mask."""
        if isinstance(self.encoded, tuple):
            return np.array([area_of(runs) for runs in self.encoded], np.int64)
        return np.array([np.count_nonzero(mask) for mask in self.encoded], np.int64)

    @cached_property
    def boxes(self) -> NDArray[np.int64]:
        """Int64 [N, 4], x0, y0, x1, y1 around each mask, x1 and y1 just outside.

        Zeros for an empty mask.
        """
        if isinstance(self.encoded, tuple):
            boxes = [box_of(runs, self.size[0]) for runs in self.encoded]
        else:
            boxes = [box_around(mask) for mask in self.encoded]
        return np.array(boxes, np.int64).reshape(-1, 4)

    @property
    def confidence(self) -> NDArray[np.float32]:
        """Float32 [N], the scores within 0 and 1, whatever their unit."""
        return confidence(self.scores, self.score_unit)

    def rle(self) -> list[dict[str, Any]]:
        """Each mask as COCO's compressed run lengths: ``{"size": [H, W], "counts": str}``.

        ``pycocotools.mask.decode`` reads them; ``counts`` is what its ``encode`` gives, as text.
        """
        return [{"size": list(self.size), "counts": compress(runs)} for runs in self._runs]

    def polygons(self, tolerance: float = 0.0, holes: bool = False) -> list[list[Ring]]:
        """The outlines of each mask, largest first.

        Args:
            tolerance: how far an outline may leave the pixels' edges to have fewer points, pixels.
                With 0 the outlines enclose the mask's pixels and nothing else.
            holes: outlines of holes as well; they run the other way, see
                :func:`sam3rt.masks.polygons.signed_area`.

        Returns:
            For each mask a list of float64 [M, 2], (x, y).

        Raises:
            InvalidInputError: the tolerance is no finite number of at least 0.
        """
        tolerance = number("tolerance", tolerance, 0)
        found = (outlines(self._mask(index), tolerance) for index in range(len(self)))
        return [[ring for ring in rings if holes or signed_area(ring) > 0] for rings in found]

    def crop(self, image: Image | None = None) -> list[PIL.Image.Image]:
        """Each mask's part of the image, cut to its box, transparent (RGBA) outside the mask.

        An empty mask gives an image without pixels.

        Args:
            image: the image, where the result does not hold it.

        Raises:
            InvalidInputError: there is no image, or one of another size.
        """
        rgb = self._picture(image)
        crops = []
        for index, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
            alpha = self._mask(index)[y0:y1, x0:x1].astype(np.uint8) * 255
            crops.append(PIL.Image.fromarray(np.dstack([rgb[y0:y1, x0:x1], alpha]), "RGBA"))
        return crops

    def plot(self, image: Image | None = None) -> PIL.Image.Image:
        """The image with each object's best mask, its score and the prompts.

        Args:
            image: the image, where the result does not hold it.

        Raises:
            InvalidInputError: there is no image, or one of another size.
        """
        best = self.best
        shown = set(best.objects.tolist())
        labelled = len(best) <= _MOST_LABELS
        objects = [
            DrawnObject(
                number,
                area,
                partial(best._mask, index),
                score_text(score, self.score_unit) if labelled else "",
            )
            for index, (number, area, score) in enumerate(
                zip(best.objects.tolist(), best.area.tolist(), best.scores.tolist(), strict=True)
            )
        ]
        asked = [(number, p) for number, p in enumerate(self.prompts) if number in shown]
        return draw_objects(self._picture(image), objects, asked)

    def _repr_png_(self) -> bytes | None:
        """The plot, for notebooks, at most 1024 pixels a side."""
        if self.image is None:
            return None
        picture = self.plot()
        picture.thumbnail((_NOTEBOOK_SIDE, _NOTEBOOK_SIDE))
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()

    def _picture(self, image: Image | None) -> NDArray[np.uint8]:
        given = self.image if image is None else to_rgb(image)
        height, width = self.size
        if given is None:
            raise InvalidInputError("image", "None", "the image, since an embedding was segmented")
        if given.shape[:2] != self.size:
            got = f"{given.shape[1]} x {given.shape[0]} pixels"
            raise InvalidInputError("image", got, f"the one segmented, {width} x {height}")
        return given

    def to_supervision(self) -> Any:
        """A ``supervision.Detections`` with masks, boxes and confidences, all of class 0.

        ``data["object"]`` holds the objects' numbers.

        Raises:
            ImportError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=self.masks,
            confidence=self.confidence,
            class_id=np.zeros(len(self), int),
            data={"object": self.objects},
        )

    def to_coco(
        self, file_name: str = "", *, image_id: int = 1, first_id: int = 1
    ) -> dict[str, Any]:
        """A COCO document of this image: ``images``, ``annotations`` and ``categories``.

        Annotations hold the mask as compressed run lengths, its area and box (x, y, width, height),
        the confidence as ``score``, and the object's number as ``object``.

        Args:
            file_name: the image's.
            image_id: the image's number.
            first_id: the first annotation's number.
        """
        height, width = self.size
        annotations = [
            {
                "id": first_id + index,
                "image_id": image_id,
                "category_id": 1,
                "segmentation": rle,
                "area": area,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
                "score": round(score, 6),
                "object": number,
            }
            for index, (number, rle, area, (x0, y0, x1, y1), score) in enumerate(
                zip(
                    self.objects.tolist(),
                    self.rle(),
                    self.area.tolist(),
                    self.boxes.tolist(),
                    self.confidence.tolist(),
                    strict=True,
                )
            )
        ]
        return {
            "images": [{"id": image_id, "file_name": file_name, "height": height, "width": width}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "object"}],
        }

    def save(self, path: str | Path) -> None:
        """Write the result to a file, whole or not at all, in the form that its suffix asks for.

        ``.png``, ``.jpg`` and ``.webp``: the plot. ``.json``: :meth:`to_coco`. ``.npz``: the arrays
        ``masks``, ``scores``, ``boxes`` and ``objects``.

        Raises:
            InvalidInputError: the suffix is another one, the image is larger than its format
                takes, or there is no image to plot on.
            OSError: the file cannot be written.
        """
        path = file_path("path", path)
        suffix = path.suffix.lower()
        if suffix not in {*_PICTURES, ".json", ".npz"}:
            known = ", ".join([*_PICTURES, ".json", ".npz"])
            raise InvalidInputError("path", repr(path.name), f"a name that ends in one of {known}")
        content = io.BytesIO()
        if suffix in _PICTURES:
            form = _PICTURES[suffix]
            if max(self.size) > _MOST_PIXELS_A_SIDE.get(form, max(self.size)):
                got = f"{path.name!r} for {self.size[1]} x {self.size[0]} pixels"
                most = f"at most {_MOST_PIXELS_A_SIDE[form]} a side in {form}, or .png"
                raise InvalidInputError("path", got, most)
            self.plot().save(content, form)
        elif suffix == ".json":
            content.write((json.dumps(self.to_coco()) + "\n").encode())
        else:
            np.savez_compressed(
                content,
                masks=self.masks,
                scores=self.scores,
                boxes=self.boxes,
                objects=self.objects,
            )
        with atomic_write(path) as stream:
            stream.write(content.getbuffer())


def confidence(scores: NDArray[np.float32], unit: ScoreUnit) -> NDArray[np.float32]:
    """Scores within 0 and 1: IoUs clipped, or the IoUs that log-odds stand for."""
    if unit == "log_odds":
        with np.errstate(over="ignore"):  # the limit of exp is right
            return np.float32(1) / (np.float32(1) + np.exp(-scores))
    return np.clip(scores, np.float32(0), np.float32(1))
