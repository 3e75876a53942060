"""Outbox: a worker's gradient on its way out, in the type that it is sent as, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist import bfloat16, wire
from xdist.errors import NotShared
from xdist.flat import FlatModel
from xdist.gradient_slots import GradientSlots, SlotsAddress
from xdist.servers_config import ServersConfig
from xdist.strategies.buckets import BUCKET_BYTES, Backward, Bucket


@dataclass(frozen=True)
class Outgoing:
    """A part of the gradient that can be sent."""

    start: int
    """Its first weight."""
    values: Tensor
    """Float32 or bfloat16, on the host; they stay so until the slot has its turn again."""


class Outbox:
    """The gradient lies in as many slots, which take turns, as pushes are on their way at once.
    Where servers read them, they are shared memory. Else what is sent is copied at once, so there
    is one. A slot is the flat gradient itself, where that can be rounded as it is made.
    """

    def __init__(self, config: ServersConfig, flat: FlatModel, *, is_summed: bool = False) -> None:
        """is_summed: the flat gradient is the sum of those of parts of a batch."""
        self._flat = flat
        self._dtype = wire.dtype_of(config)
        self._num_slots = config.overlap + 1 if config.shared_memory else 0
        self._size = len(flat.gradients)
        self._residual = torch.zeros(self._size) if config.error_feedback else None
        num_weights = BUCKET_BYTES // self._dtype.itemsize
        self._backward = Backward(flat.layout, num_weights=num_weights)
        is_on_host = flat.gradients.device.type == "cpu"
        self._is_early = is_on_host
        """Elsewhere a copy would keep the host from queueing the rest of backward."""
        is_rounded = self._dtype != flat.gradients.dtype
        self._is_in_place = is_on_host and not (is_rounded and (is_summed or config.error_feedback))
        self._shared: GradientSlots | None = None
        self._slots: tuple[Tensor, ...] = ()
        self.slot = 0
        """The number of the one that the next push lies in."""

    def share(self, name: str) -> SlotsAddress | None:
        """New slots in shared memory, where servers find them; None where there is no such memory.
        Those before are never written again: a server may have to read them yet.
        """
        self._shared, self._slots = None, ()
        if self._is_in_place:
            self._flat.gradients = self._flat.gradients.new_empty(0)  # Its memory goes first.
        if not self._num_slots:
            return None
        try:
            self._shared = GradientSlots.create(
                name, num_slots=self._num_slots, size=self._size, dtype=self._dtype
            )
        except NotShared:
            return None
        self._use(self._shared.slots)
        return self._shared.address

    def keep(self) -> None:
        """One slot, which is this worker's own."""
        self._shared = None
        self._use((torch.zeros(self._size, dtype=self._dtype),))

    def _use(self, slots: tuple[Tensor, ...]) -> None:
        self._slots = slots
        self._turn_to(0)

    def _turn_to(self, slot: int) -> None:
        self.slot = slot
        if self._is_in_place and self._flat.gradients is not self._slots[slot]:
            self._flat.gradients = self._slots[slot]

    def begin(self) -> None:
        """Another backward follows."""
        self._backward.begin()

    def ready(self, parameter: int) -> Iterator[Outgoing]:
        """This parameter's gradient is in the flat vector; what can be sent now."""
        if self._is_early:
            yield from map(self._take, self._backward.ready(parameter))

    def rest(self) -> Iterator[Outgoing]:
        """All gradients are in the flat vector; what is left to be sent."""
        yield from map(self._take, self._backward.rest())

    def end(self) -> None:
        """The push is on its way; the next one lies in the next slot."""
        self._turn_to((self.slot + 1) % len(self._slots))

    def _take(self, bucket: Bucket) -> Outgoing:
        places = slice(bucket.start, bucket.stop)
        out = self._slots[self.slot][places]
        if self._residual is not None:
            gradients = self._flat.gradients[places].cpu()
            bfloat16.narrow(gradients, out, residual=self._residual[places])
        elif not self._is_in_place:
            out.copy_(self._flat.gradients[places])
        return Outgoing(bucket.start, out)
