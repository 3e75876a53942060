"""Saving: the checkpoints that the workers of a synchronous run write beside their training."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from xdist.checkpoint import Cut, Part
from xdist.segments import Course
from xdist.share_writer import Written
from xdist.strategies import Share
from xdist.topologies import Outcome, Pending, Saved, Task
from xdist.topologies.actors import SAVES
from xdist.topologies.crew import SAVE_PATIENCE_S, Crew, Hand
from xdist.topologies.writers import leave_to_others, refused_by_all, shares_of
from xdist.worker_messages import WorkerReport

logger = logging.getLogger(__name__)

LATE_S = 1.0
"""Where one has been written for longer, the next one is not begun: a storage that is slow, or
refuses, gets no more than it takes.
"""

LAST_WAIT_S = 10.0
"""For those before the last one, once that is there."""
OVER = "the last one is there"


@dataclass
class _Unwritten:
    """A checkpoint whose shares are being written."""

    cut: Cut
    owners: dict[int, Hand]
    """By their lives: of those whose shares are not there yet."""
    parts: list[Part] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    """Life -> why its share could not be written, when that was tried last."""
    began: float = field(default_factory=time.monotonic)
    first_written: float | None = None
    """When the first share was there."""


class Saving:
    """What one node cannot write others will, the next time; what nobody can is tried again until
    it is there.
    """

    def __init__(self, crew: Crew, *, saved_step: int) -> None:
        self._crew = crew
        self.saved_step = saved_step
        """Of the last one all of whose shares are there."""
        self._unwritten: dict[int, _Unwritten] = {}
        """By step."""
        self._owners: dict[int, Hand] = {}
        """By their lives: of the shares of the next cut."""
        self.is_waited_for = False
        """Whether those wait until theirs is written."""
        self._over: float | None = None
        """When the last one was there."""
        self._owes = False
        """Whether one was given up, and none was begun after it."""
        self.is_urgent = False
        """Whether what there is is to be saved at the end of the step."""
        self._going: frozenset[str] = frozenset()
        """The ids of nodes on which all workers were when these had a notice to go."""

    @property
    def is_at_work(self) -> bool:
        """Whether one is not there yet, and is worth waiting for."""
        is_late = self._over is not None and time.monotonic() - self._over > LAST_WAIT_S
        return bool(self._unwritten) and not is_late

    def shares(
        self, cut: Cut | None, seated: Sequence[Hand], *, is_ending: bool
    ) -> dict[int, Share]:
        """Which shares of the next cut are to be saved, by the lives of those who do."""
        self.is_waited_for = cut is not None and (cut.is_final or is_ending)
        shares: dict[int, Share] = {}
        if cut is not None and self._is_late and not self.is_waited_for:
            said = "checkpoint left out, as an earlier one is being written yet step=%d"
            logger.warning(said, cut.step)
            self._owes = self._owes or self.is_urgent
        elif cut is not None:
            shares = shares_of(seated)
        self.is_urgent = False
        self._owners = {hand.life: hand for hand in seated if hand.life in shares}
        return shares

    @property
    def _is_late(self) -> bool:
        now = time.monotonic()
        return any(now - each.began > LATE_S for each in self._unwritten.values())

    def complete(self, cut: Cut, reports: Sequence[WorkerReport]) -> Outcome:
        """Those who were to save shares of this cut have come to it."""
        now = time.monotonic()
        if self.is_waited_for:
            parts = [part for report in reports if report.written for part in report.written.parts]
            began = now - max(report.written.seconds for report in reports if report.written)
            self._over = now
            self._forget_refused()
            return self._saved(cut, parts, began)
        if not self._owners:
            return Outcome()
        self._owes = False
        self._unwritten[cut.step] = _Unwritten(cut, dict(self._owners))
        pending: Pending = {}
        for hand in self._owners.values():
            pending |= _ask(hand, cut)
        return Outcome(pending=pending)

    def _saved(self, cut: Cut, parts: Sequence[Part], began: float) -> Outcome:
        self.saved_step = max(self.saved_step, cut.step)
        return Outcome(saved=(Saved(cut, tuple(parts), began=began),))

    def _forget_refused(self) -> None:
        """A later one is there."""
        for one in list(self._unwritten.values()):
            if one.refused:
                self._give_up(one, OVER)

    def receive(self, hand: Hand, task: Task, written: Written) -> Outcome:
        """What became of a share."""
        assert task.cut is not None
        one = self._unwritten.get(task.cut.step)
        if one is None or hand.life not in one.owners:
            return Outcome()
        if not written.is_kept:
            self._give_up(one, str(written.unsaved))
            return Outcome()
        if written.unsaved is None:
            del one.owners[hand.life]
            one.parts += written.parts
            one.first_written = one.first_written or time.monotonic()
        else:
            one.refused[hand.life] = written.unsaved
        return self._judge(one)

    def _judge(self, one: _Unwritten) -> Outcome:
        if set(one.owners) != set(one.refused):
            return Outcome()
        if not one.owners:
            del self._unwritten[one.cut.step]
            return self._saved(one.cut, one.parts, one.began)
        if self._over is not None:
            self._give_up(one, OVER)
            return Outcome()
        if one.parts:
            self._leave_to_others(one, one.refused)
            return Outcome()
        fault = refused_by_all(one.owners.values(), next(iter(one.refused.values())))
        one.refused.clear()
        pending: Pending = {}
        for hand in one.owners.values():
            pending |= _ask(hand, one.cut)
        return Outcome(pending=pending, faults=(fault,))

    def _leave_to_others(self, one: _Unwritten, failed: dict[int, str]) -> None:
        for life, why in failed.items():
            leave_to_others(one.owners[life], why)
        self._give_up(one, "others will write the next one")

    def _give_up(self, one: _Unwritten, why: str) -> None:
        logger.warning("checkpoint given up step=%d: %s", one.cut.step, why)
        self._owes = True
        del self._unwritten[one.cut.step]

    def close(self) -> None:
        """Nobody goes on to write."""
        for one in list(self._unwritten.values()):
            self._give_up(one, "nobody writes any more")

    def heed_notice(self, seated: Sequence[Hand], draining: Collection[str]) -> None:
        """Where all are on nodes that are about to go, those may go before others can take over:
        what there is is saved, once.
        """
        at = frozenset(hand.node_id for hand in seated if hand.node_id is not None)
        if at and at.issubset(draining) and not at.issubset(self._going):
            logger.warning("all workers are on nodes that are about to go: what there is is saved")
            self.is_urgent, self._going = True, at

    def plan(self, course: Course, step: int | None) -> None:
        """Have the segment that begins with `step` saved: there, where that is urgent, or at its
        end, where one is owed for one that was given up.
        """
        if self.is_urgent and step is not None and step != self.saved_step:
            course.cut_short(step)
        elif self.owes:
            course.save_at_end()

    @property
    def owes(self) -> bool:
        """Whether the next segment is to be saved, as one that was is given up."""
        return self._owes and not self._unwritten

    def look(self) -> None:
        """Who writes for much longer than another one leaves saving to the others. What somebody
        had not written who is gone is lost.
        """
        for one in list(self._unwritten.values()):
            gone = [hand.number for life, hand in one.owners.items() if not self._crew.alive(life)]
            if gone:
                self._give_up(one, f"worker {gone[0]} is gone")
            elif one.first_written and time.monotonic() - one.first_written > SAVE_PATIENCE_S:
                why = f"it has written for {SAVE_PATIENCE_S:g} s longer than another one"
                self._leave_to_others(one, dict.fromkeys(one.owners, why))


def _ask(hand: Hand, cut: Cut) -> Pending:
    written: Any = hand.actor.written.options(concurrency_group=SAVES)
    return {written.remote(cut.step): hand.task("written", cut=cut)}
