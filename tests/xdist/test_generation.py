"""Whom a group that parted is without from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdist.strategies.group import Rendezvous
from xdist.topologies.crew import Hand
from xdist.topologies.generation import Generation, cut_off
from xdist.topologies.seats import Seat
from xdist.worker_messages import Parting

NOTHING = cast(Any, None)


def hands(*, steps: Sequence[int | None], new: Sequence[int] = ()) -> list[Hand]:
    """Workers with lives 1, 2, and so on; new: the numbers of those that have not trained."""
    return [
        Hand(number, number + 1, NOTHING, "idle", step, has_trained=number not in new)
        for number, step in enumerate(steps)
    ]


def generation(num_ranks: int, *, step: int, how: Any = "join") -> Generation:
    seats = tuple(Seat(life) for life in range(1, num_ranks + 1))
    return Generation(Rendezvous("", 0, 1), NOTHING, seats, step, round=how)


def blamed(
    group: Generation, present: Sequence[Hand], unreached: Mapping[int, tuple[int, ...]]
) -> list[str]:
    """unreached: rank -> ranks, in the order in which they complain."""
    for rank, ranks in unreached.items():
        group.complain(present[rank], Parting("no answer", ranks))
    return [fault.task.actor for fault in group.unexplained(present)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_who_is_cut_off_is_lost_whoever_complains_first(order: tuple[int, ...]) -> None:
    """While they train the link may be up again by the next group; then it is not."""
    present = hands(steps=[9, 9, 9])
    unreached = {0: (1,), 1: (0, 2), 2: (1,)}
    said = {rank: unreached[rank] for rank in order}
    trained = generation(3, step=7, how="train")
    assert blamed(trained, present, said) == ["link"]
    assert blamed(generation(3, step=9), present, said) == ["worker 1"]


def test_of_two_that_do_not_reach_each_other_the_one_without_the_newest_state_is_lost() -> None:
    present = hands(steps=[9, 10])
    assert blamed(generation(2, step=10), present, {0: (1,), 1: (0,)}) == ["worker 0"]


def test_one_who_is_new_is_lost_at_once() -> None:
    present = hands(steps=[9, 9, None], new=[2])
    assert blamed(generation(3, step=9), present, {0: (2,)}) == ["worker 2"]
    assert blamed(generation(3, step=9), present, {0: (), 1: ()}) == ["worker 2"]


def test_one_who_is_new_is_not_blamed_for_a_link_between_others() -> None:
    present = hands(steps=[9, 9, 9, None], new=[3])
    said = {0: (1,), 1: (0, 2), 2: (1,), 3: (1,)}
    assert blamed(generation(4, step=9), present, said) == ["worker 1"]


def test_where_all_links_are_up_the_first_to_complain_is_lost_the_second_time() -> None:
    present = hands(steps=[9, 9, 9])
    first = generation(3, step=9)
    assert blamed(first, present, {2: (), 0: ()}) == ["link"]
    second = first.next(first.seats, NOTHING, step=9)
    assert blamed(second, present, {2: (), 0: ()}) == ["worker 2"]


def test_a_step_between_two_complaints_begins_anew() -> None:
    group = generation(2, step=8, how="train")
    for _ in range(3):
        assert blamed(group, hands(steps=[9, 9]), {0: ()}) == ["link"]
        group = group.next(group.seats, NOTHING, step=8)


def test_where_one_is_gone_nobody_else_is_at_fault() -> None:
    group = generation(3, step=9)
    group.has_lost = True
    assert blamed(group, hands(steps=[9, 9]), {0: (2,), 1: (2,)}) == []


def test_the_smaller_side_of_a_network_that_parted_is_cut_off() -> None:
    links = {frozenset((left, right)) for left in (1, 2) for right in (3, 4, 5)}
    assert cut_off(links, order=[5, 4, 3, 2, 1]) == {1, 2}


def test_links_to_who_is_gone_are_nobodys() -> None:
    assert cut_off({frozenset((1, 9))}, order=[1, 2]) == frozenset()


@given(st.sets(st.frozensets(st.integers(1, 6), min_size=2, max_size=2)))
def test_no_link_that_is_down_is_left(links: set[frozenset[int]]) -> None:
    found = cut_off(links, order=range(1, 7))
    assert all(link & found for link in links)
    assert not found or any(links)
