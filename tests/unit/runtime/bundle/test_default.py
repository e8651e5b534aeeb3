"""Tests of `sam3rt.bundle.default`: where the bundled model lies, if it does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import sam3rt
from sam3rt.bundle import open_bundle
from sam3rt.bundle.default import default_bundle_path

PACKAGE = Path(sam3rt.__file__).parent
CALL = """
from sam3rt import BundleError, load_model
try:
    load_model()
except BundleError as error:
    print(error)
"""


def said_by(path: Path) -> str:
    """What loading the bundled model says where the package is imported from ``path``."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    result = subprocess.run(
        [sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_the_bundled_model_is_a_bundle() -> None:
    assert open_bundle(default_bundle_path()).manifest.name == "mobile_sam"


def test_a_zipped_installation_says_that_its_data_are_no_files(tmp_path: Path) -> None:
    copy = tmp_path / "packed" / "sam3rt"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "default_bundle"))
    archive = shutil.make_archive(str(tmp_path / "app"), "zip", copy.parent)
    assert "packed into an archive" in said_by(Path(archive))
    assert "has no bundled model" in said_by(copy.parent)
