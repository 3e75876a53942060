"""Answers: what workers get for the pushes that they wait for on a server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from xdist.sequencer import PushId
from xdist.server_messages import Reply


@dataclass(frozen=True)
class _Waiting:
    outcome: asyncio.Future[Reply]
    wants_weights: bool


class Answers:
    """Each push is answered once: with the weights after it, whether it is in them or was dropped,
    or with an error.
    """

    def __init__(self) -> None:
        self._waiting: dict[PushId, _Waiting] = {}

    def __contains__(self, name: PushId) -> bool:
        return name in self._waiting

    def wait_for(self, name: PushId, *, wants_weights: bool) -> asyncio.Future[Reply]:
        """What comes of a push. wants_weights: its worker does not see them in memory."""
        outcome: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[name] = _Waiting(outcome, wants_weights)
        return outcome

    def want_weights(self, names: Iterable[PushId]) -> list[PushId]:
        """Those of these pushes whose workers wait for weights."""
        return [name for name in names if name in self and self._waiting[name].wants_weights]

    def give(self, name: PushId, reply: Reply) -> None:
        """Answer, if somebody waits."""
        waiting = self._waiting.pop(name, None)
        if waiting is not None and not waiting.outcome.done():
            waiting.outcome.set_result(reply)

    def refuse(self, error: Exception, *, worker: int | None, below_token: float) -> None:
        """Raise this for the pushes of this worker, or of all, with a token below that one."""
        refused = [
            name
            for name in self._waiting
            if name.token < below_token and worker in (None, name.worker)
        ]
        for name in refused:
            outcome = self._waiting.pop(name).outcome
            if not outcome.done():
                outcome.set_exception(error)
