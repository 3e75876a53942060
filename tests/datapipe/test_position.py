"""Position: exactly once, normalised, and JSON that is checked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.position import Position, Span


@st.composite
def positions_with_places(draw: st.DrawFn) -> tuple[int, set[int], Position]:
    """(samples an epoch, places done counted from training's start, the position of those)."""
    num_samples = draw(st.integers(1, 12))
    places = draw(st.sets(st.integers(0, 4 * num_samples - 1)))
    position = Position()
    for place in draw(st.permutations(sorted(places))):
        epoch, start = divmod(place, num_samples)
        position = position.with_done([Span(epoch, start, start + 1)], num_samples=num_samples)
    return num_samples, places, position


@given(positions_with_places())
def test_what_is_not_done_remains_whatever_the_order_of_work(
    drawn: tuple[int, set[int], Position],
) -> None:
    num_samples, places, position = drawn
    remaining = {
        epoch * num_samples + place
        for epoch in range(4)
        for span in position.remaining(epoch, num_samples=num_samples)
        for place in range(span.start, span.stop)
    }
    assert remaining == set(range(4 * num_samples)) - places
    assert position.num_seen(num_samples) == len(places)


@given(positions_with_places())
def test_done_intervals_are_sorted_apart_and_begin_in_an_unfinished_epoch(
    drawn: tuple[int, set[int], Position],
) -> None:
    num_samples, _, position = drawn
    edges = [edge for interval in position.done for edge in interval]
    assert edges == sorted(set(edges))
    assert not position.done or position.done[0] != (0, num_samples)
    assert position.remaining(position.epoch, num_samples=num_samples)


@given(positions_with_places())
def test_a_place_cannot_be_done_twice(drawn: tuple[int, set[int], Position]) -> None:
    num_samples, places, position = drawn
    for place in places:
        epoch, start = divmod(place, num_samples)
        with pytest.raises(ValueError, match="done before"):
            position.with_done([Span(epoch, start, start + 1)], num_samples=num_samples)


@given(positions_with_places())
def test_json_round_trip(drawn: tuple[int, set[int], Position]) -> None:
    position = drawn[2]
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position


def test_finishing_an_epoch_moves_on_and_keeps_what_is_done_beyond_it() -> None:
    position = Position(epoch=2, done=((4, 12),)).with_done([Span(2, 0, 4)], num_samples=10)
    assert position == Position(epoch=3, done=((0, 2),))


def test_a_span_outside_the_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="outside an epoch of 10 samples"):
        Position().with_done([Span(0, 5, 11)], num_samples=10)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"epoch": 0},
        {"epoch": -1, "done": []},
        {"epoch": True, "done": []},
        {"epoch": 0, "done": [[3, 3]]},
        {"epoch": 0, "done": [[0, 3], [3, 5]]},
        {"epoch": 0, "done": [[4, 6], [0, 3]]},
        {"epoch": 0, "done": [[0, 1.5]]},
    ],
)
def test_a_malformed_position_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"position is .*allowed"):
        Position.from_json(value)
