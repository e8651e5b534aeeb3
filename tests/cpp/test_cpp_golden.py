"""Every golden case through the C++ runtime, against the Python runtime's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support.cpp_driver import Build, Result, as_prompts
from tests.support.golden_calls import Call, Golden, check_call

FEATURE_LIMIT = 1e-4


def options_of(call: Call) -> dict[str, Any]:
    return {k: v for k, v in call.arguments.items() if k in ("multimask_output", "return_logits")}


@pytest.fixture(scope="module")
def results(cpp_build: Build, golden: Golden) -> dict[str, Result]:
    """What the C++ runtime returns for every call, and its feature maps by image."""
    steps: list[dict[str, Any]] = [{"op": "load_model", "model": "m", "path": golden.bundle}]
    names: list[str] = [""]
    for name, image in golden.images.items():
        steps += [
            {"op": "encode", "model": "m", "embedding": name, "image": image},
            {"op": "maps", "embedding": name},
        ]
        names += ["", f"features {name}"]
    for call in golden.calls:
        steps += [
            {"op": "predictor", "model": "m", "predictor": "p", **call.options},
            {"op": "set_embedding", "predictor": "p", "embedding": call.image},
            {
                "op": "predict",
                "predictor": "p",
                "prompts": as_prompts(call.arguments),
                **options_of(call),
            },
        ]
        names += ["", "", call.name]
    done = cpp_build.run(steps)
    assert not [result.error for result in done if result.error]
    return {name: result for name, result in zip(names, done, strict=True) if name}


def test_every_golden_call(golden: Golden, results: dict[str, Result]) -> None:
    assert len(golden.calls) >= 29
    for call in golden.calls:
        arrays = results[call.name].arrays
        check_call(call, golden, arrays["masks"], arrays["iou"], arrays["low_res"])


def test_features(golden: Golden, results: dict[str, Result]) -> None:
    for name, maps in golden.features.items():
        found = results[f"features {name}"].arrays
        assert len(found) == len(maps)
        for index, expected in enumerate(maps.values()):
            np.testing.assert_allclose(found[str(index)], expected, atol=FEATURE_LIMIT, rtol=0)
