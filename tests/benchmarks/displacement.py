"""How far apart an order puts the samples of one shard, over what a global shuffle would.

In a global shuffle of N samples, two of them are (N + 1) / 3 places apart in the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datapipe.order import Order
from datapipe.position import Span

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Displacement:
    """Mean distances in an epoch's sequence, over a global shuffle's."""

    of_shard: float
    """Of two samples of one shard."""
    of_neighbours: float
    """Of two samples that follow one another in a shard."""


@dataclass(frozen=True)
class _Pairs:
    """How many pairs of samples there are, and the sum of their distances."""

    number: float
    distance: float

    def __sub__(self, other: _Pairs) -> _Pairs:
        return _Pairs(self.number - other.number, self.distance - other.distance)


def displacement(
    order: Order, *, samples_per_shard: int, num_pools: int, seed: int
) -> Displacement:
    """Estimated from `num_pools` pools of epoch 0; exact where it has no more than these."""
    pools = list(_some_pools(order, num_pools, seed))
    sample_ids = np.concatenate([order.draw(pool).sample_ids for pool in pools])
    numbers = np.repeat(np.arange(len(pools)), [pool.num_samples for pool in pools])
    places = np.concatenate([np.arange(pool.start, pool.stop, dtype=np.int64) for pool in pools])
    shards = sample_ids // samples_per_shard
    in_pool = _pairs_within(shards * len(pools) + numbers, places)
    across = _pairs_within(shards, places) - in_pool
    next_in_pool, next_across = _neighbours(sample_ids, shards, numbers, places)
    share = sample_ids.size / order.num_samples
    shuffled = (order.num_samples + 1) / 3
    return Displacement(
        _mean(in_pool, across, share) / shuffled, _mean(next_in_pool, next_across, share) / shuffled
    )


def _mean(in_pool: _Pairs, across: _Pairs, share: float) -> float:
    """The mean distance of all pairs of the epoch, of which those that were met are a sample.

    Each pair counts as often as the inverse of its chance to be met (Horvitz and Thompson, 1952):
    `share` is that of a pool, and so of a pair in it.
    """
    distance = in_pool.distance / share + across.distance / share**2
    return distance / (in_pool.number / share + across.number / share**2)


def _pairs_within(groups: Numbers, places: Numbers) -> _Pairs:
    """All pairs of a group: of c sorted places, the i-th is added i times, and taken c - 1 - i."""
    by_group = np.lexsort((places, groups))
    groups, places = groups[by_group], places[by_group]
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    counts = np.diff(starts, append=groups.size)
    ranks = np.arange(groups.size) - np.repeat(starts, counts)
    signs = 2 * ranks - np.repeat(counts, counts) + 1
    number = float((counts * (counts - 1) // 2).sum())
    return _Pairs(number, float((signs.astype(np.float64) * places).sum()))


def _neighbours(
    sample_ids: Numbers, shards: Numbers, numbers: Numbers, places: Numbers
) -> tuple[_Pairs, _Pairs]:
    """Pairs of samples that follow one another: those of one pool, and the others."""
    by_id = np.argsort(sample_ids)
    is_next = (np.diff(sample_ids[by_id]) == 1) & (np.diff(shards[by_id]) == 0)
    distances = np.abs(np.diff(places[by_id]))
    is_same_pool = np.diff(numbers[by_id]) == 0
    kinds = [distances[is_next & is_same_pool], distances[is_next & ~is_same_pool]]
    first, second = (_Pairs(float(kind.size), float(kind.sum())) for kind in kinds)
    return first, second


def _some_pools(order: Order, num_pools: int, seed: int) -> Iterator[Span]:
    """Pools of epoch 0, every one with the same chance."""
    size = order.block_size * order.blocks_per_pool
    num_all = max(1, -(-(order.num_samples // order.block_size) // order.blocks_per_pool))
    chosen = np.random.default_rng(seed).choice(num_all, min(num_pools, num_all), replace=False)
    for number in sorted(chosen.tolist()):
        # Its last place but for what joins one of them: pools behind that one begin so much later.
        yield order.pool_at(0, min((number + 1) * size, order.num_samples) - 1)
