"""The examples and notebooks, run as a user would run them: as they stand, from any folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from tests.conftest import ROOT

FOLDER = ROOT / "examples"
EXPECTED = {
    "single_point": "best of 3 masks: (300, 451), score 0.994",
    "box": "mask (300, 451), score 0.",
    "box_and_points": "mask (300, 451), score 0.",
    "iterative_refinement": "refined mask (300, 451), score 0.",
    "image_batch": "coffee.png: (3, 400, 600), best score 0.994",
    "results": "pixels within [0, 0, 39",
    "negative_points": "mask (300, 451), score 0.",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert EXPECTED[name] in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.ipynb")))
def test_notebook(name: str, tmp_path: Path) -> None:
    """Every cell runs, and the committed outputs are what it gives, pictures aside."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    committed = printed(notebook)
    assert committed
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert printed(notebook) == committed


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What the cells print, or show as text; digits differ from processor to processor."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    return [re.sub(r"\d+", "0", text) for text in texts]
