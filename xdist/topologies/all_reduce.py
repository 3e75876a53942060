"""AllReduceTopology: synchronous workers, each of which owns all state.

The workers train in a group; all ranks get the same segment before anything is waited for. When one
is lost, the others keep what they have and form the next generation of the group, with a spare in
the lost one's place if there is one; the step that was interrupted is made again, by all of them.
Who starts later joins at the end of a step that all agree on.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from typing import Any

import ray

from datapipe.errors import CorruptSample
from xdist.checkpoint import Checkpoint
from xdist.flat import FlatModel
from xdist.segments import Course
from xdist.strategies import UpdateStrategy
from xdist.strategies.all_reduce import AllReduce
from xdist.strategies.group import NoteBoard, Rendezvous, cancel, forget, open_store
from xdist.topologies import Outcome, Pending, Resize, RunPlan, Task
from xdist.topologies.crew import Hand, may_have_state, newest_of
from xdist.topologies.dealing import dealer_of, rules_of
from xdist.topologies.draining import leaving
from xdist.topologies.generation import Generation
from xdist.topologies.headcount import Headcount
from xdist.topologies.saving import Saving
from xdist.topologies.seats import reseat, with_lanes
from xdist.topologies.staff import MakeStrategy, Staff
from xdist.topologies.writers import is_complete, unsaved
from xdist.worker_messages import WorkerReport

logger = logging.getLogger(__name__)


class AllReduceTopology:
    """One group of workers at a time; each change of it is a new generation."""

    def __init__(self, plan: RunPlan, *, make_strategy: MakeStrategy | None = None) -> None:
        """`make_strategy` wraps or replaces the ranks' strategies; it takes the arguments of
        `all_reduce_strategy`.
        """
        self._plan = plan
        self._updated: float | None = None
        """When the last update was made; None before the first one."""
        self._dealer, self._rules = dealer_of(plan), rules_of(plan)
        self._host = ray.util.get_node_ip_address()
        self._store = open_store(self._host)
        self._rendezvous = Rendezvous(self._host, self._store.port, 0)
        lanes_of_one = -(-self._dealer.num_lanes // plan.most_workers)
        self._staff = Staff(
            plan,
            make_strategy=make_strategy or all_reduce_strategy,
            warm_up_images=[self._dealer.samples_per_lane] * lanes_of_one,
        )
        self._crew = self._staff.crew
        self._saving = Saving(self._crew, saved_step=0)

    def launch(self, start: Checkpoint) -> Pending:
        self._start_step = start.manifest.cut.step
        self._course = Course(
            start.manifest.cut, self._dealer, self._rules, num_workers=self._plan.num_workers
        )
        self._group = Generation(self._rendezvous, self._course)
        self._reports: list[WorkerReport] = []
        self._ends_at: int | None = None
        """The step that is saved when it is to end: no other one is made."""
        self._saving = Saving(self._crew, saved_step=self._start_step)
        self._headcount = Headcount(self._plan.config.cluster, self._staff)
        return self._staff.open(start, is_first=self._rendezvous.generation == 0)

    @property
    def _is_first(self) -> bool:
        """Whether no group has formed yet since the launch."""
        return not self._group.seats

    @property
    def _first_step(self) -> int | None:
        """Of the checkpoint that who starts now begins with; None where a peer sends it a state."""
        return self._start_step if self._is_first else None

    def receive(self, task: Task, result: Any) -> Outcome:
        hand = self._crew.find(task)
        if hand is None:
            return Outcome()
        match task.action:
            case "pulse":
                if not self._group.is_broken:
                    self._see_update(result.standing_s)
                return Outcome(pending=self._crew.felt(hand, result))
            case "start":
                self._crew.started(hand, result)
                return self._advance()
            case "join" | "train":
                if isinstance(result, WorkerReport):
                    self._reports.append(result)
                    self._see_update(result.standing_s)
                    hand.end(result.progress.step)
                else:
                    hand.end(self._course.step_to_go_on_from(result.step))
                if result.interrupted is not None:
                    logger.info("%s left its group cause=%s", task.actor, result.interrupted.cause)
                    self._group.complain(hand, result.interrupted)
                    self._break()
                return self._advance()
            case "written":
                return self._saving.receive(hand, task, result)
        return Outcome()

    def _see_update(self, standing_s: float | None) -> None:
        """A worker made its last update so many seconds ago."""
        if standing_s is not None:
            updated = time.monotonic() - standing_s
            self._updated = max(updated, self._updated or updated)

    def is_current(self, task: Task, /) -> bool:
        return self._crew.find(task) is not None

    def host_of(self, task: Task, /) -> str | None:
        hand = self._crew.find(task)
        return None if hand is None or hand.process is None else hand.process.host

    def replace(self, lost: Task, /) -> Outcome | None:
        """None when nobody is left who has any state."""
        hand = self._crew.find(lost)
        assert hand is not None
        if hand.life in self._group.lives:
            self._group.has_lost = True
            self._break()
        self._staff.lose(hand)
        if not self._is_first and not may_have_state(self._crew):
            return None
        outcome = self._advance()  # Before the replacement: the others are waiting.
        return replace(outcome, pending=outcome.pending | self._start_due())

    def _start_due(self) -> Pending:
        return self._staff.start_due(step=self._first_step)

    def watch(self) -> Outcome:
        self._staff.request.keep()
        if self._group.round is None:
            self._headcount.look(is_first=self._is_first)
        is_broken = self._group.is_broken
        faults = self._crew.silent(is_broken=is_broken)
        faults += self._crew.stuck(self._seated, is_broken=is_broken)
        faults += self._staff.unheard()
        self._saving.look()
        if faults:
            return Outcome(faults=tuple(faults))
        pending = self._staff.look_for_draining(step=self._first_step) | self._start_due()
        if not self._is_first:
            pending |= self._staff.start_successors(seated=self._seated, leaving=self._leaving)
            self._saving.heed_notice(self._seated, self._staff.draining)
        return self._advance(pending)

    def end_soon(self) -> Outcome:
        self._crew.is_ending = True
        self._ends_at = self._start_step if self._is_first else None
        if self._group.round == "join" and any(hand.step is None for hand in self._seated):
            self._break()  # Nobody needs to be sent a state.
        return self._advance()

    @property
    def _is_ending(self) -> bool:
        return self._crew.is_ending

    @property
    def _can_save(self) -> bool:
        """Whether the group is to save and to end, and all of it has the same state."""
        steps = {hand.step for hand in self._seated}
        is_together = not self._group.is_broken and len(steps) == 1 and None not in steps
        return self._is_ending and is_together

    def _break(self) -> None:
        """The group is to part: somebody is lost, or says so."""
        group = self._group
        if not group.is_broken and group.round is not None:
            group.is_broken = True
            if group.round == "join":
                cancel(self._store, group.rendezvous, world_size=len(group.seats))

    @property
    def _seated(self) -> list[Hand]:
        """Those of the group who are there, in the order of their ranks."""
        found = [self._crew.alive(seat.life) for seat in self._group.seats]
        return [hand for hand in found if hand is not None and not hand.is_lost]

    @property
    def _leaving(self) -> list[Hand]:
        """Those of the group whose nodes are about to go, and who can leave."""
        return leaving(
            self._seated,
            self._staff.draining,
            num_joining=len(self._joining),
            fewest=self._plan.config.cluster.min_world_size,
        )

    @property
    def _most(self) -> int:
        """Ranks that there may be; one more while the only one with the state is about to go."""
        is_last = all(hand.node_id in self._staff.draining for hand in self._seated)
        return self._plan.most_workers + (not self._is_first and is_last)

    @property
    def _hands_over(self) -> bool:
        """Whether the group has come together only for one to get the state of those who leave:
        it may have more ranks than lanes.
        """
        return len(self._group.seats) > self._plan.most_workers and bool(self._leaving)

    @property
    def _joining(self) -> list[Hand]:
        """Those who could join a group, in the order of their numbers: the first one is of those
        who start together, unless there is no room for them any more.
        """
        return self._staff.ready(with_state=self._is_first and not self._headcount.lacks_room)

    @property
    def _wants_change(self) -> bool:
        num_staying = len(self._seated) - len(self._leaving)
        can_grow = num_staying < self._most and bool(self._joining)
        return can_grow or bool(self._leaving) or num_staying < len(self._group.seats)

    def _advance(self, pending: Pending | None = None) -> Outcome:
        """What follows, once nobody of the group is at work any more."""
        pending = pending or {}
        if self._ends_at is not None:
            return Outcome(pending=pending, ends_at=self._ends_at)
        if any(hand.state == "busy" for hand in self._seated):
            return Outcome(pending=pending | self._interfere())
        group = self._group
        if group.round == "join" and not group.is_broken and not self._hands_over:
            return self._begin_training(pending)
        outcome = self._end_training() if group.round == "train" else Outcome()
        pending |= outcome.pending
        faults = unsaved(outcome.reports, self._seated)
        faults += () if self._is_ending else group.unexplained(self._seated)
        outcome = replace(outcome, faults=faults)
        for fault in faults:
            if (hand := self._crew.find(fault.task)) is not None:
                hand.is_lost = True
        group.round = None
        if self._is_first:
            is_lost = self._headcount.is_first_lost
        else:
            is_lost = not may_have_state(self._seated)
        if is_lost:
            if not self._is_ending:
                self._headcount.check()
            return replace(outcome, pending=pending, is_lost=True)
        if self._course.segment is not None and self._ends_at is None:
            is_over = group.is_broken or group.is_stopping or not group.seats
            forms = (is_over or self._wants_change) and not self._can_save
            pending |= self._form_group() if forms else self._train()
        return replace(outcome, pending=pending, ends_at=self._ends_at)

    def _interfere(self) -> Pending:
        """Have the group stop at the end of a step, if it is to change; or at once, if it is
        broken.
        """
        group = self._group
        if group.is_broken:
            waiting = [hand for hand in self._seated if hand.state == "busy"]
            pending: Pending = {}
            for hand in [] if group.is_aborted else waiting:
                pending |= self._crew.tell(hand, "abort")
            group.is_aborted = True
            return pending
        wants_stop = self._wants_change or self._is_ending or self._saving.is_urgent
        if group.is_stopping or group.round != "train" or not wants_stop:
            return {}
        group.is_stopping = True
        return self._crew.tell(self._seated[0], "request_stop")

    def _end_training(self) -> Outcome:
        """What the ranks' reports come to; then on to the next segment, if this one is complete."""
        segment = self._course.segment
        assert segment is not None
        reports = tuple(sorted(self._reports, key=lambda report: report.worker))
        self._reports = []
        outcome = Outcome()
        if is_complete(reports, segment, num_ranks=len(self._group.seats)):
            if segment.cut is not None:
                outcome = self._saving.complete(segment.cut, reports)
            if outcome.saved and self._is_ending:
                self._ends_at = self._saving.saved_step
            self._course.complete_segment()
        notes = NoteBoard(self._store).read()
        corrupt = tuple(CorruptSample(*json.loads(note)) for note in notes)
        return replace(outcome, reports=reports, corrupt=corrupt)

    def _form_group(self) -> Pending:
        """The next generation, of those who are there; nothing, while they are too few."""
        pending: Pending = {}
        for hand in [] if self._is_ending else self._leaving:
            pending |= self._staff.move(hand)
        old = self._group
        # In the end, whoever has the newest state is enough.
        there = newest_of(self._seated) if self._is_ending else self._seated
        seats = reseat(
            old.seats,
            present={hand.life for hand in there},
            joining=[] if self._is_ending else [hand.life for hand in self._joining],
            most=self._most,
        )
        alive = {hand.life: hand for hand in self._crew}
        hands = [alive[seat.life] for seat in seats]
        steps = [hand.step for hand in hands if hand.step is not None]
        fewest = 1 if self._is_ending else self._headcount.fewest(is_first=self._is_first)
        if len(seats) < fewest or not steps:
            self._headcount.check()
            return pending
        self._headcount.suffices()
        for hand in [hand for hand in self._crew if hand not in hands]:
            # The others leave the state behind that it has, or is about to read.
            if hand.state == "starting" and hand.step is not None:
                pending |= self._staff.start_without_state(hand)
            hand.step = None
        forget(self._store, old.rendezvous)
        newest = max(steps)
        course = self._course.regrouped(newest, num_workers=len(seats))
        seats = with_lanes(
            seats,
            num_lanes=course.dealing.num_lanes,
            dealt_anew=course.dealing != old.course.dealing or not old.seats,
        )
        self._group = old.next(seats, course, step=newest)
        self._rendezvous = self._group.rendezvous
        for member in hands:
            # As many lanes as it has now it may not have had before.
            member.may_compile_at = newest if self._plan.config.compute.compile else None
        memberships = self._group.memberships(
            [member.step for member in hands],
            position=self._course.cut_at(newest).position,
            timeout_s=self._crew.patience_s,
        )
        for member, membership in zip(hands, memberships, strict=True):
            member.begin()
            pending[member.actor.join.remote(membership)] = member.task("join")
        return pending

    def _begin_training(self, pending: Pending) -> Outcome:
        self._course = self._group.course
        pause_s = None if self._updated is None else time.monotonic() - self._updated
        resize = Resize(len(self._group.seats), self._group.number, pause_s)
        pending |= self._train()
        return Outcome(pending=pending, resize=resize, ends_at=self._ends_at)

    def _train(self) -> Pending:
        step = self._seated[0].step
        if self._can_save and step is not None:
            if step == self._saving.saved_step:
                self._ends_at = step
                return {}
            self._course.cut_short(step)
        self._saving.plan(self._course, step)
        segment = self._course.segment
        assert segment is not None
        self._group.round = "train"
        pending: Pending = {}
        seated = self._seated
        shares = self._saving.shares(segment.cut, seated, is_ending=self._is_ending)
        for hand in seated:
            hand.begin()
            self._staff.does_well(hand)
            train: Any = hand.actor.train
            how = {"share": shares.get(hand.life), "waits": self._saving.is_waited_for}
            pending[train.remote(segment.until_step, **how)] = hand.task("train")
        return pending

    @property
    def is_saving(self) -> bool:
        return self._saving.is_at_work

    @property
    def newest_step(self) -> int:
        return max(self._start_step, self._crew.newest_step)

    def close(self) -> None:
        self._saving.close()
        self._staff.close()


def all_reduce_strategy(
    plan: RunPlan, flat: FlatModel, *, number: int, checkpoint_url: str | None
) -> UpdateStrategy:
    """The strategy of the worker of this number."""
    assert number >= 0
    return AllReduce(
        plan.config,
        flat,
        checkpoint_url=checkpoint_url,
        run_dir=plan.run_dir,
        own_address=ray.util.get_node_ip_address(),
    )
