"""madeup://: a file system that makes up the index of a data set of any size, and no images.

A table is made up, with the writer of the real ones, when it is first asked for; from then on it is
served as it lies in the local directory that the URL names: madeup:///tmp/set/train-00017-10000.parquet
is /tmp/set/train-00017-10000.parquet, the table of shard 17, of 10,000 samples.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from datapipe.index import ShardIndex, write_manifest
from datapipe.manifest import ShardEntry
from datapipe.table import SampleEntry, write_table

PROTOCOL = "madeup"
TABLE_NAME = re.compile(r"train-(\d+)-(\d+)\.parquet")
TAR_BLOCK = 512
NUM_LABELS = 17_000
MEAN_LABELS = 5
MEDIAN_BYTES, SPREAD = 90_000, 0.6
"""Of image files: log-normal, a mean of 108 KB."""


class MadeUpIndex(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Reads alone."""

    protocol = PROTOCOL
    num_made = 0
    """Tables that this process had to make up."""

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        file = Path(self._strip_protocol(path))
        match = TABLE_NAME.fullmatch(file.name)
        if match is not None and not file.exists():
            write_table(str(file), entries(int(match[1]), num_samples=int(match[2])))
            MadeUpIndex.num_made += 1
        return file.read_bytes()[start:end]


def register() -> None:
    """Let fsspec find it."""
    fsspec.register_implementation(PROTOCOL, MadeUpIndex, clobber=True)


def write_index(directory: Path, *, num_shards: int, samples_per_shard: int) -> str:
    """Write the manifest; its URL."""
    shards = [
        ShardEntry(
            shard=f"train-{number:05d}.tar",
            index=f"train-{number:05d}-{samples_per_shard}.parquet",
            num_samples=samples_per_shard,
            bytes=samples_per_shard * MEDIAN_BYTES,
            digest=f"{number:064x}",
        )
        for number in range(num_shards)
    ]
    write_manifest(ShardIndex(str(directory), shards, num_labels=NUM_LABELS))
    return f"{PROTOCOL}://{directory}/index.json"


def entries(shard: int, *, num_samples: int) -> list[SampleEntry]:
    """The samples of a shard as `pack_shards` lays them: an image, then its JSON."""
    generator = np.random.default_rng(shard)
    sizes = np.exp(generator.normal(np.log(MEDIAN_BYTES), SPREAD, num_samples)).astype(np.int64)
    members = 3 * TAR_BLOCK + -(-sizes // TAR_BLOCK) * TAR_BLOCK
    offsets = np.cumsum(members) - members + TAR_BLOCK
    sides = generator.integers(200, 1200, (num_samples, 2))
    checksums = generator.integers(0, 1 << 32, num_samples)
    nums_labels = generator.poisson(MEAN_LABELS - 1, num_samples) + 1
    labels = generator.integers(0, NUM_LABELS, (num_samples, int(nums_labels.max())))
    names = generator.integers(0, 1 << 48, num_samples)
    return [
        SampleEntry(
            key=key_of(shard * num_samples + row),
            offset=int(offsets[row]),
            size=int(sizes[row]),
            width=int(sides[row, 0]),
            height=int(sides[row, 1]),
            labels=tuple(labels[row, : nums_labels[row]].tolist()),
            crc32=int(checksums[row]),
            name=f"{names[row]:012x}.jpg",
        )
        for row in range(num_samples)
    ]


def key_of(sample_id: int) -> str:
    return f"{sample_id:09d}"
