"""OwnServer: the server that leads, as it calls itself: without a message."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from xdist.checkpoint import Cut
from xdist.sequencer import Commit, PushId

if TYPE_CHECKING:
    from xdist.parameter_server import ParameterServer


class OwnServer:
    """Calls are made in order; what they return may be waited for, or not."""

    def __init__(self, server: ParameterServer) -> None:
        self._server = server
        self._tasks: set[asyncio.Task[Any]] = set()

    def tell_of_parting(self, _on_parting: Callable[[], None]) -> None:
        """It reaches itself."""

    def enter(self, term: int, lead: Any) -> Awaitable[int]:
        return self._call(self._server.enter(term, lead))

    def staged(self, name: PushId) -> Awaitable[None]:
        return self._call(self._server.staged(name))

    def apply(self, commit: Commit) -> Awaitable[None]:
        return self._call(self._server.apply(commit))

    def drop(self, name: PushId, version: int) -> Awaitable[None]:
        return self._call(self._server.drop(name, version))

    def forget(self, worker: int, token: int) -> Awaitable[None]:
        return self._call(self._server.forget(worker, token))

    def forget_all(self, token: int) -> Awaitable[None]:
        return self._call(self._server.forget_all(token))

    def keep(self, cut: Cut) -> Awaitable[None]:
        return self._call(self._server.keep(cut))

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Who waits has it, and what a commit raises ends the run.
