"""Beside: calls that are made one after the other beside the program, and hold up no end of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class Beside:
    """One thread. That of an executor would be waited for when the program ends, also where what it
    is at never comes back, as a storage that hangs.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Have it called, after those before it."""
        future: Future[Result] = Future()
        self._calls.put((future, call))
        return future

    def _run(self) -> None:
        while (next_call := self._calls.get()) is not None:
            future, call = next_call
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whoever asks for the result raises it
                future.set_exception(error)

    def close(self, wait_s: float | None = None) -> bool:
        """Return when all calls are made, or after so long: whether they are. None is taken any
        more.
        """
        self._calls.put(None)
        self._thread.join(wait_s)
        return not self._thread.is_alive()
