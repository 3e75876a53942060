"""Assembly of batches: which rows repeat which, and how much is kept in memory."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from datapipe.assembly import BatchMaker, sources
from datapipe.index import ShardIndex
from datapipe.order import SampleOrder
from datapipe.plan import leased_batches
from datapipe.position import Span
from tests.datapipe.small_sets import NUM_CLASSES, small_config


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
    with ThreadPoolExecutor(1) as executor:
        maker = BatchMaker(
            small_index,
            small_config(small_index),
            order=order,
            training=True,
            num_classes=NUM_CLASSES,
            executor=executor,
        )
        for plan in leased_batches([Span(epoch, 0, 75) for epoch in range(3)], batch_size=5):
            maker.finish(maker.start(plan))
            assert order.num_in_use() <= 2
    assert len(order.given) == 3 * 6  # each pool is computed once


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5))
def test_every_row_shows_a_good_one_of_its_segment_if_there_is_one(
    segments: list[list[bool]],
) -> None:
    is_good = np.array([row for segment in segments for row in segment])
    found = sources(is_good, [len(segment) for segment in segments]).tolist()
    start = 0
    for segment in segments:
        rows = range(start, start + len(segment))
        start += len(segment)
        for row in rows:
            if is_good[row]:
                assert found[row] == row
            elif any(segment):
                assert found[row] in rows
            elif is_good.any():
                assert is_good[found[row]]
            else:
                assert found[row] == -1
