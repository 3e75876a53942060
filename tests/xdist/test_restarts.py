"""When a lost worker starts again, and when that is one fault too many."""

from __future__ import annotations

import pytest

from xdist.errors import RunFailed
from xdist.fault_history import FaultHistory
from xdist.topologies.restarts import LONGEST_WAIT_S, Restarts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def nowhere(_number: int) -> None:
    """Nobody has a place."""


def test_who_has_trained_starts_again_at_once() -> None:
    restarts = Restarts(Clock())
    for _ in range(3):
        restarts.add(1, has_trained=True, node="a")
        assert restarts.due(nowhere) == [1]
        assert restarts.due(nowhere) == []


def test_who_has_not_waits_twice_as_long_each_time_until_it_does() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    waits = []
    for _ in range(12):
        restarts.add(1, has_trained=False, node="a")
        began = clock.now
        while not restarts.due(lambda _number: "a"):
            assert restarts.waiting == {1: {"a"}}
            clock.now += 1
        assert not restarts.waiting
        waits.append(clock.now - began)
    assert waits[:5] == [0, 1, 3, 7, 15]
    assert waits[-1] == LONGEST_WAIT_S
    restarts.forget(1)
    restarts.add(1, has_trained=False, node="a")
    assert restarts.due(lambda _number: "a") == [1]


def test_who_failed_on_one_node_starts_on_another_at_once() -> None:
    places: dict[int, str] = {}
    restarts = Restarts(Clock())
    for _ in range(5):
        restarts.add(1, has_trained=False, node="a")
        restarts.due(lambda _number: "a")
    restarts.add(1, has_trained=False, node="a")
    restarts.add(2, has_trained=False, node="a")
    assert restarts.due(places.get) == []  # They have no place yet.
    assert restarts.waiting == {1: {"a"}, 2: {"a"}}
    places |= {1: "a", 2: "a"}
    assert restarts.due(places.get) == [2]
    places[1] = "b"
    assert restarts.due(places.get) == [1]


def test_whose_node_is_gone_does_not_wait() -> None:
    restarts = Restarts(Clock())
    for _ in range(5):
        restarts.add(1, has_trained=False, node=None)
        assert restarts.due(nowhere) == [1]


def test_all_workers_of_a_node_are_one_fault() -> None:
    history = FaultHistory(1, window_s=600)
    for number in range(8):
        history.add(f"worker {number}", "its node is gone")


def test_faults_that_follow_one_another_slowly_are_counted() -> None:
    clock = Clock()
    history = FaultHistory(2, window_s=60, clock=clock)
    for now in (0, 10, 70, 80):  # The first is forgotten by then.
        clock.now = now
        history.add("worker 0", "killed")
    clock.now = 90
    with pytest.raises(RunFailed, match=r"(?s)3 faults within 60 s .*20 s ago, worker 0: killed"):
        history.add("worker 0", "killed")


def test_the_message_that_ends_a_run_tells_of_the_last_losses_alone() -> None:
    clock = Clock()
    history = FaultHistory(1, window_s=600, clock=clock)
    for number in range(1000):
        history.add("link", f"number {number}")
    clock.now = 60
    with pytest.raises(RunFailed) as caught:
        history.add("link", "the last one")
    lines = str(caught.value).splitlines()
    assert len(lines) < 30
    assert "the last one" in lines[-2]
