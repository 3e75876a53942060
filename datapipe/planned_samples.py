"""PlannedSamples: the samples that plans name, read from their shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datapipe.config import DataConfig
from datapipe.counters import ReadCounters
from datapipe.index import ShardIndex
from datapipe.order import Drawn, Order
from datapipe.plan import BatchPlan
from datapipe.position import Span
from datapipe.range_reader import RangeReader
from datapipe.reader import RawSample, SampleReader


@dataclass(frozen=True, eq=False, slots=True)
class DrawnSample:
    """A sample, and the epoch of its data set that it is read in."""

    sample: RawSample
    epoch: int


Rows = list[DrawnSample | None]
"""One for each row of a batch; None where the row only fills a place."""


@dataclass(eq=False)
class _Pool:
    """A pool in use: its samples in order, the blocks that hold them."""

    span: Span
    drawn: Drawn
    blocks: frozenset[int]
    is_started: bool = False
    """All that is needed of it is in memory or being read."""


class PlannedSamples:
    """Reads what plans name, in their order. `of_plans` is for one thread at a time.

    The blocks of a pool are read together, and those of the pool behind it ahead, as far as a plan
    says what follows and as `read_ahead_mb` allows. That changes when a sample is read, not which.
    """

    def __init__(self, index: ShardIndex, order: Order, config: DataConfig) -> None:
        self._index = index
        self._order = order
        self._ranges = RangeReader.of_config(config)
        self._reader = SampleReader(
            index,
            block_size=order.block_size,
            max_blocks=None,
            max_bytes=int(config.read_ahead_mb * 1e6),
            num_threads=config.read_threads,
            ranges=self._ranges,
        )
        self._pools: dict[Span, _Pool] = {}

    def of_plans(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, Rows]]:
        """Each plan with its samples. Errors: those of `SampleReader.fetch`."""
        for plan in plans:
            yield plan, self._read(plan)

    def in_order(self) -> Iterator[DrawnSample]:
        """The samples of epoch 0, read one by one."""
        reader = SampleReader(
            self._index, block_size=1, max_blocks=1, num_threads=1, ranges=self._ranges
        )
        with closing(reader):
            for place in range(self._order.num_samples):
                drawn = self._order.draw(Span(0, place, place + 1))
                (sample,) = reader.fetch(drawn.sample_ids)
                yield DrawnSample(sample, int(drawn.epochs[0]))

    def counters(self) -> ReadCounters:
        """Of all that was read so far."""
        return self._ranges.counters()

    def close(self) -> None:
        """End the threads that read."""
        self._reader.close()

    def _read(self, plan: BatchPlan) -> Rows:
        drawn = [self._draw(segment.spans) for segment in plan.segments]
        sample_ids = Drawn.joined([Drawn.nothing(), *drawn]).sample_ids
        ahead = self._pools_ahead(plan)
        self._reader.keep(frozenset().union(*(pool.blocks for pool in self._pools.values())))
        self._read_ahead(sample_ids, ahead)
        samples = iter(self._reader.fetch(sample_ids))
        rows: Rows = []
        for segment, of_segment in zip(plan.segments, drawn, strict=True):
            end = len(rows) + segment.size
            rows += [DrawnSample(next(samples), epoch) for epoch in of_segment.epochs.tolist()]
            rows += [None] * (end - len(rows))
        self._forget_finished(plan, ahead)
        return rows

    def _pools_ahead(self, plan: BatchPlan) -> dict[Span, int]:
        """The pools to read ahead, each from which place on: those in use, then those behind."""
        current: dict[Span, int] = {}
        behind: dict[Span, int] = {}
        for segment in plan.segments:
            span = segment.upcoming
            if span is not None:
                pool = self._pool(span.epoch, span.start).span
                current[pool] = min(span.start, current.get(pool, span.start))
                if pool.stop < span.stop:
                    behind[self._pool(span.epoch, pool.stop).span] = pool.stop
        return current | {pool: start for pool, start in behind.items() if pool not in current}

    def _read_ahead(self, sample_ids: NDArray[np.int64], ahead: dict[Span, int]) -> None:
        """Start to read the blocks of these samples, then of the pools, while there is room."""
        if not self._reader.prefetch(self._blocks(sample_ids)):
            return
        for span, start in ahead.items():
            pool = self._pools[span]
            if not pool.is_started:
                rest = pool.drawn.sample_ids[start - span.start :]
                pool.is_started = self._reader.prefetch(self._blocks(rest))
                if not pool.is_started:
                    return

    def _forget_finished(self, plan: BatchPlan, ahead: dict[Span, int]) -> None:
        """Of the pools, keep those that are read ahead and those that the plan ends inside of."""
        in_use = set(ahead)
        for span in plan.spans:
            pool = self._order.pool_at(span.epoch, span.stop - 1)
            if span.stop < pool.stop:
                in_use.add(pool)
        self._pools = {span: pool for span, pool in self._pools.items() if span in in_use}

    def _draw(self, spans: Iterable[Span]) -> Drawn:
        """`order.draw`, with the pools in use kept."""
        parts = [Drawn.nothing()]
        for span in spans:
            start = span.start
            while start < span.stop:
                pool = self._pool(span.epoch, start)
                stop = min(span.stop, pool.span.stop)
                parts.append(pool.drawn[start - pool.span.start : stop - pool.span.start])
                start = stop
        return Drawn.joined(parts)

    def _pool(self, epoch: int, place: int) -> _Pool:
        """The pool that holds this place."""
        span = self._order.pool_at(epoch, place)
        if span not in self._pools:
            drawn = self._order.draw(span)
            self._pools[span] = _Pool(span, drawn, frozenset(self._blocks(drawn.sample_ids)))
        return self._pools[span]

    def _blocks(self, sample_ids: NDArray[np.int64]) -> list[int]:
        """The blocks of these samples, in the order in which they are needed."""
        return list(dict.fromkeys((sample_ids // self._order.block_size).tolist()))
