"""The gate: verdicts over measurements."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sam3rt.accuracy.gate import GATE_LIMITS, Verdict, judge
from sam3rt.accuracy.metrics import Measurement
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.model import SegmentationModel

COSINE = Measurement("image 0", "features 0", "cosine", 0.9999, 0.999, at_least=True)
MASKS = Measurement("click", "masks", "least IoU", 0.995, 0.99, at_least=True)
ERROR = Measurement("click", "predicted IoU", "error", 0.01, 0.05)


def test_nothing_compared_is_not_passed() -> None:
    verdict = judge(iter(()))
    assert not verdict.passed
    assert verdict.explain() == "nothing was compared"


def test_all_within_limits_passes() -> None:
    seen: list[Measurement] = []
    verdict = judge(iter((COSINE, MASKS, ERROR)), seen.append)
    assert verdict.passed
    assert seen == [COSINE, MASKS, ERROR]
    assert "within" in verdict.explain()


@pytest.mark.parametrize("value", [0.0, 0.04, 0.9, 0.998, math.nan, -1.0, -math.inf])
def test_one_bad_cosine_fails_and_is_explained(value: float) -> None:
    verdict = judge((dataclasses.replace(COSINE, value=value), MASKS, ERROR))
    assert not verdict.passed
    assert [m.output for m in verdict.failures] == ["features 0"]
    assert f"image 0 features 0: cosine {value:.4g}, at least 0.999 allowed" in verdict.explain()


def test_the_worst_of_each_metric_is_kept_and_nan_is_worst() -> None:
    worse = dataclasses.replace(MASKS, case="box", value=0.5)
    nan = dataclasses.replace(ERROR, case="box", value=math.nan)
    verdict = Verdict((worse, MASKS, nan, ERROR, COSINE))
    worst = verdict.worst()
    assert worst["masks least IoU"] is worse
    assert worst["predicted IoU error"] is nan
    assert worst["features 0 cosine"] is COSINE
    assert "box masks" in verdict.explain()
    assert "click" not in verdict.explain()


def test_a_faithful_model_passes_the_gate(small_model: SegmentationModel) -> None:
    record = load_record(small_model.bundle)
    verdict = judge(verify(small_model.backend, small_model.manifest, record, GATE_LIMITS))
    assert verdict.passed, verdict.explain()
    assert {"masks mean IoU", "features 0 cosine"} <= set(verdict.worst())
