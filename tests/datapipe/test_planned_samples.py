"""What is read for a plan, and how much of it is read ahead and kept in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from datapipe.counters import ReadCounters
from datapipe.index import ShardIndex
from datapipe.order import SampleOrder
from datapipe.plan import BatchPlan, lane_batches, leased_batches
from datapipe.planned_samples import PlannedSamples
from datapipe.position import Position, Span
from tests.datapipe.small_sets import raw_images, small_config, small_order


@dataclass(frozen=True)
class WatchedOrder(SampleOrder):
    """An order that knows which of the arrays it gave away are still in use."""

    given: list[weakref.ref[NDArray[np.int64]]] = field(default_factory=list)

    def sample_ids(self, span: Span) -> NDArray[np.int64]:
        ids = super().sample_ids(span)
        self.given.append(weakref.ref(ids))
        return ids

    def num_in_use(self) -> int:
        return sum(ids() is not None for ids in self.given)


def test_only_the_pools_of_the_batch_are_kept(small_index: ShardIndex) -> None:
    order = WatchedOrder(small_index.num_samples, block_size=4, blocks_per_pool=3, seed=5)
    samples = PlannedSamples(small_index, order, small_config(small_index))
    plans = leased_batches([Span(epoch, 0, 75) for epoch in range(3)], batch_size=5)
    for _plan, _rows in samples.of_plans(plans):
        assert order.num_in_use() <= 2
    assert len(order.given) == 3 * 6  # each pool is computed once


def plans_of(index: ShardIndex, *, is_leased: bool) -> Iterator[BatchPlan]:
    """Two epochs."""
    num_samples = index.num_samples
    if is_leased:
        return leased_batches([Span(epoch, 0, num_samples) for epoch in range(2)], batch_size=5)
    return lane_batches(
        Position(),
        num_samples=num_samples,
        num_lanes=4,
        samples_per_lane=2,
        lanes=range(4),
        num_epochs=2,
    )


def read(index: ShardIndex, *, is_leased: bool, num_blocks: float) -> ReadCounters:
    """All samples of both epochs, with memory for so many blocks of four."""
    mean_size = sum(entry.bytes for entry in index.shards) / index.num_samples
    config = replace(
        small_config(index), read_ahead_mb=num_blocks * 4 * mean_size / 1e6, read_threads=2
    )
    samples = PlannedSamples(index, small_order(index), config)
    written = raw_images(index.num_samples)
    ids = []
    for plan, rows in samples.of_plans(plans_of(index, is_leased=is_leased)):
        assert len(rows) == plan.size
        for row in rows:
            if row is not None:
                assert row.sample.payload is not None
                assert bytes(row.sample.payload) == written[row.sample.sample_id].payload
                ids.append((row.epoch, row.sample.sample_id))
    assert sorted(ids) == [(epoch, number) for epoch in range(2) for number in range(75)]
    samples.close()
    return samples.counters()


@pytest.mark.parametrize("is_leased", [True, False])
def test_each_block_is_read_once_where_memory_suffices(
    small_index: ShardIndex, is_leased: bool
) -> None:
    counters = read(small_index, is_leased=is_leased, num_blocks=40)
    num_cut_pools = 0 if is_leased else 3  # a pool that belongs to two lanes may be read for each
    assert 2 * 19 <= counters.num_reads <= 2 * (19 + 3 * num_cut_pools)


@pytest.mark.parametrize("is_leased", [True, False])
def test_samples_are_read_one_by_one_where_no_block_has_room(
    small_index: ShardIndex, is_leased: bool
) -> None:
    counters = read(small_index, is_leased=is_leased, num_blocks=0.5)
    sizes = [small_index.table(shard).sizes.sum() for shard in range(4)]
    assert counters.num_reads == 2 * 75
    assert counters.bytes_read == 2 * sum(sizes)


@pytest.mark.parametrize("is_leased", [True, False])
@pytest.mark.parametrize("num_blocks", [1.5, 2.5, 5.5])
def test_scarce_memory_never_means_a_block_for_every_sample(
    small_index: ShardIndex, is_leased: bool, num_blocks: float
) -> None:
    counters = read(small_index, is_leased=is_leased, num_blocks=num_blocks)
    all_bytes = sum(entry.bytes for entry in small_index.shards)
    assert counters.num_reads <= 2 * 75 + 2 * 19
    assert counters.bytes_read < 2 * 2 * all_bytes
