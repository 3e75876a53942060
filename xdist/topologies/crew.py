"""Crew: the worker actors of a synchronous run, what is known of each, and who does not answer.

Every worker that runs has a pulse: a call on a thread of its own that comes back once a second. A
process that was stopped, or whose node cannot be reached, leaves it unanswered; one that is stuck
says in what. Both are for their own deadline to notice: nothing else would tell.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from xdist.patient_storage import STORING_LIMIT_S
from xdist.topologies import Fault, Pending, Task, nodes
from xdist.topologies.actors import CONTROL, answers, end
from xdist.topologies.nodes import Process
from xdist.worker import Worker
from xdist.worker_messages import Pulse

logger = logging.getLogger(__name__)

PULSE_S = 1.0
"""Between two pulses of a worker."""
LEAST_PATIENCE_S = 10.0
STEPS_OF_PATIENCE = 5.0
PATIENCE_BEFORE_STEPS_S = 600.0
"""As long as no step was made: a first one may compile, or read cold data."""
HANG_S = 600.0
"""For a worker that nobody waits for, as all hang, or as it is alone: its storage may pause."""
PATIENCES_OF_HANG = 10.0
"""The same, where the user says how long workers are waited for."""
GRACE_S = 5.0
"""For a pulse, once somebody has said that a peer is lost."""
START_PATIENCE_S = 60.0
"""For a pulse of a worker that starts: it may import what lets no other thread run."""
READS_REMEMBERED_S = 600.0
"""Within this time of a worker that was lost as it read, the next one has twice as long to read,
and so on: it may be the storage that pauses, and nobody else would read sooner.
"""
READS_REMEMBERED = 6
SAVE_PATIENCE_S = 120.0
"""A storage that is slow is no worker that hangs, and steps say nothing of it."""

MakeActor = Callable[[int, bool], ActorHandle[Any]]
"""From a worker's number, and whether it takes its state from the checkpoint."""


@dataclass
class Hand:
    """One worker actor."""

    number: int
    life: int
    actor: ActorHandle[Any]
    state: Literal["starting", "ready", "busy", "idle"]
    """ready: started, and in no group yet; busy: joins or trains; idle: in the group, between."""
    step: int | None
    """Of the state that it has; None where it has none yet."""
    idle_since: float = 0.0
    busy_since: float = 0.0
    has_trained: bool = False
    can_save: bool = True
    """Whether it has not failed to where others could."""
    is_lost: bool = False
    """It is about to be ended: nobody counts on it."""
    placed: float | None = None
    """Since when it has had a place, as long as nothing was heard of it there."""
    process: Process | None = None
    pulse: Pulse | None = None
    """The last one; before the first, its process may not be there yet."""
    pulse_reference: ray.ObjectRef[Any] | None = None
    pulse_sent: float = field(default_factory=time.monotonic)
    started: float = 0.0
    """When it was ready; its first pulse may have been sent long before."""

    term: int = 0
    """Of the servers that it was told to join last."""
    may_compile_at: int | None = None
    """The step that it begins with, as long as it has made none in its group, if it compiles."""

    def begin(self) -> None:
        """It is told to join, or to train: what it was at before says nothing any more."""
        self.state, self.pulse, self.busy_since = "busy", None, time.monotonic()

    def end(self, step: int | None) -> None:
        """It has done what it was told, or as much as others let it, and has the state of this
        step. It has waited since it began to wait for them.
        """
        self.idle_since = time.monotonic() - self.waited_s
        self.state, self.step = "idle", step

    @property
    def waited_s(self) -> float:
        """How long it has waited for the others of its group, when it had done its own part."""
        if self.state == "idle":
            return time.monotonic() - self.idle_since
        is_waiting = self.pulse is not None and self.pulse.phase == "update"
        return self.pulse.phase_s if is_waiting and self.pulse is not None else 0.0

    @property
    def node_id(self) -> str | None:
        return None if self.process is None else self.process.node_id

    def task(self, action: Any, **more: Any) -> Task:
        return Task(f"worker {self.number}", action, self.number, life=self.life, **more)


class Crew:
    """The actors, by the numbers of the workers."""

    def __init__(
        self,
        make_actor: MakeActor,
        *,
        patience_s: float | None,
        warm_up_images: Sequence[int],
        check_node: Callable[[], None] = lambda: None,
    ) -> None:
        """patience_s: before a worker counts as lost; None: by the time of its steps.
        warm_up_images: how many there are in each part of the batch that a late worker computes
        before it joins. check_node: called where a worker starts, before it does; raises where it
        cannot be of use.
        """
        self._make_actor = make_actor
        self._configured_patience_s = patience_s
        self._warm_up_images = warm_up_images
        self._check_node = check_node
        self._hands: dict[int, Hand] = {}
        self._lives = itertools.count(1)
        self._stuck_reads: deque[float] = deque(maxlen=READS_REMEMBERED)
        """When workers were lost for what they read."""
        self.longest_step_s = 0.0
        self.newest_step = 0
        """That any worker has told of."""
        self.is_ending = False
        """Whether it is for what they have already that workers wait."""

    def __iter__(self) -> Iterator[Hand]:
        return iter(self._hands.values())

    def alive(self, life: int) -> Hand | None:
        """The worker of this life; None if it is gone."""
        return next((hand for hand in self if hand.life == life), None)

    def find(self, task: Task) -> Hand | None:
        """Who was asked this; None if that one is gone."""
        hand = self._hands.get(task.number)
        return hand if hand is not None and hand.life == task.life else None

    def start(self, number: int, *, step: int | None, ends_run: bool = False) -> Pending:
        """Start a worker. step: that of the checkpoint that it reads its state from; None: a peer
        will send it. ends_run: whether the run is over when it cannot start for what its node
        lacks.
        """
        actor = self._make_actor(number, step is not None)
        hand = Hand(number, next(self._lives), actor, "starting", step)
        self._hands[number] = hand
        warm_up_images = self._warm_up_images if step is None else ()
        task = replace(hand.task("start"), is_alone=not ends_run)
        start = partial(_start, warm_up_images=warm_up_images, check_node=self._check_node)
        started: ray.ObjectRef[Any] = actor.__ray_call__.remote(start)
        return {started: task, **self._feel(hand)}

    def end(self, hand: Hand) -> None:
        """End a worker that is lost, or not wanted any more: its process too, should it hang."""
        end([hand.actor])
        if hand.process is not None:
            nodes.kill(hand.process)
        del self._hands[hand.number]

    def started(self, hand: Hand, process: Process) -> None:
        """The worker is ready."""
        hand.state, hand.process, hand.started = "ready", process, time.monotonic()
        hand.pulse = None  # Of the start.

    def felt(self, hand: Hand, pulse: Pulse) -> Pending:
        """A pulse came back; send the next one."""
        hand.pulse = pulse
        if hand.may_compile_at is not None and pulse.step > hand.may_compile_at:
            hand.may_compile_at = None
        self.newest_step = max(self.newest_step, pulse.step)
        longest = max(other.pulse.longest_step_s for other in self if other.pulse)
        self.longest_step_s = longest or self.longest_step_s  # Those who are new know of none.
        return self._feel(hand)

    def ask_newest(self) -> None:
        """Ask all how far the run has come, which nobody will know any more."""
        pulses: list[Any] = [hand.actor.pulse.options(concurrency_group=CONTROL) for hand in self]
        found: list[Pulse] = answers([pulse.remote(0.0) for pulse in pulses])
        self.newest_step = max([self.newest_step, *(pulse.step for pulse in found)])

    def _feel(self, hand: Hand) -> Pending:
        pulse: Any = hand.actor.pulse.options(concurrency_group=CONTROL)
        hand.pulse_reference = pulse.remote(PULSE_S, self.patience_s)
        hand.pulse_sent = time.monotonic()
        return {hand.pulse_reference: hand.task("pulse")}

    @property
    def patience_s(self) -> float:
        """How long a worker that others wait for may be at one thing."""
        if self._configured_patience_s is not None:
            return self._configured_patience_s
        may_compile = any(hand.may_compile_at is not None for hand in self)
        if may_compile or not self.longest_step_s:
            return PATIENCE_BEFORE_STEPS_S
        return max(LEAST_PATIENCE_S, STEPS_OF_PATIENCE * self.longest_step_s)

    @property
    def _hang_s(self) -> float:
        """How long a worker that nobody waits for may be at one thing."""
        patience_s = self._configured_patience_s
        return HANG_S if patience_s is None else PATIENCES_OF_HANG * patience_s

    def silent(self, *, is_broken: bool) -> list[Fault]:
        """Workers whose process does not answer. is_broken: somebody has said that one is lost."""
        usual_s = self._configured_patience_s or (GRACE_S if is_broken else LEAST_PATIENCE_S)
        silences = {hand.life: self._silence_s(hand) for hand in self}
        # Where nobody would be left who has the state, it is rather the machine that is slow.
        holders = [hand for hand in self if hand.step is not None]
        are_all_silent = all(silences[hand.life] > PULSE_S + usual_s for hand in holders)
        faults = []
        for hand in self:
            is_spared = hand.state == "starting" or (hand in holders and are_all_silent)
            limit_s = PULSE_S + (START_PATIENCE_S if is_spared else usual_s)
            if silences[hand.life] > limit_s:
                cause = f"gave no answer for {limit_s:g} s"
                faults.append(Fault(hand.task("pulse"), cause, "lost"))
        return faults

    @staticmethod
    def _silence_s(hand: Hand) -> float:
        """How long a pulse has been unanswered."""
        is_there = hand.state != "starting" or hand.pulse is not None
        silence_s = time.monotonic() - max(hand.pulse_sent, hand.started)
        if not is_there or silence_s <= PULSE_S or ray.wait([hand.pulse_reference], timeout=0)[0]:
            return 0.0
        return silence_s

    def unheard(self, has_place: Callable[[int], bool]) -> list[Fault]:
        """Workers that have had a place for long, and whose process has not answered once."""
        faults, now = [], time.monotonic()
        for hand in self:
            is_heard = hand.state != "starting" or hand.pulse is not None
            if is_heard or not has_place(hand.number):
                hand.placed = None
                continue
            hand.placed = hand.placed or now
            if now - hand.placed > PATIENCE_BEFORE_STEPS_S:
                cause = f"gave no answer for {PATIENCE_BEFORE_STEPS_S:g} s since it had a place"
                faults.append(Fault(hand.task("pulse"), cause, "lost"))
        return faults

    def stuck(self, seated: Sequence[Hand], *, is_broken: bool) -> list[Fault]:
        """Workers of a group that are at one thing for too long, or for so long that others wait;
        and those that do not come to their start's end.
        """
        faults: list[Fault] = []
        reads: list[Fault] = []
        for hand in self:
            if hand.pulse is None:
                continue
            phase, phase_s = hand.pulse.phase, hand.pulse.phase_s
            if hand.state == "starting":
                is_stuck = phase_s > PATIENCE_BEFORE_STEPS_S
            else:
                waited_s = max((other.waited_s for other in seated if other is not hand), default=0)
                # One that is idle has not heard yet of what it is to do; but it is to hear of it.
                busy_s = time.monotonic() - hand.busy_since if hand.state == "busy" else 0.0
                is_at_work = hand.state == "busy" and phase != "idle"
                is_at_fault = is_at_work and (is_broken or phase != "update")
                limit_s = self._limit_s(hand, seated) + (GRACE_S if phase == "update" else 0)
                hang_s = max(limit_s, self._hang_s)
                is_stuck = is_at_fault and (min(phase_s, waited_s) > limit_s or phase_s > hang_s)
                is_stuck |= phase == "idle" and min(phase_s, busy_s) > hang_s
            if is_stuck:
                cause = f"was in {phase!r} for {phase_s:.1f} s"
                (reads if phase == "data" else faults).append(
                    Fault(hand.task("pulse"), cause, "lost")
                )
        return faults + self._first_of(reads)

    def _first_of(self, reads: Sequence[Fault]) -> list[Fault]:
        """It may be the storage that pauses: those of one node at a time, who have read longest."""
        if not reads:
            return []
        self._stuck_reads.append(time.monotonic())
        hands = {fault.task.number: self._hands[fault.task.number] for fault in reads}
        longest = max(hands.values(), key=lambda hand: hand.pulse.phase_s if hand.pulse else 0.0)
        return [
            fault
            for fault in reads
            if (hand := hands[fault.task.number]) is longest
            or hand.node_id == longest.node_id is not None
        ]

    def _limit_s(self, hand: Hand, seated: Sequence[Hand]) -> float:
        """How long others wait for what a worker is at."""
        assert hand.pulse is not None
        sends_state = len({other.step for other in seated}) > 1
        if sends_state and hand.pulse.phase == "joining":  # From one to the other, as links allow.
            return PATIENCE_BEFORE_STEPS_S
        if hand.pulse.phase == "save":
            is_configured = self._configured_patience_s is not None
            return max(self.patience_s, 2 * STORING_LIMIT_S if is_configured else SAVE_PATIENCE_S)
        if hand.pulse.phase == "data":
            longer_s = self.patience_s * 2.0 ** (0 if self.is_ending else self._num_stuck_reads)
            return max(self.patience_s, min(self._hang_s, longer_s))
        return self.patience_s

    @property
    def _num_stuck_reads(self) -> int:
        """For how many reads workers were lost not long ago."""
        now = time.monotonic()
        return sum(now - then < READS_REMEMBERED_S for then in self._stuck_reads)

    def stuck_alone(self) -> list[Fault]:
        """Workers that wait for nobody, and are at one thing for too long."""
        faults = []
        for hand in self:
            pulse = hand.pulse
            if pulse is None or pulse.phase in ("idle", "joining", "update", "lease"):
                continue
            if pulse.phase_s > self._limit_alone_s(pulse):
                cause = f"was in {pulse.phase!r} for {pulse.phase_s:.1f} s"
                faults.append(Fault(hand.task("pulse"), cause, "lost"))
        return faults

    def _limit_alone_s(self, pulse: Pulse) -> float:
        if pulse.phase == "starting" or not pulse.longest_step_s:
            return max(PATIENCE_BEFORE_STEPS_S, self.patience_s)
        return self._hang_s if pulse.phase == "data" else self.patience_s

    def tell(self, hand: Hand, method: Literal["request_stop", "abort"]) -> Pending:
        """Call a method of a busy worker, which returns at once."""
        call: Any = getattr(hand.actor, method).options(concurrency_group=CONTROL)
        return {call.remote(): hand.task("tell")}

    def clear(self) -> None:
        """End all of them."""
        end(hand.actor for hand in self)
        self._hands, self.newest_step, self.is_ending = {}, 0, False


def newest_of(hands: Sequence[Hand]) -> list[Hand]:
    """Those who have the newest state that any of them has."""
    steps = [hand.step for hand in hands if hand.step is not None]
    return [hand for hand in hands if steps and hand.step == max(steps)]


def may_have_state(hands: Iterable[Hand]) -> bool:
    """Whether any of them has a state, or is about to tell of one."""
    return any(hand.step is not None or hand.state == "busy" for hand in hands)


def _start(
    worker: Worker, *, warm_up_images: Sequence[int], check_node: Callable[[], None]
) -> Process:
    """In the worker's process: get ready; returns where that is."""
    check_node()
    worker.start()
    if warm_up_images:
        worker.warm_up(warm_up_images)
    return nodes.this_process()
