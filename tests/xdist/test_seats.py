"""Who sits where in the next group."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from xdist.topologies.seats import Seat, reseat, senders, with_lanes

THREE = (Seat(10, (0, 1)), Seat(11, (2, 3)), Seat(12, (4, 5)))


def test_who_joins_takes_the_place_and_the_lanes_of_who_is_lost() -> None:
    seats = reseat(THREE, present={10, 12}, joining=[20], most=3)
    assert seats == (Seat(10, (0, 1)), Seat(20, (2, 3)), Seat(12, (4, 5)))
    assert with_lanes(seats, num_lanes=6, dealt_anew=False) == seats


def test_who_is_lost_leaves_its_lanes_to_the_others() -> None:
    seats = reseat(THREE, present={10, 12}, joining=[], most=3)
    assert seats == (Seat(10, (0, 1)), Seat(12, (4, 5)))
    lanes = with_lanes(seats, num_lanes=6, dealt_anew=False)
    assert [seat.lanes for seat in lanes] == [(0, 1, 2), (3, 4, 5)]


def test_further_ones_come_last_and_no_more_than_there_may_be() -> None:
    seats = reseat(THREE, present={10, 11, 12}, joining=[20, 21], most=4)
    assert [seat.life for seat in seats] == [10, 11, 12, 20]
    lanes = with_lanes(seats, num_lanes=6, dealt_anew=False)
    assert sorted(len(seat.lanes) for seat in lanes) == [1, 1, 2, 2]
    assert lanes[2].lanes == (4, 5)


def test_lanes_dealt_anew_are_contiguous() -> None:
    seats = with_lanes(THREE[:2], num_lanes=4, dealt_anew=True)
    assert seats == (Seat(10, (0, 1)), Seat(11, (2, 3)))


@given(st.sets(st.sampled_from([10, 11, 12])), st.integers(0, 4), st.integers(1, 5))
def test_everybody_present_keeps_the_order_and_nobody_sits_twice(
    present: set[int], num_joining: int, most: int
) -> None:
    joining = list(range(20, 20 + num_joining))
    lives = [seat.life for seat in reseat(THREE, present=present, joining=joining, most=most)]
    assert [life for life in lives if life in present] == sorted(present)
    assert len(set(lives)) == len(lives) == max(len(present), min(most, len(present) + num_joining))


@given(st.lists(st.sampled_from([None, 6, 7]), min_size=1))
def test_all_who_lack_the_newest_state_get_it_from_who_has_it_then(steps: list[int | None]) -> None:
    steps = [*steps, 7]
    to_whom = senders(steps, newest=7)
    assert set(to_whom) == {rank for rank, step in enumerate(steps) if step != 7}
    have = {rank for rank, step in enumerate(steps) if step == 7}
    num_rounds, num_having = 0, len(have)
    left = dict(to_whom)
    while left:  # Each sends to one at a time, in order, as soon as it has it itself.
        now = {sender: receiver for receiver, sender in reversed(left.items()) if sender in have}
        have |= set(now.values())
        left = {receiver: sender for receiver, sender in left.items() if receiver not in have}
        num_rounds += 1
    assert num_rounds == math.ceil(math.log2(len(steps) / num_having))
