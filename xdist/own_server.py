"""OwnServer: the server that leads, as it calls itself: without a message."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from xdist.background import Background
from xdist.checkpoint import Cut
from xdist.sequencer import Commit, PushId

if TYPE_CHECKING:
    from xdist.parameter_server import ParameterServer


class OwnServer:
    """Calls are made in order; what they return may be waited for, or not."""

    def __init__(self, server: ParameterServer) -> None:
        self._server = server
        # Who waits has what it raises, and what fails in the server ends the run.
        self._calls = Background(on_error=lambda _error: None)

    def tell_of_parting(self, _on_parting: Callable[[], None]) -> None:
        """It reaches itself."""

    def enter(self, term: int, lead: Any) -> Awaitable[int]:
        return self._calls.run(self._server.enter(term, lead))

    def staged(self, name: PushId) -> Awaitable[None]:
        return self._calls.run(self._server.staged(name))

    def apply(self, commit: Commit) -> Awaitable[None]:
        return self._calls.run(self._server.apply(commit))

    def drop(self, name: PushId, version: int) -> Awaitable[None]:
        return self._calls.run(self._server.drop(name, version))

    def forget(self, worker: int, token: int) -> Awaitable[None]:
        return self._calls.run(self._server.forget(worker, token))

    def forget_all(self, token: int) -> Awaitable[None]:
        return self._calls.run(self._server.forget_all(token))

    def keep(self, cut: Cut) -> Awaitable[None]:
        return self._calls.run(self._server.keep(cut))
