"""Alarm: what the driver is to know of a parameter server at once: that something in it failed, or
that it did not reach another server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from xdist.changes import Changes


class Alarm:
    """The driver waits for it; what there is to know is kept until it does."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._parted_in: int | None = None
        self._changes = Changes()

    def failed(self, error: BaseException) -> None:
        """Something failed that nobody waited for, or not everybody who has to know."""
        self._error = self._error or error
        self._changes.tell()

    @contextmanager
    def on_failure(self) -> Iterator[None]:
        """What fails within is for whoever waits for it, and for the driver."""
        try:
            yield
        except BaseException as error:
            self.failed(error)
            raise

    def parted(self, term: int) -> None:
        """In this term another server was not reached."""
        self._parted_in = term
        self._changes.tell()

    async def term_of_parting(self) -> int:
        """The term in which another server was not reached, as soon as there is one; once. Raises
        `RuntimeError` when something has failed.
        """
        await self._changes.until(lambda: self._error is not None or self._parted_in is not None)
        if self._error is not None:
            raise RuntimeError(f"a parameter server failed: {self._error!r}") from self._error
        parted_in, self._parted_in = self._parted_in, None
        assert parted_in is not None
        return parted_in
