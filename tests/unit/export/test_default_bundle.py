"""The bundle that ships with sam3rt, and how it is made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tests.support.export_helpers import leftovers

from sam3rt.accuracy.record import load_record
from sam3rt.bundle import open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt_export import default_bundle

PHOTOS = Path(__file__).resolve().parents[2] / "photos"


def test_the_shipped_bundle_is_of_the_published_weights() -> None:
    manifest = open_bundle(default_bundle_path()).manifest
    assert manifest.source.sha256 == default_bundle._SHA256
    assert (manifest.model_type, manifest.weights) == ("mobile_sam", "float16")
    assert manifest.source.license == "Apache-2.0"
    assert manifest.source.license_file is not None


def test_the_shipped_licence_is_that_of_the_weights() -> None:
    text = (default_bundle_path() / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert default_bundle.license_text().read_text() == text


def test_its_parity_images_are_the_photographs() -> None:
    images = load_record(open_bundle(default_bundle_path())).images()
    assert len(images) == len(default_bundle._PHOTOS)
    for image, name in zip(images, default_bundle._PHOTOS, strict=True):
        np.testing.assert_array_equal(image, default_bundle.shrunk(PHOTOS / name))


@pytest.mark.parametrize(("size", "expected"), [((300, 512), (150, 256)), ((400, 80), (256, 51))])
def test_photographs_are_shrunk_to_their_longest_side(
    size: tuple[int, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    PIL.Image.new("RGBA", size).save(tmp_path / "photo.png")
    image = default_bundle.shrunk(tmp_path / "photo.png")
    assert image.shape == (expected[1], expected[0], 3)
    assert image.dtype == np.uint8


def test_other_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "mobile_sam.pt"
    torch.save({"x": torch.ones(1)}, weights)
    arguments = ["--output", str(tmp_path / "out"), "--weights", str(weights)]
    assert default_bundle.main(arguments) == 1
    assert "is not the published mobile_sam.pt" in capsys.readouterr().err
    assert leftovers(tmp_path) == ["mobile_sam.pt"]


def test_missing_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "out"), "--weights", str(tmp_path / "no.pt")]
    assert default_bundle.main(arguments) == 1
    assert "no.pt" in capsys.readouterr().err
    assert leftovers(tmp_path) == []
