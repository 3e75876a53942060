"""FaultHistory: what failed in a run, and when that is too much."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable

from xdist.errors import RunFailed

logger = logging.getLogger(__name__)


EVENT_S = 5.0
"""Losses that follow one another within this time are one fault: a node takes all its workers with
it.
"""
MOST_TOLD = 20
"""Losses in the message that ends a run."""


class FaultHistory:
    """What failed in a run so far, within its budget."""

    def __init__(
        self, allowed: int, *, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._allowed = allowed
        self._window_s = window_s
        self._faults: deque[tuple[float, str]] = deque()

    def add(self, actor: str, cause: str) -> None:
        """Count a fault. Raises `RunFailed`, with the history, when the budget is spent."""
        now = self._clock()
        self._faults.append((now, f"{actor}: {cause}"))
        while self._faults[0][0] < now - self._window_s:
            self._faults.popleft()
        number, allowed = self._num_events(), self._allowed
        logger.warning("%s lost recoveries=%d allowed=%d cause=%s", actor, number, allowed, cause)
        if number > allowed:
            told = list(self._faults)[-MOST_TOLD:]
            history = "\n  ".join(f"{now - at:.0f} s ago, {line}" for at, line in told)
            raise RunFailed(
                f"{number} faults within {self._window_s:g} s (cluster.recovery_window_s), "
                f"cluster.max_recoveries allows {allowed} "
                f"(losses within {EVENT_S:g} s count once); the last {len(told)}:\n  {history}"
                "\nthe same command resumes from the last checkpoint"
            )

    def _num_events(self) -> int:
        number, began = 0, -math.inf
        for at, _ in self._faults:
            if at - began > EVENT_S:
                number, began = number + 1, at
        return number
