"""The gate: verdicts over measurements."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sam3rt.accuracy.gate import Verdict, judge
from sam3rt.accuracy.metrics import Measurement

COSINE = Measurement("image 0", "features 0", "cosine", 0.9999, 0.999, at_least=True)
MASKS = Measurement("click", "masks", "least IoU", 0.995, 0.99, at_least=True)
ERROR = Measurement("click", "predicted IoU", "error", 0.01, 0.05)


def test_nothing_compared_is_not_passed() -> None:
    verdict = judge(iter(()))
    assert not verdict.passed
    assert verdict.explain() == "nothing was compared"


def test_all_within_limits_passes() -> None:
    verdict = judge(iter((COSINE, MASKS, ERROR)))
    assert verdict.passed
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
