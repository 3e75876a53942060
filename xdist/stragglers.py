"""Stragglers: which worker of a group the others wait for, and what that costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from xdist.worker_messages import WorkerReport

SLOW = 1.2
"""Times the median of the others: slower is a straggler."""
NOTICEABLE_S = 0.005
"""A step: less is noise."""
FIRST_SAID_AFTER_S = 5.0
"""That others waited for the same worker, report after report, before it is named in the log; once
more whenever that has doubled.
"""


@dataclass(frozen=True)
class Straggler:
    """A worker that all others wait for."""

    worker: int
    host: str
    """The name of its machine."""
    own_s: float
    """Seconds of a step that it needs for its own part: data, forward, backward, update."""
    usual_s: float
    """The median of the others."""
    data_wait_s: float
    """Seconds of `own_s` that it waits for data."""

    @property
    def cost_s(self) -> float:
        """What each step takes longer."""
        return self.own_s - self.usual_s


def own_seconds(report: WorkerReport) -> float:
    """Seconds of a step that a worker needs for its own part."""
    return (report.step_s - report.peer_wait_s) / max(1, report.num_steps)


def find_straggler(reports: Sequence[WorkerReport]) -> Straggler | None:
    """The slowest of the ranks of a group, if it is much slower than the others would be with as
    many images as it has: ranks may have one lane more than others.
    """
    if len(reports) < 2 or min(report.num_images for report in reports) == 0:
        return None
    slowest = max(reports, key=_seconds_per_image)
    others = [_seconds_per_image(report) for report in reports if report is not slowest]
    usual_s = statistics.median(others) * slowest.num_images / slowest.num_steps
    own_s = own_seconds(slowest)
    if own_s < SLOW * usual_s or own_s - usual_s < NOTICEABLE_S:
        return None
    data_wait_s = slowest.data_wait_s / slowest.num_steps
    return Straggler(slowest.worker, slowest.host, own_s, usual_s, data_wait_s)


def _seconds_per_image(report: WorkerReport) -> float:
    return own_seconds(report) * report.num_steps / report.num_images


class StragglerLog:
    """Decides when a straggler is worth a line."""

    def __init__(self) -> None:
        self._worker: int | None = None
        self._waited_s = 0.0
        self._next_s = FIRST_SAID_AFTER_S

    def is_due(self, found: Straggler | None, *, num_steps: int) -> bool:
        """Whether to name it, after one more report about so many steps."""
        if found is None or found.worker != self._worker:
            self._worker = None if found is None else found.worker
            self._waited_s, self._next_s = 0.0, FIRST_SAID_AFTER_S
        if found is None:
            return False
        self._waited_s += found.cost_s * num_steps
        if self._waited_s < self._next_s:
            return False
        self._next_s = 2 * self._waited_s
        return True
