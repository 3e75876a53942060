"""Overdue: for how long a run has had something to save that its storage does not take."""

from __future__ import annotations

import time
from collections.abc import Callable

from xdist.errors import RunDirectoryError


class Overdue:
    """A run goes on meanwhile, but not for ever: all that it trains might be lost."""

    def __init__(self, max_age_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_age_s = max_age_s
        self._clock = clock
        self._refused: float | None = None
        """Since when, unless something was saved after it."""
        self._saving: float | None = None
        """Since when something has been on its way all the time."""
        self._why = "it takes very long"

    def refused(self, why: str) -> None:
        """The storage has said so."""
        self._refused = self._refused or self._clock()
        self._why = why

    def saved(self) -> None:
        """A checkpoint is there, or was read."""
        self._refused = self._saving = None

    def see(self, *, is_saving: bool) -> None:
        """Whether something is on its way."""
        self._saving = (self._saving or self._clock()) if is_saving else None

    @property
    def failure(self) -> RunDirectoryError | None:
        """What the run is to end with, where it has been so for too long."""
        times = [since for since in (self._refused, self._saving) if since is not None]
        age_s = self._clock() - min(times, default=self._clock())
        if age_s <= self._max_age_s:
            return None
        return RunDirectoryError(
            f"no checkpoint could be saved for {age_s:.0f} s, and checkpoint.max_age_s is "
            f"{self._max_age_s:g}: {self._why}; mend the storage, and the same command resumes "
            "from the last checkpoint"
        )
