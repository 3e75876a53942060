"""Changes: coroutines that wait for something to hold, and are woken whenever anything changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Changes:
    """As `asyncio.Condition`, but whoever changes something need not wait for a lock to say so."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it holds; it is asked again at each change."""
        while not holds():
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    def tell(self) -> None:
        """Something has changed."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
