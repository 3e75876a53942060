"""GradientReduction: the flat gradient, summed over the ranks while backward still runs.

The optimizer runs over the sum as it lies. All ranks send the buckets in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.flat import FlatModel
from xdist.strategies.buckets import BUCKET_BYTES, Backward, Bucket
from xdist.strategies.group import Group


class GradientReduction:
    """Sums the flat gradient over the ranks, once for each step. Raises `PeerLost`."""

    def __init__(self, flat: FlatModel, *, compress: bool) -> None:
        """compress: send and sum bfloat16."""
        self._gradients = flat.gradients
        size = BUCKET_BYTES // flat.gradients.element_size()
        self._backward = Backward(flat.layout, num_weights=size)
        self._compressed = flat.gradients.to(torch.bfloat16) if compress else None
        self._group: Group | None = None
        self.begin(None)

    def begin(self, group: Group | None) -> None:
        """Another backward follows; its gradients go to this group."""
        self._group = group
        self._backward.begin()
        self._work: list[Any] = []

    def ready(self, parameter: int) -> None:
        """This parameter's gradient is in the flat vector."""
        for bucket in self._backward.ready(parameter):
            self._send(bucket)

    def finish(self) -> None:
        """Wait until the flat gradient is the sum over the ranks."""
        assert self._group is not None
        for bucket in self._backward.rest():
            self._send(bucket)
        for bucket, work in zip(self._backward.buckets, self._work, strict=True):
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
