"""GradientSlots: a worker's gradients, which the servers of its node read where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from xdist.shared_memory import Segment, SegmentAddress, VectorLayout


@dataclass(frozen=True)
class SlotsAddress:
    """Where the servers of the node find the slots of a worker."""

    segment: SegmentAddress
    layout: VectorLayout


class GradientSlots:
    """Vectors that one worker writes and several servers read, each its own range.

    There is no lock: the worker says by a message that a slot is full, and writes into it again
    only when every server has applied it.
    """

    def __init__(self, segment: Segment, layout: VectorLayout) -> None:
        self.address = SlotsAddress(segment.address, layout)
        self.slots = layout.views(segment, offset=0)
        """Tensors of the shared memory itself; a server may only read them."""
        self._segment = segment

    @classmethod
    def create(cls, name: str, *, num_slots: int, size: int, dtype: torch.dtype) -> Self:
        """The worker's: `num_slots` vectors of `size` elements, float32 or bfloat16. Raises
        `NotShared`.
        """
        layout = VectorLayout(num_slots, size, dtype)
        return cls(Segment.create(name, layout.num_bytes), layout)

    @classmethod
    def open(cls, address: SlotsAddress) -> Self:
        """A server's. Raises `NotShared`."""
        return cls(Segment.open(address.segment, address.layout.num_bytes), address.layout)
