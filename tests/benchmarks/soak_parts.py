"""What the two runs of `tests.benchmarks.soak` share."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from xdist.topologies import Outcome, RunPlan

MIB = 1 << 20
SETTLED = 1 / 4
"""Of a run: its processes have then done everything at least once."""
FEWEST = 20
"""Measurements that show a growth: in fewer, one that is off is too much of it."""
GROWTH_LIMITS = {"driver": 120.0}
GROWTH_LIMIT = 75.0
"""MiB an hour that a process may grow by, and shared memory: more would be a leak. Of the driver:
what Ray keeps of each actor that was killed.
"""


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


def shared_mib() -> float:
    """Shared memory of this machine, and what is in its temporary file systems."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith("Shmem:")]
    return int(kib) / 1024


class Memory:
    """What processes had over a run, by their role."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seen: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def note(self, role: str, processes: list[int]) -> None:
        """The largest of them, now."""
        self._note(role, max(map(resident_mib, processes)))

    def note_shared(self) -> None:
        """All shared memory of this machine, now: that of Ray's objects too."""
        self._note("shared", shared_mib())

    def _note(self, role: str, size_mib: float) -> None:
        hours = (time.monotonic() - self._started) / 3600
        self._seen[role].append((hours, size_mib))

    def figures(self) -> dict[str, float]:
        """First, last and most MiB of each role, and how fast it grew once the run had settled.
        Raises `AssertionError` where that is a leak.
        """
        found = {}
        for role, seen in sorted(self._seen.items()):
            sizes = [size for _, size in seen]
            found[f"{role}_mib_first"] = round(sizes[0], 1)
            found[f"{role}_mib_last"] = round(sizes[-1], 1)
            found[f"{role}_mib_max"] = round(max(sizes), 1)
            settled = seen[int(SETTLED * len(seen)) :]
            if len(settled) < FEWEST:
                continue
            growth = statistics.linear_regression(*zip(*settled, strict=True)).slope
            found[f"{role}_mib_growth_an_hour"] = round(growth, 1)
            limit = GROWTH_LIMITS.get(role, GROWTH_LIMIT)
            assert growth < limit, f"{role} grows by {growth:.0f} MiB an hour: {found}"
        return found
