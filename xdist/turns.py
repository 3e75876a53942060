"""Turns: the calls of one sender begin in the order in which they were made.

Ray starts the calls of an asyncio actor as they arrive, which may be in any order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from xdist.changes import Changes


@dataclass(frozen=True)
class Turn:
    """Which call."""

    sender: str
    number: int
    """Of the sender's calls, from 0."""


class Turns:
    """Whose turn it is, at the receiver's."""

    def __init__(self) -> None:
        self._num_begun: Counter[str] = Counter()
        self._changes = Changes()

    async def wait(self, turn: Turn) -> None:
        """Return once all earlier calls of the sender have begun. What follows up to the next
        `await` comes before the sender's next call.
        """
        await self._changes.until(lambda: self._num_begun[turn.sender] == turn.number)
        self._num_begun[turn.sender] += 1
        self._changes.tell()
