"""Buckets: parts of the flat gradient that are sent while backward still runs.

A bucket is a slice of the flat vector, so nothing is copied into it. Backward reaches the last
parameters first: buckets are cut from the end, and always sent in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xdist.flat import Layout

BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class Bucket:
    """Weights [start, stop), and which parameters these are."""

    start: int
    stop: int
    parameters: frozenset[int]


def cut_buckets(layout: Layout, *, num_weights: int) -> tuple[Bucket, ...]:
    """Buckets of at least `num_weights` weights each but the last, from the end of the vector."""
    buckets: list[Bucket] = []
    parameters: set[int] = set()
    stop = layout.num_weights
    for number in reversed(range(len(layout.parameters))):
        start = layout.parameters[number].offset
        parameters.add(number)
        if stop - start >= num_weights or number == 0:
            buckets.append(Bucket(start, stop, frozenset(parameters)))
            stop = start
            parameters = set()
    return tuple(buckets)


class Backward:
    """Which buckets are whole, as one backward goes on."""

    def __init__(self, layout: Layout, *, num_weights: int) -> None:
        """num_weights: of a bucket, at least."""
        self.buckets = cut_buckets(layout, num_weights=num_weights)
        self._bucket_of = {
            number: index
            for index, bucket in enumerate(self.buckets)
            for number in bucket.parameters
        }
        self.begin()

    def begin(self) -> None:
        """Another backward follows."""
        self._num_missing = [len(bucket.parameters) for bucket in self.buckets]
        self._num_taken = 0

    def ready(self, parameter: int) -> Iterator[Bucket]:
        """This parameter's gradient is there; the buckets, in order, that are whole with it."""
        self._num_missing[self._bucket_of[parameter]] -= 1
        while self._num_taken < len(self.buckets) and not self._num_missing[self._num_taken]:
            self._num_taken += 1
            yield self.buckets[self._num_taken - 1]

    def rest(self) -> tuple[Bucket, ...]:
        """All gradients are there; the buckets, in order, that nobody has been told of."""
        rest, self._num_taken = self.buckets[self._num_taken :], len(self.buckets)
        return rest
