"""One image of ``sam3rt segment``: reading, checking its prompts, encoding, segmenting."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import geometry
from ..automatic import AutomaticMaskGenerator
from ..embedding import ImageEmbedding
from ..errors import PromptError, PromptWarning
from ..image_files import read_image
from ..model import SegmentationModel
from ..prompts import Prompts, pack
from ..results import PER_MASK, Segmentation
from .jobs import STDIN, Job


def read(job: Job) -> NDArray[np.uint8]:
    """The image of a job, upright, from its file or from standard input.

    Raises:
        ImageError: see :func:`sam3rt.image_files.read_image`.
    """
    piped = str(job.image) == STDIN
    return read_image(job.image, io.BytesIO(sys.stdin.buffer.read()) if piped else None)


class Worker:
    """Segments images with one model, as the options say.

    Args:
        model: the model.
        options: how prompts become masks.
        everything: arguments of the automatic mask generator, or ``None`` where there are prompts.
    """

    def __init__(
        self,
        model: SegmentationModel,
        options: argparse.Namespace,
        everything: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self._everything = everything
        self._generator = (
            None if everything is None else AutomaticMaskGenerator(model, **everything)
        )
        self._best_only = options.best_only
        self._how = {
            "multimask_output": not options.single_mask,
            "threshold": options.mask_threshold,
            "max_hole_area": options.max_hole_area,
            "max_sprinkle_area": options.max_sprinkle_area,
        }

    def check(self, job: Job, image: NDArray[np.uint8]) -> None:
        """Refuse prompts before the image is encoded, and also what others only warn of.

        Raises:
            PromptError: a prompt is malformed, or lies far outside the image.
        """
        size = (image.shape[0], image.shape[1])
        where = geometry.geometry(self.model.manifest.image, size)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PromptWarning)
            for call in job.calls:
                try:
                    pack(Prompts(**call), self.model.manifest.prompts, where)
                except PromptWarning as warning:
                    expected = "pixels of the upright image"
                    raise PromptError("prompts", str(warning), expected) from None

    def encode(self, image: NDArray[np.uint8]) -> ImageEmbedding | None:
        """Encode an image; the automatic mask generator does so itself.

        Raises:
            BackendError: the backend failed.
        """
        return self.model.encode(image) if self._generator is None else None

    def segment(
        self, job: Job, image: NDArray[np.uint8], embedding: ImageEmbedding | None
    ) -> Segmentation:
        """What the prompts of a job give, object by object, with its image; or everything."""
        if self._generator is not None:
            return self._generator.generate(image)
        assert embedding is not None
        parts = [
            self.model.segment_image(
                embedding,
                call.get("point_coords"),
                call.get("point_labels"),
                call.get("box"),
                **self._how,
            )
            for call in job.calls
        ]
        result = replace(joined(parts), image=image)
        return result.best if self._best_only else result

    def settings(self) -> dict[str, Any]:
        """All that changes results beside the image and its prompts."""
        fingerprint = self.model.manifest.fingerprint
        how = {**self._how, "best_only": self._best_only, "everything": self._everything}
        return {**how, "fingerprint": fingerprint}

    def document(
        self, job: Job, result: Segmentation, entries: list[dict[str, Any]], overlay: str | None
    ) -> dict[str, Any]:
        """The content of ``result.json``, but for times."""
        height, width = result.size
        return {
            "image": str(job.image),
            "height": height,
            "width": width,
            "prompts": job.calls[0] if len(job.calls) == 1 else job.calls,
            "masks": entries,
            "overlay": overlay,
            "model": {
                "name": self.model.manifest.name,
                "fingerprint": self.model.manifest.fingerprint,
                "backend": self.model.backend.name,
                "device": self.model.device,
            },
        }


def joined(parts: Sequence[Segmentation]) -> Segmentation:
    """Results of objects of one image as one result, objects numbered on.

    Args:
        parts: at least one, of calls on one image by one model.
    """
    offsets = np.cumsum([0] + [len(part.prompts) for part in parts[:-1]])
    arrays: dict[str, Any] = {
        name: [getattr(part, name) for part in parts] for name in ("encoded", *PER_MASK)
    }
    arrays["objects"] = [part.objects + o for part, o in zip(parts, offsets, strict=True)]
    whole: dict[str, Any] = {n: np.concatenate(a) for n, a in arrays.items() if a[0] is not None}
    return replace(
        parts[0], prompts=tuple(prompts for part in parts for prompts in part.prompts), **whole
    )
