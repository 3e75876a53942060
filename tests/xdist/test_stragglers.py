"""Whom a group waits for, and when that is said."""

from __future__ import annotations

import pytest

from datapipe.counters import ReadCounters
from xdist.stragglers import Straggler, StragglerLog, find_straggler, own_seconds
from xdist.strategies import Progress
from xdist.worker import WorkerReport


def report_of(worker: int, *, own_s: float, data_wait_s: float = 0.0) -> WorkerReport:
    """Ten steps of half a second, of which the worker itself needs `own_s` each."""
    return WorkerReport(
        worker=worker,
        progress=Progress(10, 10, 80, 0.5),
        num_steps=10,
        num_samples=80,
        loss=1.0,
        step_s=5.0,
        data_wait_s=data_wait_s,
        peer_wait_s=5.0 - 10 * own_s,
        read=ReadCounters(),
        staleness={},
        corrupt=(),
        parts=(),
        is_final=False,
        interrupted=None,
    )


def test_the_slowest_is_named_with_what_it_costs_and_what_it_waits_for() -> None:
    reports = [report_of(0, own_s=0.3), report_of(1, own_s=0.5, data_wait_s=2.0)]
    reports.append(report_of(2, own_s=0.31))
    found = find_straggler(reports)
    assert found is not None
    assert found.worker == 1
    assert found.cost_s == pytest.approx(0.5 - 0.305)
    assert found.data_wait_s == pytest.approx(0.2)
    assert own_seconds(reports[0]) == pytest.approx(0.3)


@pytest.mark.parametrize("own_s", [(0.3, 0.35), (0.001, 0.004), (0.4,)])
def test_small_differences_and_lone_workers_are_none(own_s: tuple[float, ...]) -> None:
    assert find_straggler([report_of(i, own_s=value) for i, value in enumerate(own_s)]) is None


def test_it_is_said_after_seconds_of_waiting_and_then_when_these_have_doubled() -> None:
    log = StragglerLog()
    slow = Straggler(3, own_s=0.3, usual_s=0.1, data_wait_s=0.0)
    said = [log.is_due(slow, num_steps=10) for _ in range(12)]  # Two seconds each.
    assert [number for number, is_due in enumerate(said, 1) if is_due] == [3, 6, 12]


def test_another_straggler_or_none_begins_anew() -> None:
    log = StragglerLog()
    slow = Straggler(3, own_s=0.3, usual_s=0.1, data_wait_s=0.0)
    other = Straggler(2, own_s=0.3, usual_s=0.1, data_wait_s=0.0)
    said = [log.is_due(found, num_steps=20) for found in (slow, other, slow, None, slow, slow)]
    assert said == [False, False, False, False, False, True]
