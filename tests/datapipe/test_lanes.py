"""Lanes: equal parts, every place once, the same places after a resume."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.lanes import LanePlan, LaneWalk, assign_lanes, even_part, move_lanes
from datapipe.position import Position, Span


@st.composite
def plans(draw: st.DrawFn) -> LanePlan:
    """A plan from some position, in whose epoch some places are done."""
    num_samples = draw(st.integers(1, 80))
    position = Position(epoch=draw(st.integers(0, 2)))
    places = draw(st.sets(st.integers(0, 2 * num_samples - 1), max_size=num_samples))
    spans = [
        Span(position.epoch + place // num_samples, place % num_samples, place % num_samples + 1)
        for place in places
    ]
    return LanePlan(
        position=position.with_done(spans, num_samples=num_samples),
        num_samples=num_samples,
        num_lanes=draw(st.integers(1, 9)),
        samples_per_lane=draw(st.integers(1, 5)),
    )


def all_places(plan: LanePlan, *, lane: int) -> list[int]:
    return [
        place
        for step in range(plan.num_steps)
        for span in plan.spans(step, lane)
        for place in range(span.start, span.stop)
    ]


@given(plans())
def test_lanes_hold_what_remains_once_in_order_and_equal_within_one(plan: LanePlan) -> None:
    lanes = [all_places(plan, lane=lane) for lane in range(plan.num_lanes)]
    remaining = plan.position.remaining(plan.position.epoch, num_samples=plan.num_samples)
    expected = [place for span in remaining for place in range(span.start, span.stop)]
    assert [place for lane in lanes for place in lane] == expected
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


@given(plans())
def test_every_step_takes_the_same_number_from_each_lane_but_at_its_end(plan: LanePlan) -> None:
    for lane in range(plan.num_lanes):
        sizes = [
            sum(span.num_samples for span in plan.spans(step, lane))
            for step in range(plan.num_steps)
        ]
        full = sizes.count(plan.samples_per_lane)
        assert sizes[:full] == [plan.samples_per_lane] * full
        assert sum(1 for size in sizes[full:] if size) <= 1


@given(plans())
def test_what_follows_a_step_is_how_its_lane_goes_on(plan: LanePlan) -> None:
    for lane in range(plan.num_lanes):
        rest = all_places(plan, lane=lane)
        for step in range(plan.num_steps):
            rest = rest[plan.samples_per_lane :]
            following = plan.following(step, lane)
            places = [] if following is None else list(range(following.start, following.stop))
            assert places == rest[: len(places)]
            assert bool(places) == bool(rest)
            assert places == rest or rest[len(places)] > places[-1] + 1


@given(plans(), st.data())
def test_a_plan_made_anew_at_any_step_continues_with_the_same_places(
    plan: LanePlan, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, plan.num_steps - 1))
    resumed = LanePlan(
        plan.position_after(step), plan.num_samples, plan.num_lanes, plan.samples_per_lane
    )
    assert resumed.num_steps == plan.num_steps - step
    for lane in range(plan.num_lanes):
        for later in range(resumed.num_steps):
            assert resumed.spans(later, lane) == plan.spans(step + later, lane)


@given(plans())
def test_after_the_last_step_the_next_epoch_begins(plan: LanePlan) -> None:
    assert plan.position_after(plan.num_steps).epoch > plan.position.epoch


@given(plans(), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), max_size=4))
def test_every_place_once_when_lanes_and_batch_change_in_the_middle(
    plan: LanePlan, changes: list[tuple[int, int]]
) -> None:
    position = plan.position
    for num_lanes, samples_per_lane in changes:
        if position.epoch != plan.position.epoch:
            break
        step = LanePlan(position, plan.num_samples, num_lanes, samples_per_lane)
        position = step.position_after(1)  # with_done refuses a place that is done twice
    if position.epoch == plan.position.epoch:
        rest = LanePlan(position, plan.num_samples, plan.num_lanes, plan.samples_per_lane)
        position = rest.position_after(rest.num_steps)
    assert position == plan.position_after(plan.num_steps)


@given(st.integers(1, 40), st.data())
def test_ranks_own_every_lane_once_and_equal_within_one(
    num_lanes: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, num_lanes))
    lanes = assign_lanes(num_lanes, world_size)
    assert [lane for owned in lanes for lane in owned] == list(range(num_lanes))
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


def test_ranks_beyond_the_lanes_have_none_and_there_is_at_least_one_rank() -> None:
    assert assign_lanes(2, 4) == ((0,), (1,), (), ())
    with pytest.raises(ValueError, match="world_size is 0; allowed: at least 1"):
        assign_lanes(4, 0)


def test_parts_of_a_whole() -> None:
    assert [even_part(10, num_parts=3, part=part) for part in range(3)] == [(0, 4), (4, 7), (7, 10)]
    with pytest.raises(ValueError, match="num_lanes is 0; allowed: at least 1"):
        LanePlan(Position(), 10, 0, 1)


@given(plans())
def test_the_places_of_a_step_are_those_of_its_lanes(plan: LanePlan) -> None:
    for step in range(plan.num_steps + 1):
        lanes = (plan.spans(step, lane) for lane in range(plan.num_lanes))
        places = sum(span.num_samples for spans in lanes for span in spans)
        assert plan.num_places(step) == places


@given(plans(), st.integers(0, 60))
def test_a_walk_is_at_the_position_of_its_steps(plan: LanePlan, num_steps: int) -> None:
    numbers = {
        "num_samples": plan.num_samples,
        "num_lanes": plan.num_lanes,
        "samples_per_lane": plan.samples_per_lane,
    }
    walk = LaneWalk(plan.position, **numbers)
    num_seen = plan.position.num_seen(plan.num_samples)
    for _ in range(num_steps):
        again = LaneWalk(walk.position, **numbers)
        places = walk.next_step()
        assert again.next_step() == places
        num_seen += places
        assert walk.position.num_seen(plan.num_samples) == num_seen


@st.composite
def owned_lanes(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], int]:
    """What is left of an assignment when ranks were lost, and new ones have nothing yet."""
    num_lanes = draw(st.integers(1, 30))
    world_size = draw(st.integers(1, num_lanes))
    lanes = assign_lanes(num_lanes, world_size)
    kept = draw(st.lists(st.sampled_from(lanes), unique=True))
    num_new = draw(st.integers(0 if kept else 1, max(1, num_lanes - len(kept))))
    return [*kept, *[()] * num_new][:num_lanes], num_lanes


@given(owned_lanes())
def test_lanes_move_to_be_even_and_no_more_than_that(
    owned: tuple[list[tuple[int, ...]], int],
) -> None:
    before, num_lanes = owned
    after = move_lanes(before, num_lanes)
    assert sorted(lane for own in after for lane in own) == list(range(num_lanes))
    assert max(map(len, after)) - min(map(len, after)) <= 1
    assert all(list(own) == sorted(own) for own in after)
    for old, new in zip(before, after, strict=True):
        kept = set(old) & set(new)
        assert kept == set(old) or kept == set(new)  # It gives, or it takes.


def test_lanes_stay_where_they_are_when_nobody_came_or_went() -> None:
    lanes = assign_lanes(10, 3)
    assert move_lanes(lanes, 10) == lanes


def test_lanes_cannot_move_to_nobody() -> None:
    with pytest.raises(ValueError, match="world_size is 0; allowed: at least 1"):
        move_lanes([], 4)
    assert move_lanes([(0,), (), ()], 2) == ((0,), (1,), ())
