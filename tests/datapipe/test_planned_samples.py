"""What is read for a plan, and how much of it is kept in memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from datapipe.index import ShardIndex
from datapipe.order import SampleOrder
from datapipe.plan import leased_batches
from datapipe.planned_samples import PlannedSamples
from datapipe.position import Span


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
    samples = PlannedSamples(small_index, order)
    plans = leased_batches([Span(epoch, 0, 75) for epoch in range(3)], batch_size=5)
    for _plan, _rows in samples.of_plans(plans):
        assert order.num_in_use() <= 2
    assert len(order.given) == 3 * 6  # each pool is computed once
