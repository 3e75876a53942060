"""Background: futures that run to their end whether or not anybody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class Background:
    """Refers to them until they are done: asyncio itself does so only weakly."""

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        """on_error: called with what one of them raises, whoever else waits for it."""
        self._on_error = on_error
        self._running: set[asyncio.Future[Any]] = set()

    def run(self, what: Awaitable[Any]) -> asyncio.Future[Any]:
        """Begin it; what is returned may be waited for, or not."""
        future = asyncio.ensure_future(what)
        self._running.add(future)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._running.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            self._on_error(error)
