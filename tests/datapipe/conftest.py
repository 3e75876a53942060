"""What the tests of datapipe share: repeatable property tests, and one small data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from datapipe.index import ShardIndex
from tests.datapipe.small_sets import write_set
from tests.datapipe.small_sources import files_in, finish, write_photos

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=50, database=None
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def small_index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """75 drawn images in shards of 20, 20, 20 and 15, labels {i % 7, 7 + i % 3}. Read only."""
    return write_set(tmp_path_factory.mktemp("small"), num_samples=75, samples_per_shard=20)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 4 classes, 5 a shard with the usual options. Read only."""
    return write_photos(tmp_path_factory.mktemp("source") / "photos")


@pytest.fixture(scope="session")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that packing the photos gives."""
    output = tmp_path_factory.mktemp("packed") / "out"
    finish(photos, output)
    return files_in(output)
