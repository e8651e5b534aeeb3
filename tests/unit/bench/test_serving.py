"""`benchmarks/serving.py` and its load, in short, on a model of a few nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import serving, triton_load
from numpy.typing import NDArray
from tests.support.serving import toy_model

# It measures.
pytestmark = pytest.mark.serial

Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    bundle = toy_model(tmp_path / "toy").bundle.path

    def run(*arguments: str) -> dict[str, Any]:
        output = tmp_path / "serving.json"
        shared = ["--bundle", str(bundle), "--quick", "--seconds", "0.3", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["serving", *shared, *arguments])
        serving.main()
        document: dict[str, Any] = json.loads(output.read_text())
        return document

    return run


def ways(document: dict[str, Any], section: str = "runs") -> list[Any]:
    assert all(run.get("errors", 0) == 0 for run in document[section])
    return [(run["way"], run["users"]) for run in document["runs"]]


def test_ways_within_this_process(measure: Measure) -> None:
    document = measure("--only", "loop,batching", "--users", "1,3")
    assert ways(document) == [("loop", 1), ("loop", 3), ("batching", 1), ("batching", 3)]
    for run in document["runs"]:
        assert run["clicks"] > 5
        assert 0 < run["p50_ms"] <= run["p95_ms"] <= run["p99_ms"]
    assert {"command", "machine", "versions", "model", "image"} <= set(document)


@pytest.mark.slow
def test_a_server_its_soak_and_its_enemies(measure: Measure) -> None:
    document = measure("--only", "http,soak,hostile", "--images", "4", "--ids", "100")
    assert ways(document) == [("http", 1), ("http", 16)]
    assert [(found["image"], found["masks"]) for found in document["overhead"]] == [
        ([300, 451], 3),
        ([1080, 1920], 3),
        ([1080, 1920], 1),
    ]
    (soak,) = document["soak"]
    assert soak["clicks"] == 80
    calm, storm = document["hostile"]
    assert calm["errors"] == storm["errors"] == 0
    assert storm["clicks"] > 10


def test_what_goes_wrong_under_load_is_counted() -> None:
    expected = np.zeros((2, 3, 4, 4), np.bool_)
    warm = []

    def click(number: int) -> NDArray[np.bool_]:
        warm.append(number)
        if len(warm) > 1 and number:
            raise ValueError("refused")
        return ~expected[0]

    found = triton_load.load(lambda: click, 2, list(expected), 1, 0.1)
    assert found["clicks"] > 0
    # Every click is refused or wrong.
    assert found["errors"] == len(warm) - 1
    assert found["first_error"] == "refused"
