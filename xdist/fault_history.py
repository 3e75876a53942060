"""FaultHistory: what failed in a run, and when that is too much."""

from __future__ import annotations

import logging
import time
from collections import deque

from xdist.errors import RunFailed

logger = logging.getLogger(__name__)


class FaultHistory:
    """What failed in a run so far, within its budget."""

    def __init__(self, allowed: int, *, window_s: float) -> None:
        self._allowed = allowed
        self._window_s = window_s
        self._faults: deque[tuple[float, str]] = deque()

    def add(self, actor: str, cause: str) -> None:
        """Count a fault. Raises `RunFailed`, with the history, when the budget is spent."""
        now = time.monotonic()
        self._faults.append((now, f"{actor}: {cause}"))
        while self._faults[0][0] < now - self._window_s:
            self._faults.popleft()
        number, allowed = len(self._faults), self._allowed
        logger.warning("%s lost recoveries=%d allowed=%d cause=%s", actor, number, allowed, cause)
        if number > allowed:
            history = "\n  ".join(f"{now - at:.0f} s ago, {line}" for at, line in self._faults)
            raise RunFailed(
                f"{number} faults within {self._window_s:g} s (cluster.recovery_window_s), "
                f"cluster.max_recoveries allows {allowed}:\n  {history}"
                "\nthe same command resumes from the last checkpoint"
            )
