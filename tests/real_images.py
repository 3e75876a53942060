"""Where the tests find real images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.clusters import ROOT


def real_images() -> Path:
    """Where they would be: $XDIST_SHARED/data, or ../shared/data."""
    return Path(os.environ.get("XDIST_SHARED", ROOT.parent / "shared")) / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images, where they are at hand."""
    directory = real_images()
    if not directory.is_dir():
        pytest.skip(f"no real images in {directory}; set XDIST_SHARED to the directory above them")
    return directory
