"""The order of samples from several sources, mixed by weight. Pure.

Each source is an endless run of its own epochs, every one a permutation of its blocks. The mixture
deals *slots* of `block_size` places to the sources, in proportion to their weights and as evenly as
they can be spaced; a slot is the next `block_size` places of its source. A pool is
`blocks_per_pool` slots whose samples are shuffled together. So each source gives every one of its
samples once in each of its own epochs, whatever the weights.

An epoch of the mixture is as many places as there are samples in all sources; with weights other
than the sizes, it holds some samples twice and others not yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datapipe.hashing import key_of, splitmix64
from datapipe.index import ShardIndex
from datapipe.order import BLOCKS_KEY, POOL_KEY, Drawn, Permutation
from datapipe.position import Span
from datapipe.storage import join

TOTAL_SHARE = 1_000_000
"""Shares are whole numbers of this many parts, so that a slot's source is exact arithmetic."""
SOURCE_KEY = 6

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class MixedOrder:
    """The sequence of every epoch of a mixture. The same promises as `SampleOrder`.

    Samples are numbered through the sources: those of source s follow those of source s - 1.
    """

    sizes: tuple[int, ...]
    """Samples of each source."""
    shares: tuple[int, ...]
    """Of `TOTAL_SHARE` parts, how many each source gives."""
    block_size: int
    blocks_per_pool: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.shares) or not self.sizes or min(self.sizes) < 1:
            raise ValueError(
                f"sizes are {self.sizes}, shares {self.shares}; one each, sizes from 1"
            )
        if sum(self.shares) != TOTAL_SHARE or min(self.shares) < 1:
            raise ValueError(f"shares are {self.shares}; allowed: from 1, {TOTAL_SHARE:,} in sum")

    @property
    def num_samples(self) -> int:
        """Places of an epoch."""
        return sum(self.sizes)

    def pool_at(self, epoch: int, place: int) -> Span:
        """The places of the pool that holds this place; an epoch's end cuts a pool in two."""
        begin = epoch * self.num_samples
        first = (begin + place) // self._pool_size * self._pool_size - begin
        return Span(epoch, max(0, first), min(self.num_samples, first + self._pool_size))

    def draw(self, span: Span) -> Drawn:
        """The samples at these places, in order, and the epoch of its source that each is of."""
        begin = span.epoch * self.num_samples
        first, last = begin + span.start, begin + span.stop
        parts = [Drawn.nothing()]
        for pool in range(first // self._pool_size, -(-last // self._pool_size)):
            start = pool * self._pool_size
            drawn = self._shuffled_pool(pool)
            parts.append(
                drawn[max(first, start) - start : min(last, start + self._pool_size) - start]
            )
        return Drawn.joined(parts)

    def facts(self) -> dict[str, Any]:
        """All that the order follows from, as JSON holds it."""
        return {**asdict(self), "sizes": list(self.sizes), "shares": list(self.shares)}

    @property
    def _pool_size(self) -> int:
        return self.blocks_per_pool * self.block_size

    @cached_property
    def _starts(self) -> list[int]:
        return [sum(self.sizes[:source]) for source in range(len(self.sizes))]

    def _shuffled_pool(self, pool: int) -> Drawn:
        first = pool * self.blocks_per_pool
        slots = np.arange(first, first + self.blocks_per_pool, dtype=np.int64)
        sources, numbers = deal_slots(slots, self.shares, seed=self.seed)
        parts = [
            self._slot(source, number)
            for source, number in zip(sources.tolist(), numbers.tolist(), strict=True)
        ]
        places = np.arange(self._pool_size, dtype=np.uint64)
        keys = splitmix64(places ^ key_of(self.seed, pool, POOL_KEY))
        return Drawn.joined(parts)[np.argsort(keys, kind="stable")]

    def _slot(self, source: int, number: int) -> Drawn:
        """Places number * block_size to (number + 1) * block_size of a source's endless run."""
        run = np.arange(number * self.block_size, (number + 1) * self.block_size, dtype=np.int64)
        epochs, places = np.divmod(run, self.sizes[source])
        ids = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            is_of_epoch = epochs == epoch
            ids[is_of_epoch] = self._in_source(source, epoch, places[is_of_epoch])
        return Drawn(ids + self._starts[source], epochs)

    def _in_source(self, source: int, epoch: int, places: Ids) -> Ids:
        """Permuted blocks, then the samples outside of full blocks.

        Blocks are those of the whole numbering, which the reader fetches: a source may begin and
        end inside of one.
        """
        size, begin = self.sizes[source], self._starts[source]
        num_before = min(-begin % self.block_size, size)
        num_blocks = (size - num_before) // self.block_size
        num_in_blocks = num_blocks * self.block_size
        is_full = places < num_in_blocks
        blocks, rows = np.divmod(places[is_full], self.block_size)
        key = key_of(self.seed, source, epoch, BLOCKS_KEY)
        ids = places - num_in_blocks  # Those before the blocks, and then
        ids[ids >= num_before] += num_in_blocks  # those behind them.
        ids[is_full] = num_before + Permutation(num_blocks, key)(blocks) * self.block_size + rows
        return ids


def deal_slots(slots: Ids, shares: Sequence[int], *, seed: int) -> tuple[Ids, Ids]:
    """For each slot, its source and its number among that source's slots.

    Of the first n slots, source s has n * share / `TOTAL_SHARE`, to the nearest few.
    """
    sources = np.full(slots.shape, len(shares) - 1, np.int64)
    numbers = slots.copy()
    rest = np.arange(slots.size)
    total = sum(shares)
    for source, share in enumerate(shares[:-1]):
        phase = int(key_of(seed, source, SOURCE_KEY)) % total
        before = (numbers[rest] * share + phase) // total
        is_taken = ((numbers[rest] + 1) * share + phase) // total > before
        taken = rest[is_taken]
        sources[taken], numbers[taken] = source, before[is_taken]
        rest = rest[~is_taken]
        numbers[rest] -= before[~is_taken]
        total -= share
    return sources, numbers


def shares_of(sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """Weights, by default the sizes, as shares: each at least one part, `TOTAL_SHARE` in sum."""
    weights = weights or sizes
    exact = np.array(weights, np.float64) / sum(weights) * (TOTAL_SHARE - len(sizes))
    shares = np.floor(exact).astype(np.int64)
    largest_rests = np.argsort(shares - exact, kind="stable")
    shares[largest_rests[: TOTAL_SHARE - len(sizes) - int(shares.sum())]] += 1
    return tuple((shares + 1).tolist())


def joined_index(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """One index of the samples of all, numbered as `MixedOrder` does."""
    shards = [
        replace(
            entry,
            shard=join(index.directory, entry.shard),
            index=join(index.directory, entry.index),
        )
        for index in indexes
        for entry in index.shards
    ]
    num_labels = max(index.num_labels for index in indexes)
    return ShardIndex(indexes[0].directory, shards, num_labels=num_labels)
