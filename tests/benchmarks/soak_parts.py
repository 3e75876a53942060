"""What the two runs of `tests.benchmarks.soak` share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from xdist.topologies import Outcome, RunPlan

MIB = 1 << 20


class TimeIsUp(Exception):
    """The run has lasted as long as it was to."""


class Ending:
    """A topology that ends its run after a while."""

    def __init__(self, plan: RunPlan, *, make: Any, deadline: float) -> None:
        self._topology = make(plan)
        self._deadline = deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def watch(self) -> Outcome:
        if time.monotonic() > self._deadline:
            raise TimeIsUp
        outcome: Outcome = self._topology.watch()
        return outcome


def resident_mib(process: int) -> float:
    """Resident memory of a process that is alive; 0 of one that is not."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB
