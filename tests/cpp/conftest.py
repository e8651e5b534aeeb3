"""What several tests of the C interface use."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.c_library import Library


@pytest.fixture(scope="session")
def library(cpp_builds: Path) -> Library:
    """The shared library, loaded into this process."""
    return Library(cpp_builds)
