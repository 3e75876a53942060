"""BlockMemory: which blocks of samples are in memory or on their way there, within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Sample = TypeVar("Sample")


@dataclass(eq=False)
class Block(Generic[Sample]):
    """A block that has a place in memory."""

    number: int
    num_bytes: int
    """Estimated, until `resize`."""
    num_unread: int
    """How many more of its samples are to be fetched."""
    samples: Future[list[Sample] | None] = field(default_factory=Future)
    """None: it turned out to be too large."""


class BlockMemory(Generic[Sample]):
    """Gives blocks a place, and takes it from those that were not used for longest.

    A block's bytes count from `add` on, until it was dropped and nothing reads it any more. One
    thread adds and drops; `resize` is for any.
    """

    def __init__(self, *, max_blocks: int | None, max_bytes: int) -> None:
        self._max_blocks = max_blocks
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[int, Block[Sample]] = OrderedDict()
        self._kept: Collection[int] = ()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of all blocks that are here or being read."""
        return self._num_bytes

    def __contains__(self, number: int) -> bool:
        return number in self._blocks

    def use(self, number: int) -> Block[Sample]:
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def add(
        self, number: int, *, num_bytes: int, num_samples: int, needed: Mapping[int, int]
    ) -> Block[Sample] | None:
        """A place for a block, whose reader sets `samples`; None where there is none.

        needed: how often each block is needed soon. Those that are, and those to `keep`, stay.
        """
        staying = [block for block in self._blocks.values() if self._stays(block, needed)]
        if not self._fits(num_bytes, len(staying), sum(block.num_bytes for block in staying)):
            return None
        for block in [block for block in self._blocks.values() if block not in staying]:
            if self._fits(num_bytes, len(self._blocks), self._num_bytes):
                break
            self.drop(block.number)
        if not self._fits(num_bytes, len(self._blocks), self._num_bytes):
            return None  # what was dropped is still being read
        added = self._blocks[number] = Block[Sample](number, num_bytes, num_samples)
        self._change(num_bytes)
        return added

    def resize(self, block: Block[Sample], num_bytes: int) -> bool:
        """Say what a block truly takes, before that is allocated; whether there is room for it."""
        with self._lock:
            larger = num_bytes - block.num_bytes
            if larger > 0 and self._num_bytes + larger > self._max_bytes:
                return False
            self._num_bytes += larger
            block.num_bytes = num_bytes
            return True

    def keep(self, numbers: Collection[int]) -> None:
        """Drop all blocks but these, which from now on do not go for others."""
        self._kept = numbers
        for number in [number for number in self._blocks if number not in numbers]:
            self.drop(number)

    def drop(self, number: int) -> None:
        block = self._blocks.pop(number)
        block.samples.cancel()
        block.samples.add_done_callback(lambda _: self._change(-block.num_bytes))

    @property
    def may_get_free(self) -> bool:
        """Whether a block is here that `keep` did not name."""
        return any(number not in self._kept for number in self._blocks)

    def _stays(self, block: Block[Sample], needed: Mapping[int, int]) -> bool:
        return block.number in self._kept or needed.get(block.number, 0) > 0

    def _fits(self, num_bytes: int, num_blocks: int, num_bytes_used: int) -> bool:
        has_place = self._max_blocks is None or num_blocks < self._max_blocks
        return has_place and num_bytes_used + num_bytes <= self._max_bytes

    def _change(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes += num_bytes
