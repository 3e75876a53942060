"""Crew: the worker actors of a synchronous run, what is known of each, and who does not answer.

Every worker that runs has a pulse: a call on a thread of its own that comes back once a second. A
process that was stopped, or whose node cannot be reached, leaves it unanswered; one that is stuck
says in what. Both are for their own deadline to notice: nothing else would tell.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from xdist.topologies import Fault, Pending, Task, nodes
from xdist.topologies.actors import CONTROL, end
from xdist.topologies.nodes import Process
from xdist.worker import Pulse, Worker

logger = logging.getLogger(__name__)

PULSE_S = 1.0
"""Between two pulses of a worker."""
LEAST_PATIENCE_S = 10.0
STEPS_OF_PATIENCE = 5.0
PATIENCE_BEFORE_STEPS_S = 600.0
"""As long as no step was made: a first one may compile, or read cold data."""
GRACE_S = 5.0
"""For a pulse, once somebody has said that a peer is lost."""
START_PATIENCE_S = 60.0
"""For a pulse of a worker that starts: it may import what lets no other thread run."""

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
    has_trained: bool = False
    process: Process | None = None
    pulse: Pulse | None = None
    """The last one; before the first, its process may not be there yet."""
    pulse_reference: ray.ObjectRef[Any] | None = None
    pulse_sent: float = field(default_factory=time.monotonic)
    started: float = 0.0
    """When it was ready; its first pulse may have been sent long before."""

    @property
    def node_id(self) -> str | None:
        return None if self.process is None else self.process.node_id

    def task(self, action: Any) -> Task:
        return Task(f"worker {self.number}", action, self.number, life=self.life)


class Crew:
    """The actors, by the numbers of the workers."""

    def __init__(
        self, make_actor: MakeActor, *, patience_s: float | None, warm_up_images: Sequence[int]
    ) -> None:
        """patience_s: before a worker counts as lost; None: by the time of its steps.
        warm_up_images: how many there are in each part of the batch that a late worker computes
        before it joins.
        """
        self._make_actor = make_actor
        self._configured_patience_s = patience_s
        self._warm_up_images = warm_up_images
        self._hands: dict[int, Hand] = {}
        self._lives = itertools.count(1)
        self.longest_step_s = 0.0

    def __iter__(self) -> Iterator[Hand]:
        return iter(self._hands.values())

    def alive(self, life: int) -> Hand | None:
        """The worker of this life; None if it is gone."""
        return next((hand for hand in self if hand.life == life), None)

    def find(self, task: Task) -> Hand | None:
        """Who was asked this; None if that one is gone."""
        hand = self._hands.get(task.number)
        return hand if hand is not None and hand.life == task.life else None

    def start(self, number: int, *, step: int | None) -> Pending:
        """Start a worker. step: that of the checkpoint that it reads its state from; None: a peer
        will send it.
        """
        actor = self._make_actor(number, step is not None)
        hand = Hand(number, next(self._lives), actor, "starting", step)
        self._hands[number] = hand
        warm_up_images = self._warm_up_images if step is None else ()
        task = replace(hand.task("start"), is_alone=step is None)
        started: ray.ObjectRef[Any] = actor.__ray_call__.remote(_start, warm_up_images)
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

    def felt(self, hand: Hand, pulse: Pulse) -> Pending:
        """A pulse came back; send the next one."""
        hand.pulse = pulse
        longest = max(other.pulse.longest_step_s for other in self if other.pulse)
        self.longest_step_s = longest or self.longest_step_s  # Those who are new know of none.
        return self._feel(hand)

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
        if not self.longest_step_s:
            return PATIENCE_BEFORE_STEPS_S
        return max(LEAST_PATIENCE_S, STEPS_OF_PATIENCE * self.longest_step_s)

    def silent(self, *, is_broken: bool) -> list[Fault]:
        """Workers whose process does not answer. is_broken: somebody has said that one is lost."""
        usual_s = GRACE_S if is_broken else min(self.patience_s, LEAST_PATIENCE_S)
        now = time.monotonic()
        faults = []
        for hand in self:
            limit_s = PULSE_S + (START_PATIENCE_S if hand.state == "starting" else usual_s)
            is_there = hand.state != "starting" or hand.pulse is not None
            if not is_there or now - max(hand.pulse_sent, hand.started) <= limit_s:
                continue
            if not ray.wait([hand.pulse_reference], timeout=0)[0]:
                cause = f"gave no answer for {limit_s:g} s"
                faults.append(Fault(hand.task("pulse"), cause, "lost"))
        return faults

    def stuck(self, seated: Sequence[Hand], *, is_broken: bool) -> list[Fault]:
        """Workers of a group that others wait for, and who are at one thing for too long; and those
        that do not come to their start's end.
        """
        limit_s = self.patience_s + (GRACE_S if is_broken else 0)
        faults = []
        for hand in self:
            if hand.pulse is None:
                continue
            if hand.state == "starting":
                is_stuck = hand.pulse.phase_s > PATIENCE_BEFORE_STEPS_S
            else:
                others = [other for other in seated if other is not hand]
                is_waited_for = hand.state == "busy" and any(map(_waits, others))
                # One that is idle has not heard yet of what it is to do.
                is_at_work = hand.pulse.phase != "idle" and (
                    is_broken or hand.pulse.phase != "update"
                )
                is_stuck = is_waited_for and is_at_work and hand.pulse.phase_s > limit_s
            if is_stuck:
                cause = f"was in {hand.pulse.phase!r} for {hand.pulse.phase_s:.1f} s"
                faults.append(Fault(hand.task("pulse"), f"{cause}, while others waited", "lost"))
        return faults

    def tell(self, hand: Hand, method: Literal["request_stop", "abort"]) -> Pending:
        """Call a method of a busy worker, which returns at once."""
        call: Any = getattr(hand.actor, method).options(concurrency_group=CONTROL)
        return {call.remote(): hand.task("tell")}

    def clear(self) -> None:
        """End all of them."""
        end(hand.actor for hand in self)
        self._hands = {}


def _waits(hand: Hand) -> bool:
    """Whether a member of a group has done its part, and waits for others."""
    return hand.state == "idle" or (hand.pulse is not None and hand.pulse.phase == "update")


def _start(worker: Worker, warm_up_images: Sequence[int]) -> Process:
    """In the worker's process: get ready; returns where that is."""
    worker.start()
    if warm_up_images:
        worker.warm_up(warm_up_images)
    return Process(nodes.here(), os.getpid())
