"""What becomes of a checkpoint whose shares are written, late, refused, or never."""

from __future__ import annotations

from typing import Any

import pytest

from datapipe.position import Position
from xdist.checkpoint import Cut, Part
from xdist.share_writer import Written
from xdist.topologies import Outcome, Task
from xdist.topologies import saving as rules
from xdist.topologies.crew import Hand
from xdist.topologies.saving import Saving

REFUSED = Written(unsaved="the disk is full")


class Actor:
    """Stands for Ray's handle of one: what is asked of it is counted."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.written = self

    def options(self, **_how: Any) -> Actor:
        return self

    def remote(self, _step: int) -> object:
        self.num_asked += 1
        return object()


class Workers:
    """Two of them, and how they save."""

    def __init__(self) -> None:
        self.hands = [Hand(number, number + 1, Actor(), "idle", 5) for number in range(2)]  # type: ignore[arg-type]
        self.gone: set[int] = set()
        crew: Any = self
        self.saving = Saving(crew, saved_step=0)

    def alive(self, life: int) -> Hand | None:
        return None if life in self.gone else self.hands[life - 1]

    def save(self, step: int) -> bool:
        """Come to a cut; whether shares of it are saved."""
        shares = self.saving.shares(cut_at(step), self.hands, is_ending=False)
        self.saving.complete(cut_at(step), [])
        return bool(shares)

    def tell(self, number: int, step: int, written: Written) -> Outcome:
        hand = self.hands[number]
        return self.saving.receive(hand, hand.task("written", cut=cut_at(step)), written)

    @property
    def num_asked(self) -> list[int]:
        return [hand.actor.num_asked for hand in self.hands]


def cut_at(step: int, is_final: bool = False) -> Cut:
    return Cut(step, 4 * step, Position(), is_final)


def written(number: int) -> Written:
    return Written((Part(f"part-{number}", number, number + 1, 1, ""),))


@pytest.fixture
def workers() -> Workers:
    return Workers()


def test_it_is_there_when_all_shares_are(workers: Workers) -> None:
    assert workers.save(10)
    assert workers.tell(1, 10, written(1)) == Outcome()
    [saved] = workers.tell(0, 10, written(0)).saved
    assert {part.file for part in saved.parts} == {"part-0", "part-1"}
    assert (saved.cut.step, workers.saving.saved_step) == (10, 10)
    assert not workers.saving.is_at_work


def test_the_next_one_is_left_out_while_one_takes_long(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workers.save(10)
    assert workers.save(20)
    monkeypatch.setattr(rules, "LATE_S", 0.0)
    assert not workers.save(30)
    for step in (10, 20):
        for number in range(2):
            workers.tell(number, step, written(number))
    assert workers.save(40)


def test_what_all_refuse_is_the_storages_fault_and_is_tried_again(workers: Workers) -> None:
    workers.save(10)
    assert workers.tell(0, 10, REFUSED) == Outcome()
    outcome = workers.tell(1, 10, REFUSED)
    [fault] = outcome.faults
    assert (fault.task, fault.kind) == (Task("storage", "train", 0), "unsaved")
    assert workers.num_asked == [2, 2]
    assert not workers.saving.owes
    workers.tell(0, 10, written(0))
    assert workers.tell(1, 10, written(1)).saved


def test_what_one_refuses_it_leaves_to_the_others_with_the_next_segment(workers: Workers) -> None:
    workers.save(10)
    workers.tell(0, 10, written(0))
    assert workers.tell(1, 10, REFUSED) == Outcome()
    assert [hand.can_save for hand in workers.hands] == [True, False]
    assert workers.saving.owes
    shares = workers.saving.shares(cut_at(11), workers.hands, is_ending=False)
    assert list(shares.values()) == [(0, 1)]
    workers.saving.complete(cut_at(11), [])
    assert not workers.saving.owes


def test_who_writes_much_longer_than_another_one_leaves_it_to_the_others(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.save(10)
    monkeypatch.setattr(rules, "SAVE_PATIENCE_S", 0.0)
    workers.saving.look()
    assert not workers.saving.owes  # Nobody has come to an end: it may be the storage.
    workers.tell(0, 10, written(0))
    workers.saving.look()
    assert [hand.can_save for hand in workers.hands] == [True, False]
    assert workers.saving.owes
    assert workers.tell(1, 10, written(1)) == Outcome()


def test_what_somebody_had_not_written_who_is_gone_is_saved_anew(workers: Workers) -> None:
    workers.save(10)
    workers.tell(0, 10, written(0))
    workers.gone.add(2)
    workers.saving.look()
    assert workers.saving.owes
    assert all(hand.can_save for hand in workers.hands)


class Course:
    """Notes where it is to be saved."""

    def __init__(self) -> None:
        self.saved: list[int | str] = []

    def cut_short(self, step: int) -> None:
        self.saved.append(step)

    def save_at_end(self) -> None:
        self.saved.append("end")


def test_where_all_are_on_nodes_with_a_notice_one_is_saved_at_once_and_once(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    course: Any = Course()
    for number, hand in enumerate(workers.hands):
        monkeypatch.setattr(type(hand), "node_id", property(lambda hand: f"node {hand.number}"))
        workers.saving.heed_notice(workers.hands, {f"node {n}" for n in range(number + 1)})
        assert workers.saving.is_urgent == (number == 1)
    workers.saving.plan(course, 7)
    assert workers.save(7)
    workers.saving.heed_notice(workers.hands, {"node 0", "node 1"})
    workers.saving.heed_notice(workers.hands[:1], {"node 0", "node 1"})
    assert not workers.saving.is_urgent
    workers.saving.plan(course, 8)
    assert course.saved == [7]


def test_where_another_one_is_late_the_urgent_one_is_owed(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workers.save(10)
    monkeypatch.setattr(rules, "LATE_S", 0.0)
    workers.saving.is_urgent = True
    assert not workers.save(12)
    for number in range(2):
        workers.tell(number, 10, written(number))
    assert workers.saving.owes


def test_one_that_hangs_holds_up_no_end(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    workers.save(10)
    workers.saving.shares(cut_at(20, True), workers.hands, is_ending=False)
    assert workers.saving.is_waited_for
    report: Any = type("Report", (), {"written": written(0)})
    assert workers.saving.complete(cut_at(20, True), [report]).saved
    assert workers.saving.is_at_work
    monkeypatch.setattr(rules, "LAST_WAIT_S", 0.0)
    assert not workers.saving.is_at_work
