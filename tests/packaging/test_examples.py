"""The documented example programs, run as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import PHOTOS, ROOT

FOLDER = ROOT / "tests" / "examples"
EXPECTED = {
    "single_point": "best of 3 masks: (300, 451), score 0.994",
    "box": "mask (300, 451), score 0.",
    "box_and_points": "mask (300, 451), score 0.",
    "iterative_refinement": "refined mask (300, 451), score 0.",
    "image_batch": "coffee.png: (3, 400, 600), best score 0.994",
    "results": "95886 pixels within [0, 0, 398, 299], outlined by",
    "negative_points": "mask (300, 451), score 0.",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name: str, tmp_path: Path) -> None:
    images = [str(PHOTOS / f"{photo}.png") for photo in ("chelsea", "coffee", "astronaut")]
    result = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        env={**os.environ, "IMAGES": os.pathsep.join(images)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert EXPECTED[name] in result.stdout


def test_every_example_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXPECTED)
