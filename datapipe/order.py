"""The order of samples in an epoch: a pure function of (index, seed, epoch).

Nothing is materialised. Samples are numbered through all shards, 0 to N - 1. A *block* is a run of
`block_size` of them, what one ranged read fetches (two, where it straddles two shards). The full
blocks are permuted; a *pool* is `blocks_per_pool` permuted blocks whose samples are shuffled
together; an epoch is the sequence of its pools. The samples behind the last full block join one
pool, chosen anew every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datapipe.hashing import key_of, splitmix64
from datapipe.position import Span

NUM_ROUNDS = 6
BLOCKS_KEY, TAIL_KEY, POOL_KEY = 1, 2, 3


class Permutation:
    """A keyed permutation of 0 .. size - 1, evaluated where it is asked for.

    A Feistel network over pairs (left, right) of a grid of about sqrt(size) x sqrt(size), with
    cycle walking for the few values beyond `size` (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002).
    """

    def __init__(self, size: int, key: np.uint64) -> None:
        self.size = size
        self._num_left = np.uint64(isqrt(max(size - 1, 0)) + 1)
        self._num_right = np.uint64(-(-size // int(self._num_left)) or 1)
        self._keys = splitmix64(key + np.arange(NUM_ROUNDS, dtype=np.uint64))

    def __call__(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        permuted = self._grid(values.astype(np.uint64))
        outside = np.flatnonzero(permuted >= self.size)
        while outside.size:
            permuted[outside] = self._grid(permuted[outside])
            outside = outside[permuted[outside] >= self.size]
        return permuted.astype(np.int64)

    def _grid(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values // self._num_right, values % self._num_right
        for key in self._keys[0::2]:
            left = (left + splitmix64(right ^ key) % self._num_left) % self._num_left
            right = (right + splitmix64(left ^ ~key) % self._num_right) % self._num_right
        return left * self._num_right + right


@dataclass(frozen=True, eq=False)
class Drawn:
    """The samples at some places of the sequence."""

    sample_ids: NDArray[np.int64]
    """(N,): their numbers in the index."""
    epochs: NDArray[np.int64]
    """(N,): how often each was drawn before, in its own data set."""

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Drawn:
        return Drawn(self.sample_ids[rows], self.epochs[rows])

    @staticmethod
    def nothing() -> Drawn:
        return Drawn(np.zeros(0, np.int64), np.zeros(0, np.int64))

    @staticmethod
    def joined(parts: Sequence[Drawn]) -> Drawn:
        return Drawn(
            np.concatenate([part.sample_ids for part in parts]),
            np.concatenate([part.epochs for part in parts]),
        )


class Order(Protocol):
    """What streams and ledgers need of an order: `SampleOrder`, or `datapipe.mixing.MixedOrder`."""

    @property
    def num_samples(self) -> int:
        """Places of an epoch."""

    @property
    def block_size(self) -> int:
        """Samples of one ranged read."""

    @property
    def blocks_per_pool(self) -> int:
        """Blocks whose samples are shuffled together."""

    @property
    def seed(self) -> int:
        """Of the order, and of augmentation."""

    def pool_at(self, epoch: int, place: int) -> Span:
        """The places of the pool that holds this place."""

    def draw(self, span: Span) -> Drawn:
        """The samples at these places, in order."""

    def facts(self) -> dict[str, Any]:
        """All that the order follows from, as JSON holds it."""


@dataclass(frozen=True)
class SampleOrder:
    """The sequence of every epoch. Each sample has exactly one place in each."""

    num_samples: int
    block_size: int
    blocks_per_pool: int
    seed: int
    shuffle: bool = True
    """False: the order of the shards, for evaluation."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "block_size", "blocks_per_pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1")

    def pool_at(self, epoch: int, place: int) -> Span:
        """The places of the pool that holds this place."""
        return self._pool_span(epoch, self._pool_number(epoch, place))

    def draw(self, span: Span) -> Drawn:
        """The samples at these places, in order."""
        sample_ids = self.sample_ids(span)
        return Drawn(sample_ids, np.full(sample_ids.size, span.epoch, np.int64))

    def facts(self) -> dict[str, Any]:
        """All that a shuffled order follows from, as JSON holds it."""
        return {name: value for name, value in asdict(self).items() if name != "shuffle"}

    def sample_ids(self, span: Span) -> NDArray[np.int64]:
        """The samples at these places, in order: (num_samples,) int64."""
        if not self.shuffle:
            return np.arange(span.start, span.stop, dtype=np.int64)
        parts = [np.zeros(0, np.int64)]
        place = span.start
        while place < span.stop:
            number = self._pool_number(span.epoch, place)
            pool = self._pool_span(span.epoch, number)
            stop = min(span.stop, pool.stop)
            ids = self._shuffled_pool(span.epoch, number)
            parts.append(ids[place - pool.start : stop - pool.start])
            place = stop
        return np.concatenate(parts)

    @property
    def _num_blocks(self) -> int:
        return self.num_samples // self.block_size

    @property
    def _num_tail(self) -> int:
        return self.num_samples % self.block_size

    @property
    def _pool_size(self) -> int:
        return self.blocks_per_pool * self.block_size

    def _tail_pool(self, epoch: int) -> int:
        num_pools = max(1, -(-self._num_blocks // self.blocks_per_pool))
        if not self.shuffle:
            return num_pools - 1
        return int(key_of(self.seed, epoch, TAIL_KEY)) % num_pools

    def _pool_number(self, epoch: int, place: int) -> int:
        tail_pool = self._tail_pool(epoch)
        if place < tail_pool * self._pool_size:
            return place // self._pool_size
        return max(tail_pool, (place - self._num_tail) // self._pool_size)

    def _pool_span(self, epoch: int, pool: int) -> Span:
        tail_pool = self._tail_pool(epoch)
        start = pool * self._pool_size + (self._num_tail if pool > tail_pool else 0)
        size = self._blocks_in(pool) * self.block_size + (
            self._num_tail if pool == tail_pool else 0
        )
        return Span(epoch, start, start + size)

    def _blocks_in(self, pool: int) -> int:
        return min(self.blocks_per_pool, self._num_blocks - pool * self.blocks_per_pool)

    def _shuffled_pool(self, epoch: int, pool: int) -> NDArray[np.int64]:
        first = pool * self.blocks_per_pool
        permutation = Permutation(self._num_blocks, key_of(self.seed, epoch, BLOCKS_KEY))
        blocks = permutation(np.arange(first, first + self._blocks_in(pool), dtype=np.int64))
        ids = (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()
        if pool == self._tail_pool(epoch):
            tail = np.arange(self.num_samples - self._num_tail, self.num_samples, dtype=np.int64)
            ids = np.concatenate([ids, tail])
        keys = splitmix64(ids.astype(np.uint64) ^ key_of(self.seed, epoch, POOL_KEY))
        shuffled: NDArray[np.int64] = ids[np.argsort(keys, kind="stable")]
        return shuffled
