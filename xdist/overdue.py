"""Overdue: for how long a run has had something to save that is not saved."""

from __future__ import annotations

import time
from collections.abc import Callable

from xdist.errors import RunDirectoryError


class Overdue:
    """A run goes on meanwhile, but not for ever: all that it trains might be lost. It counts from
    the first checkpoint that was begun since the last one that is there.
    """

    def __init__(self, max_age_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_age_s = max_age_s
        self._clock = clock
        self._since: float | None = None
        self._why = "it takes very long"

    def refused(self, why: str) -> None:
        """The storage has said so."""
        self._why = why
        self.see(is_saving=True)

    def saved(self) -> None:
        """A checkpoint is there, or was read."""
        self._since = None

    def see(self, *, is_saving: bool) -> None:
        """Whether one is on its way. It may be given up for another one."""
        if is_saving and self._since is None:
            self._since = self._clock()

    @property
    def failure(self) -> RunDirectoryError | None:
        """What the run is to end with, where it has been so for too long."""
        age_s = 0.0 if self._since is None else self._clock() - self._since
        if age_s <= self._max_age_s:
            return None
        return RunDirectoryError(
            f"no checkpoint could be saved for {age_s:.0f} s, and checkpoint.max_age_s is "
            f"{self._max_age_s:g}: {self._why}; mend the storage, and the same command resumes "
            "from the last checkpoint"
        )
