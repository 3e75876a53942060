"""Reading by blocks: few reads, bounded memory, and broken shards that cost only what is broken."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datapipe.counters import ReadCounters
from datapipe.errors import MissingShard
from datapipe.index import ShardIndex
from datapipe.reader import SampleReader
from datapipe.table import ShardTable
from datapipe.table_cache import TableCache
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import encode, raw_images, write_set


def test_any_samples_in_any_order(small_index: ShardIndex) -> None:
    reader = SampleReader(small_index, block_size=8, max_blocks=3)
    ids = np.random.default_rng(0).integers(0, 75, 200)
    written = raw_images(75)
    for sample, sample_id in zip(reader.fetch(ids), ids.tolist(), strict=True):
        assert sample.sample_id == sample_id
        assert sample.payload == written[sample_id].payload


@pytest.fixture
def one_shard(tmp_path: Path) -> tuple[ShardIndex, Path]:
    """Twelve samples, three blocks of four, in one shard; a read that is repeated after the shard
    was deleted fails.
    """
    index = write_set(tmp_path, num_samples=12, samples_per_shard=None)
    return index, tmp_path / "train-00000.tar"


def test_a_block_is_read_once_for_all_its_samples(one_shard: tuple[ShardIndex, Path]) -> None:
    index, shard = one_shard
    reader = SampleReader(index, block_size=4, max_blocks=3)
    reader.fetch(np.array([0, 4, 8]))
    shard.unlink()
    samples = reader.fetch(np.array([1, 5, 9, 2, 6, 10, 3, 7, 11]))
    assert all(sample.problem() is None for sample in samples)


def test_a_block_is_dropped_when_all_its_samples_were_fetched(
    one_shard: tuple[ShardIndex, Path],
) -> None:
    index, shard = one_shard
    reader = SampleReader(index, block_size=4, max_blocks=3)
    reader.fetch(np.arange(4))
    shard.unlink()
    with pytest.raises(MissingShard):
        reader.fetch(np.array([0]))


def test_the_block_that_was_not_used_for_longest_is_dropped_beyond_the_limit(
    one_shard: tuple[ShardIndex, Path],
) -> None:
    index, shard = one_shard
    reader = SampleReader(index, block_size=4, max_blocks=2)
    reader.fetch(np.array([0, 4, 1, 8]))
    shard.unlink()
    reader.fetch(np.array([2, 9]))
    with pytest.raises(MissingShard):
        reader.fetch(np.array([5]))


def test_a_truncated_shard_costs_only_its_missing_samples(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=30, samples_per_shard=10)
    shard, table = tmp_path / "train-00001.tar", index.table(1)
    shard.write_bytes(shard.read_bytes()[: table.offsets[4] + 5])
    samples = SampleReader(index, block_size=8, max_blocks=9).fetch(np.arange(30))
    problems = [sample.problem() for sample in samples]
    lost = list(range(14, 20))
    assert [number for number, problem in enumerate(problems) if problem] == lost
    assert {problems[number] for number in lost} == {"the shard ends before this sample does"}


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=3, samples_per_shard=None)
    shard = bytearray((tmp_path / "train-00000.tar").read_bytes())
    shard[index.table(0).offsets[1] + 100] ^= 1
    (tmp_path / "train-00000.tar").write_bytes(shard)
    samples = SampleReader(index, block_size=8, max_blocks=9).fetch(np.arange(3))
    problems = [sample.problem() for sample in samples]
    assert problems[0] is problems[2] is None
    assert problems[1] == "its bytes are not those that were indexed (crc32 differs)"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=3, samples_per_shard=None)
    (tmp_path / "train-00000.tar").unlink()
    with pytest.raises(MissingShard, match=r"train-00000\.tar"):
        SampleReader(index, block_size=8, max_blocks=9).fetch(np.arange(3))


def test_a_block_that_is_much_larger_than_its_shard_suggests_is_read_in_parts(
    tmp_path: Path,
) -> None:
    """Four large images among 60 small ones; there is memory for 20 of the mean size."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    images = raw_images(64)
    for number in range(8, 12):
        images[number] = RawImage(encode(Image.fromarray(noise)), "jpg", (0,))
    index = write_shards(
        images,
        directory=str(tmp_path),
        labels=None,
        prefix="train",
        samples_per_shard=None,
        shard_bytes=None,
    )
    max_bytes = 20 * index.shards[0].bytes // 64
    assert max_bytes < index.table(0).sizes[8:12].sum()
    reader = SampleReader(index, block_size=4, max_blocks=None, max_bytes=max_bytes)
    samples = reader.fetch(np.arange(64))
    assert all(sample.problem() is None for sample in samples)
    assert reader.counters().num_reads == 15 + 4


def test_reads_are_counted(small_index: ShardIndex) -> None:
    reader = SampleReader(small_index, block_size=20, max_blocks=None)
    reader.fetch(np.arange(75))
    counters = reader.counters()
    limits = [
        (table.offsets[0], table.offsets[-1] + table.sizes[-1])
        for table in map(small_index.table, range(4))
    ]
    assert counters.bytes_read == sum(stop - start for start, stop in limits)
    assert counters == ReadCounters(bytes_read=counters.bytes_read, num_reads=4)
    assert counters + counters == ReadCounters(bytes_read=2 * counters.bytes_read, num_reads=8)


def test_a_block_that_could_not_be_read_is_tried_anew(
    one_shard: tuple[ShardIndex, Path], tmp_path: Path
) -> None:
    index, shard = one_shard
    shard.rename(tmp_path / "elsewhere")
    reader = SampleReader(index, block_size=4, max_blocks=3)
    assert reader.prefetch([0, 1])
    with pytest.raises(MissingShard):
        reader.fetch(np.arange(4))
    (tmp_path / "elsewhere").rename(shard)
    assert reader.fetch(np.arange(4))[0].problem() is None


def test_a_table_is_read_once_for_all_who_ask_at_the_same_time(small_index: ShardIndex) -> None:
    num_reads = 0
    all_ask = threading.Barrier(4)

    def read(shard: int) -> ShardTable:
        nonlocal num_reads
        num_reads += 1
        return small_index.table(shard)

    def ask() -> ShardTable:
        all_ask.wait(timeout=10)
        return tables.get(0)

    tables = TableCache(read, max_tables=1)
    with ThreadPoolExecutor(4) as executor:
        found = [task.result() for task in [executor.submit(ask) for _ in range(4)]]
    assert num_reads == 1
    assert len(set(map(id, found))) == 1
    tables.get(1)
    tables.get(0)
    assert num_reads == 3
