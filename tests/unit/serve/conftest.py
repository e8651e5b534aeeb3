"""What the tests of serving share."""

from __future__ import annotations

import pytest
from tests.support.serving import toy_model

from sam3rt import SegmentationModel


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> SegmentationModel:
    """A model of 8 px images and a few nodes."""
    return toy_model(tmp_path_factory.mktemp("bundles") / "toy")
