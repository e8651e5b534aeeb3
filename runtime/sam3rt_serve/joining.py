"""Whether clicks on several images should share runs of the decoder."""

from __future__ import annotations

import statistics
import time

import numpy as np

from sam3rt.model import SegmentationModel
from sam3rt.prompts import Prompts

# Clicks in the trial, and how often it is made.
_TRIED, _ROUNDS = 4, 5


def joining_pays(model: SegmentationModel) -> bool:
    """Whether clicks on several images are answered faster in one run than one after another.

    It is tried, where the backend has such runs.
    """
    if not model.backend.joins_images:
        return False
    embedding = model.encode(np.zeros((8, 8, 3), np.uint8))
    click = Prompts([[4.0, 4.0]], [1])

    def seconds(runs: int, together: int) -> float:
        start = time.perf_counter()
        for _ in range(runs):
            model.segment_batch([embedding] * together, [click] * together)
        return time.perf_counter() - start

    for runs in ((1, _TRIED), (_TRIED, 1)):
        seconds(*runs)  # what is made for a first run
    pairs = [(seconds(1, _TRIED), seconds(_TRIED, 1)) for _ in range(_ROUNDS)]
    return statistics.median(together / apart for together, apart in pairs) < 1.0
