"""PlannedSamples: the samples that plans name, read from their shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from datapipe.index import ShardIndex
from datapipe.order import Drawn, Order
from datapipe.plan import BatchPlan
from datapipe.position import Span
from datapipe.reader import RawSample, SampleReader


@dataclass(frozen=True, eq=False, slots=True)
class DrawnSample:
    """A sample, and the epoch of its data set that it is read in."""

    sample: RawSample
    epoch: int


Rows = list[DrawnSample | None]
"""One for each row of a batch; None where the row only fills a place."""


class PlannedSamples:
    """Reads what plans name, in their order. Not for use by several threads at once."""

    def __init__(self, index: ShardIndex, order: Order) -> None:
        self._index = index
        self._order = order
        self._reader = SampleReader(index, block_size=order.block_size, max_blocks=1)
        self._pools: dict[Span, Drawn] = {}

    def of_plans(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Rows]]:
        """Each plan with its samples. Errors: those of `SampleReader.fetch`."""
        for plan in plans:
            yield plan, self._read(plan)

    def in_order(self) -> Iterator[DrawnSample]:
        """The samples of epoch 0, read one by one."""
        reader = SampleReader(self._index, block_size=1, max_blocks=1)
        for place in range(self._order.num_samples):
            drawn = self._order.draw(Span(0, place, place + 1))
            (sample,) = reader.fetch(drawn.sample_ids)
            yield DrawnSample(sample, int(drawn.epochs[0]))

    def _read(self, plan: BatchPlan) -> Rows:
        num_pools = 2 * len(plan.segments)  # a segment may be leaving one pool and entering another
        self._reader.max_blocks = num_pools * (self._order.blocks_per_pool + 1)
        rows: Rows = []
        for segment in plan.segments:
            end = len(rows) + segment.size
            for span in segment.spans:
                drawn = self._draw(span, num_pools)
                samples = self._reader.fetch(drawn.sample_ids)
                rows += map(DrawnSample, samples, drawn.epochs.tolist())
            rows += [None] * (end - len(rows))
        return rows

    def _draw(self, span: Span, num_pools: int) -> Drawn:
        """`order.draw`, with the pools in use kept."""
        parts = [Drawn.nothing()]
        start = span.start
        while start < span.stop:
            pool = self._order.pool_at(span.epoch, start)
            if pool not in self._pools:
                while len(self._pools) >= num_pools:
                    del self._pools[next(iter(self._pools))]
                self._pools[pool] = self._order.draw(pool)
            stop = min(span.stop, pool.stop)
            parts.append(self._pools[pool][start - pool.start : stop - pool.start])
            start = stop
        return Drawn.joined(parts)
