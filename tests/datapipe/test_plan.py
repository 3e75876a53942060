"""Plans of batches: static shapes, every place once, from any position."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from datapipe.lanes import LanePlan, assign_lanes
from datapipe.plan import BatchPlan, lane_batches, leased_batches, sequential_batches
from datapipe.position import Position, Span


def places(plans: Iterable[BatchPlan]) -> list[tuple[int, int]]:
    return [
        (span.epoch, place)
        for plan in plans
        for span in plan.spans
        for place in range(span.start, span.stop)
    ]


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4), st.data())
def test_all_workers_together_do_every_place_of_every_epoch_once(
    num_samples: int, num_lanes: int, samples_per_lane: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, num_lanes))
    done = []
    num_batches = set()
    for lanes in assign_lanes(num_lanes, world_size):
        batches = list(
            lane_batches(
                Position(),
                num_samples=num_samples,
                num_lanes=num_lanes,
                samples_per_lane=samples_per_lane,
                lanes=lanes,
                num_epochs=3,
            )
        )
        assert {batch.size for batch in batches} == {len(lanes) * samples_per_lane}
        num_batches.add(len(batches))
        done += places(batches)
    assert sorted(done) == [(epoch, place) for epoch in range(3) for place in range(num_samples)]
    assert len(num_batches) == 1


@given(st.integers(2, 60), st.integers(1, 6), st.integers(1, 4), st.data())
def test_lane_batches_from_any_step_are_the_rest_of_the_batches(
    num_samples: int, num_lanes: int, samples_per_lane: int, data: st.DataObject
) -> None:
    def batches(start: Position) -> list[BatchPlan]:
        return list(
            lane_batches(
                start,
                num_samples=num_samples,
                num_lanes=num_lanes,
                samples_per_lane=samples_per_lane,
                lanes=range(num_lanes),
                num_epochs=2,
            )
        )

    plan = LanePlan(Position(), num_samples, num_lanes, samples_per_lane)
    step = data.draw(st.integers(0, plan.num_steps))
    assert batches(plan.position_after(step)) == batches(Position())[step:]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 9))
def test_leases_are_done_in_order_and_only_the_last_batch_is_short(
    sizes: list[int], batch_size: int
) -> None:
    leases = [Span(number, 3, 3 + size) for number, size in enumerate(sizes)]
    batches = list(leased_batches(iter(leases), batch_size=batch_size))
    expected = [(lease.epoch, place) for lease in leases for place in range(3, lease.stop)]
    assert places(batches) == expected
    assert {batch.size for batch in batches} == {batch_size}
    filled = [len(places([batch])) for batch in batches]
    assert all(count == batch_size for count in filled[:-1])


def test_a_batch_names_the_rest_of_its_lease() -> None:
    batches = leased_batches([Span(0, 3, 8), Span(1, 0, 3)], batch_size=4)
    upcoming = [segment.upcoming for batch in batches for segment in batch.segments]
    assert upcoming == [Span(0, 7, 8), None]


@given(st.lists(st.none() | st.integers(1, 20), max_size=12), st.integers(1, 9))
def test_a_pause_between_leases_ends_the_batch_that_was_begun(
    sizes: list[int | None], batch_size: int
) -> None:
    leased: list[tuple[int, int]] = []
    done: list[tuple[int, int]] = []

    def leases() -> Iterable[Span | None]:
        for number, size in enumerate(sizes):
            leased.extend((number, place) for place in range(size or 0))
            yield None if size is None else Span(number, 0, size)
            assert size is not None or done == leased

    for batch in leased_batches(leases(), batch_size=batch_size):
        assert batch.size == batch_size
        done += places([batch])
        assert len(places([batch])) == batch_size or done == leased
    assert done == leased


def test_a_pause_before_any_lease_gives_no_batch() -> None:
    batches = list(leased_batches([None, None, Span(0, 0, 2), None, None], batch_size=4))
    assert [batch.spans for batch in batches] == [(Span(0, 0, 2),)]


def test_a_batch_does_not_wait_for_the_lease_after_the_one_that_fills_it() -> None:
    taken = []

    def leases() -> Iterable[Span]:
        for number in range(3):
            taken.append(number)
            yield Span(0, 4 * number, 4 * number + 4)

    batches = leased_batches(leases(), batch_size=4)
    next(batches)
    assert taken == [0]


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 5))
def test_the_parts_of_an_evaluation_do_every_sample_once(
    num_samples: int, batch_size: int, num_parts: int
) -> None:
    done = [
        place
        for part in range(num_parts)
        for place in places(
            sequential_batches(num_samples, batch_size, part=part, num_parts=num_parts)
        )
    ]
    assert done == [(0, place) for place in range(num_samples)]
