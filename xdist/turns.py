"""Turns: the calls of one sender begin in the order in which they were made.

Ray starts the calls of an asyncio actor as they arrive, which may be in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdist.changes import Changes
from xdist.errors import PeerLost


@dataclass(frozen=True)
class Turn:
    """Which call."""

    sender: str
    number: int
    """Of the sender's calls, from 0."""


@dataclass
class _Sender:
    num_begun: int = 0
    """Of its calls."""
    is_over: bool = False


class Turns:
    """Whose turn it is, at the receiver's."""

    def __init__(self) -> None:
        self._senders: dict[str, _Sender] = {}
        self._changes = Changes()

    async def wait(self, turn: Turn) -> None:
        """Return once all earlier calls of the sender have begun. What follows up to the next
        `await` comes before the sender's next call. Raises `PeerLost` when the sender is not heard
        any more.
        """
        sender = self._senders.setdefault(turn.sender, _Sender())
        await self._changes.until(lambda: sender.is_over or sender.num_begun == turn.number)
        if sender.is_over:
            raise PeerLost.in_another_term()
        sender.num_begun += 1
        self._changes.tell()

    def hear_only(self, name: str | None) -> None:
        """All senders that there are but this one have nothing more to say: their calls that wait,
        as one before them was lost, end.
        """
        for other in self._senders.keys() - {name}:
            self._senders.pop(other).is_over = True
        self._changes.tell()
