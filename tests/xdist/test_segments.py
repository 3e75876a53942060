"""The walk of a synchronous run: where it reports, saves and ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.position import Position
from xdist.checkpoint import Cut
from xdist.segments import (
    Course,
    Dealer,
    Dealing,
    Segment,
    SegmentRules,
    cut_at,
    segments,
)

START = Cut(0, 0, Position(), is_final=False)


def walk(start: Cut = START, **changes: Any) -> list[Segment]:
    values: dict[str, Any] = {
        "num_samples": 50,
        "num_epochs": 2,
        "max_steps": None,
        "report_every_steps": 5,
        "save_every_samples": 20,
    }
    values |= changes
    dealing = Dealing(values.pop("num_samples"), num_lanes=4, samples_per_lane=2)
    return list(segments(start, dealing, SegmentRules(**values)))


def test_it_reports_saves_and_ends() -> None:
    segments = walk()
    assert [segment.until_step for segment in segments if segment.cut] == [3, 5, 9, 11, 14]
    assert segments[-1].cut == Cut(14, 100, Position(epoch=2), is_final=True)
    assert [segment.until_step for segment in segments] == [3, 5, 9, 10, 11, 14]


def test_it_reports_between_saves() -> None:
    segments = walk(save_every_samples=10**9, report_every_steps=4)
    assert [(segment.until_step, segment.cut is not None) for segment in segments] == [
        (4, False), (8, False), (12, False), (14, True),
    ]  # fmt: skip


def test_max_steps_ends_it() -> None:
    last = walk(max_steps=9)[-1]
    assert last.until_step == 9
    assert last.cut is not None
    assert last.cut.is_final


def test_the_cut_at_a_step_is_what_resuming_there_needs() -> None:
    whole = walk()
    for segment in whole:
        for step in range(segment.start.step, segment.until_step):
            rest = walk(cut_at(step, segment))
            assert rest[0].until_step == segment.until_step
            assert rest[0].cut == segment.cut
            assert rest[1:] == [other for other in whole if other.start.step >= segment.until_step]


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 90), st.integers(1, 5), st.integers(1, 40), st.data())
def test_resuming_at_any_cut_walks_the_rest(
    num_samples: int, report: int, save: int, data: st.DataObject
) -> None:
    changes: dict[str, Any] = {
        "num_samples": num_samples,
        "report_every_steps": report,
        "save_every_samples": save,
    }
    whole = walk(**changes)
    cuts = [segment.cut for segment in whole if segment.cut]
    cut = data.draw(st.sampled_from(cuts))
    rest = walk(cut, **changes)
    assert rest == [segment for segment in whole if segment.until_step > cut.step]


RULES = SegmentRules(num_epochs=2, max_steps=None, report_every_steps=5, save_every_samples=20)


def make_course(*, keeps_worker_batch: bool) -> Course:
    dealer = Dealer(50, 4, 2, most_workers=2, keeps_worker_batch=keeps_worker_batch)
    return Course(START, dealer, RULES, num_workers=2)


def test_a_course_is_the_same_for_other_workers() -> None:
    course = make_course(keeps_worker_batch=False)
    expected = walk()
    for segment in expected:
        assert course.segment == segment
        assert course.regrouped(segment.start.step + 1, num_workers=1) is course
        course.complete_segment()
    assert course.segment is None


def test_workers_that_keep_their_batch_make_smaller_steps_from_where_they_are() -> None:
    before = make_course(keeps_worker_batch=True)
    cut, course = before.cut_at(2), before.regrouped(2, num_workers=1)
    assert (before.dealing.batch_size, course.dealing.batch_size) == (8, 4)
    assert cut.num_samples == 16
    assert course.segment is not None
    assert course.segment.start == cut
    assert course.segment.until_step == 3
    assert course.segment.cut is not None
    assert course.segment.cut.num_samples == 20


def test_a_segment_whose_last_step_was_made_is_still_saved_before_the_rest_is_dealt_anew() -> None:
    course = make_course(keeps_worker_batch=True)
    segment = course.segment
    assert segment is not None
    cut = course.cut_at(segment.until_step)
    course = course.regrouped(segment.until_step, num_workers=1)
    assert course.segment == segment
    course.complete_segment()
    assert course.segment is not None
    assert course.segment.start == cut
    assert course.segment.dealing.batch_size == 4


def test_a_group_that_does_not_come_together_leaves_the_course_as_it_was() -> None:
    """Who was a step ahead is lost in it: the next group goes on a step before."""
    course = make_course(keeps_worker_batch=True)
    course.regrouped(3, num_workers=1)
    again = course.regrouped(2, num_workers=1)
    assert again.segment is not None
    assert again.segment.start == course.cut_at(2)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_course_that_is_cut_short_saves_there_and_can_go_on(step: int) -> None:
    course = make_course(keeps_worker_batch=False)
    cut = course.cut_at(step)
    last_step = walk()[-1].until_step
    course.cut_short(step)
    assert course.segment is not None
    assert (course.segment.until_step, course.segment.cut) == (step, cut)
    course.complete_segment()
    assert course.segment is not None
    assert course.segment.start == cut
    while course.segment is not None:
        end = course.segment.until_step
        course.complete_segment()
    assert end == last_step
