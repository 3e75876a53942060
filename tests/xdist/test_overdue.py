"""How long a run goes on that cannot save."""

from __future__ import annotations

import pytest

from xdist.overdue import Overdue


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_it_counts_from_the_first_refusal_until_something_is_saved(clock: Clock) -> None:
    overdue = Overdue(60, clock=clock)
    for _ in range(4):
        overdue.refused("the disk is full")
        assert overdue.failure is None
        clock.time += 20
    assert overdue.failure is not None
    assert "80 s" in str(overdue.failure)
    assert "the disk is full" in str(overdue.failure)
    overdue.saved()
    clock.time += 100
    assert overdue.failure is None


def test_what_is_on_its_way_counts_too_also_where_one_is_given_up_for_another(
    clock: Clock,
) -> None:
    overdue = Overdue(60, clock=clock)
    for is_saving in (True, False, True):
        overdue.see(is_saving=is_saving)
        clock.time += 20
    assert overdue.failure is None
    clock.time += 1
    assert overdue.failure is not None
    overdue.saved()
    assert overdue.failure is None


def test_a_long_time_without_anything_to_save_is_none(clock: Clock) -> None:
    overdue = Overdue(60, clock=clock)
    clock.time += 100_000
    overdue.see(is_saving=False)
    assert overdue.failure is None
