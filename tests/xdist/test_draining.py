"""Who leaves a node that is about to go, and who has to come first."""

from __future__ import annotations

from typing import Any

import pytest

from xdist.topologies.crew import Hand
from xdist.topologies.draining import leaving, num_to_come_first
from xdist.topologies.nodes import Process

NO_ACTOR: Any = None
GOING = frozenset({"going"})


def hand(number: int, node: str | None, *, step: int | None = 7) -> Hand:
    process = None if node is None else Process(node, number, "host")
    return Hand(number, number + 1, NO_ACTOR, "busy", step, process=process)


def numbers(seated: list[Hand], *, num_joining: int = 0, fewest: int = 1) -> list[int]:
    found = leaving(seated, GOING, num_joining=num_joining, fewest=fewest)
    return [hand.number for hand in found]


def test_as_many_leave_as_need_not_stay() -> None:
    seated = [hand(0, "going"), hand(1, "staying"), hand(2, "going")]
    assert numbers(seated) == [0, 2]
    assert numbers(seated, fewest=2) == [0]
    assert numbers(seated, fewest=3) == []
    assert numbers(seated, fewest=3, num_joining=1) == [0]
    assert numbers(seated, fewest=3, num_joining=5) == [0, 2]


def test_the_last_one_with_the_state_stays_until_another_has_it() -> None:
    old, new = hand(0, "going"), hand(1, "staying", step=None)
    assert numbers([old]) == []
    assert numbers([old], num_joining=1) == []
    assert numbers([old, new]) == []
    new.step = 8
    assert numbers([old, new]) == [0]


def test_who_alone_has_the_newest_state_stays_until_another_has_it() -> None:
    """It made the last update, of which the others had sent it their share, and they did not."""
    ahead, behind = hand(0, "going", step=8), hand(1, "staying")
    assert numbers([behind, ahead]) == []
    assert numbers([hand(2, "going"), behind, ahead]) == [2]
    assert numbers([hand(2, "going"), ahead]) == [2]
    behind.step = 8
    assert numbers([behind, ahead]) == [0]


@pytest.mark.parametrize("fewest", [1, 2])
def test_who_cannot_leave_has_a_successor_and_only_one(fewest: int) -> None:
    seated = [hand(0, "going"), hand(1, "going")]
    others: list[Hand] = []
    for expected in (fewest, fewest - 1, 0, 0):
        can_leave = leaving(seated, GOING, num_joining=0, fewest=fewest)
        count = num_to_come_first([*seated, *others], seated, can_leave, GOING)
        assert count == max(0, expected)
        others.append(hand(2 + len(others), None, step=None))  # It starts: nobody knows where.
