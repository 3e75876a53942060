"""Restarts: when a lost worker is started again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

LONGEST_WAIT_S = 600.0


class Restarts:
    """At once, if it had trained. One that was lost before it could, as on a bad node, waits twice
    as long each time, so that it neither holds up the others nor uses up the run's faults.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_failures: Counter[int] = Counter()
        self._due: dict[int, float] = {}

    def add(self, number: int, *, has_trained: bool) -> None:
        """The worker of this number is to start again."""
        wait_s = 0.0
        if not has_trained:
            wait_s = min(2.0 ** self._num_failures[number] - 1, LONGEST_WAIT_S)
            self._num_failures[number] += 1
        self._due[number] = self._clock() + wait_s

    def forget(self, number: int) -> None:
        """The worker of this number does well."""
        self._num_failures.pop(number, None)

    @property
    def waiting(self) -> frozenset[int]:
        """The workers whose time has not come."""
        return frozenset(self._due)

    def due(self) -> list[int]:
        """Whose time has come; each is told once."""
        now = self._clock()
        due = [number for number, at in self._due.items() if at <= now]
        for number in due:
            del self._due[number]
        return due
