"""Buckets: parts of the flat gradient that are summed over the ranks while backward still runs.

A bucket is a slice of the flat vector, so nothing is copied into it and the optimizer runs over the
result as it lies. Backward reaches the last parameters first: buckets are cut from the end. All
ranks send them in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xdist.flat import FlatModel, Layout
from xdist.strategies.group import Group

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


class GradientReduction:
    """Sums the flat gradient over the ranks, once for each step. Raises `PeerLost`."""

    def __init__(self, flat: FlatModel, *, compress: bool) -> None:
        """compress: send and sum bfloat16."""
        self._gradients = flat.gradients
        size = BUCKET_BYTES // flat.gradients.element_size()
        self._buckets = cut_buckets(flat.layout, num_weights=size)
        self._bucket_of = {
            number: index
            for index, bucket in enumerate(self._buckets)
            for number in bucket.parameters
        }
        self._compressed = flat.gradients.to(torch.bfloat16) if compress else None
        self._group: Group | None = None
        self.begin(None)

    def begin(self, group: Group | None) -> None:
        """Another backward follows; its gradients go to this group."""
        self._group = group
        self._num_missing = [len(bucket.parameters) for bucket in self._buckets]
        self._work: list[Any] = []

    def ready(self, parameter: int) -> None:
        """This parameter's gradient is in the flat vector."""
        self._num_missing[self._bucket_of[parameter]] -= 1
        while len(self._work) < len(self._buckets) and not self._num_missing[len(self._work)]:
            self._send(self._buckets[len(self._work)])

    def finish(self) -> None:
        """Wait until the flat gradient is the sum over the ranks."""
        assert self._group is not None
        while len(self._work) < len(self._buckets):
            self._send(self._buckets[len(self._work)])
        for bucket, work in zip(self._buckets, self._work, strict=True):
            self._group.wait(work)
            if self._compressed is not None:
                self._slice(self._gradients, bucket).copy_(self._slice(self._compressed, bucket))
        self._work = []

    def _send(self, bucket: Bucket) -> None:
        assert self._group is not None
        tensor = self._slice(self._gradients, bucket)
        if self._compressed is not None:
            tensor = self._slice(self._compressed, bucket).copy_(tensor)
        self._work.append(self._group.all_reduce(tensor))

    @staticmethod
    def _slice(vector: Tensor, bucket: Bucket) -> Tensor:
        return vector[bucket.start : bucket.stop]
