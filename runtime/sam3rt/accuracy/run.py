"""Running a parity record on whatever encodes images and decodes prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle import Manifest, ParityLimits
from ..bundle.contract import decoder_outputs, has_object_score
from ..features import Features
from ..geometry import ImageGeometry, geometry
from ..prompts import PackedPrompts
from .metrics import Measurement
from .record import ExpectedCase, ParityCase, ParityRecord


class Runner(Protocol):
    """What can be run on a record: a backend, or anything else with these two."""

    def encode_image(self, image: NDArray[np.uint8], geometry: ImageGeometry) -> Features:
        """Feature maps of uint8 [H, W, 3]."""

    def decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """The named decoder outputs, float32 [1, P, ...] each."""


def verify(
    runner: Runner, manifest: Manifest, record: ParityRecord, limits: ParityLimits
) -> Iterator[Measurement]:
    """Run a record, encoder and decoder, and compare every output.

    Args:
        runner: what to check.
        manifest: of the bundle it runs.
        record: the bundle's record.
        limits: the differences allowed.

    Yields:
        One measurement per output and metric, as they are made.
    """
    embeddings: list[Features] = []
    for index, image in enumerate(record.images()):
        features = encode(runner, manifest, image)
        embeddings.append(features)
        yield from record.compare_features(index, features.numpy(), limits)
    for case in record.cases():
        answer = run_case(runner, manifest, embeddings[case.image], case)
        yield from record.compare_case(case, answer, limits)


def rerecord(runner: Runner, manifest: Manifest, record: ParityRecord) -> ParityRecord:
    """A record of the same inputs that expects what this runner returns for them."""
    images = record.images()
    embeddings = [encode(runner, manifest, image) for image in images]
    cases = [
        (case, run_case(runner, manifest, embeddings[case.image], case)) for case in record.cases()
    ]
    maps = [features.numpy() for features in embeddings]
    return ParityRecord.build(images, maps, cases, log_odds=record.log_odds)


def encode(runner: Runner, manifest: Manifest, image: NDArray[np.uint8]) -> Features:
    """The feature maps of one image of a record."""
    return runner.encode_image(image, geometry(manifest.image, (image.shape[0], image.shape[1])))


def run_case(
    runner: Runner, manifest: Manifest, features: Features, case: ParityCase
) -> ExpectedCase:
    """The outputs for one case, multi-mask and single-mask together."""
    multi, single = (
        runner.decode(features, case.prompts, decoder_outputs(manifest, multimask_output))
        for multimask_output in (True, False)
    )
    return ExpectedCase(
        np.concatenate([multi[0][0], single[0][0]], axis=1),
        np.concatenate([multi[1][0], single[1][0]], axis=1),
        multi[2][0, :, 0] if has_object_score(manifest) else None,
    )
