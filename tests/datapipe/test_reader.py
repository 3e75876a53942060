"""Reading by blocks: few reads, bounded memory, and broken shards that cost only what is broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datapipe.errors import MissingShard
from datapipe.index import ShardIndex
from datapipe.reader import SampleReader
from tests.datapipe.small_sets import raw_images, write_set


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
