"""Generation: one group of synchronous workers, from its forming until the next one replaces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from datapipe.position import Position
from xdist.segments import Course
from xdist.strategies.all_reduce import Membership
from xdist.strategies.group import Rendezvous
from xdist.topologies import Fault, Task
from xdist.topologies.crew import Hand
from xdist.topologies.seats import Seat, senders
from xdist.worker_messages import Parting

MOST_FAILED = 2
"""Where no link is known to be down; what it was may pass."""


@dataclass(frozen=True)
class Complaint:
    """What a worker says of others that it takes for lost."""

    life: int
    """Its own."""
    cause: str
    unreached: frozenset[int]
    """The lives of those to whom no link is up from it."""


@dataclass
class Generation:
    """Who is in it, and what has become of it. The one before the first has nobody in it."""

    rendezvous: Rendezvous
    course: Course
    """The way that it goes once it has come together."""
    seats: tuple[Seat, ...] = ()
    """In the order of the ranks; also those of workers that are lost meanwhile."""
    step: int = 0
    """Of the state that it begins with."""
    num_failed: int = 0
    """Generations one after the other, up to the one before, that made no step though nobody was
    lost.
    """
    round: Literal["join", "train"] | None = None
    """What all its workers were last told to do; None once they are done with it."""
    has_lost: bool = False
    """A worker is gone."""
    is_broken: bool = False
    """A worker is gone, or says that another one does not answer: it will not finish its step."""
    is_aborted: bool = False
    """Broken, and those who wait for others were told to give up."""
    is_stopping: bool = False
    """It was told to stop at the end of a step."""
    complaints: list[Complaint] = field(default_factory=list)
    """Since `unexplained` was asked last."""

    @property
    def number(self) -> int:
        return self.rendezvous.generation

    @property
    def lives(self) -> frozenset[int]:
        return frozenset(seat.life for seat in self.seats)

    def next(self, seats: tuple[Seat, ...], course: Course, *, step: int) -> Generation:
        """The one that replaces it; its workers are to join, with the state of this step."""
        rendezvous = replace(self.rendezvous, generation=self.number + 1)
        return Generation(rendezvous, course, seats, step, num_failed=self.num_failed, round="join")

    def memberships(
        self, steps: Sequence[int | None], *, position: Position, timeout_s: float
    ) -> list[Membership]:
        """What its ranks are told, who have states of these steps. position: of the data, at its
        own step.
        """
        return [
            Membership(
                self.rendezvous,
                rank=rank,
                world_size=len(self.seats),
                dealing=self.course.dealing,
                lanes=seat.lanes,
                step=self.step,
                position=position,
                senders=senders(steps, newest=self.step),
                timeout_s=timeout_s,
            )
            for rank, seat in enumerate(self.seats)
        ]

    def complain(self, hand: Hand, parting: Parting) -> None:
        """A worker that is there has parted from the others."""
        unreached = frozenset(self.seats[rank].life for rank in parting.unreached)
        self.complaints.append(Complaint(hand.life, parting.cause, unreached))

    def unexplained(self, present: Sequence[Hand]) -> tuple[Fault, ...]:
        """The faults of a group that parted, or did not come together, though all of it is there.

        That of a link, which may be up again by now, or may matter to nobody, as long as a step is
        made between two of them. Else those are lost who are cut off from the others, though they
        reach the driver; those of them who have never trained with others at once. Where all links
        are up it is those who are new and have not got the state, or at last who complained first.
        """
        complaints, self.complaints = self.complaints, []
        if self.has_lost or not complaints:
            self.num_failed = 0
            return ()
        cause, first = complaints[0].cause, complaints[0].life
        is_cut_off = cut_off(_links(complaints), order=_by_merit(present))
        suspects = [hand for hand in present if hand.life in is_cut_off]
        new = [hand for hand in suspects or present if not hand.has_trained]
        if not suspects:
            new = [hand for hand in new if hand.step != self.step]
        if self.round == "join" and 0 < len(new) < len(present):
            return _lost(new, cause)
        has_moved = any(hand.step is not None and hand.step > self.step for hand in present)
        self.num_failed = 0 if has_moved else self.num_failed + 1
        if self.num_failed >= (1 if suspects else MOST_FAILED) and len(present) > 1:
            self.num_failed = 0
            return _lost(suspects or [hand for hand in present if hand.life == first], cause)
        return (Fault(Task("link", "train", 0), cause, "link"),)


def _lost(hands: Sequence[Hand], cause: str) -> tuple[Fault, ...]:
    return tuple(Fault(hand.task("join"), cause, "lost") for hand in hands)


def _links(complaints: Sequence[Complaint]) -> set[frozenset[int]]:
    """The links that are down, by the lives at their ends."""
    return {frozenset((one.life, other)) for one in complaints for other in one.unreached}


def _by_merit(present: Sequence[Hand]) -> list[int]:
    """The lives of workers in the order of their ranks, those first who are missed least: who lacks
    the newest state, or has not trained yet.
    """
    newest = max((hand.step for hand in present if hand.step is not None), default=None)
    later_first = reversed(present)
    by_merit = sorted(later_first, key=lambda hand: (hand.step == newest, hand.has_trained))
    return [hand.life for hand in by_merit]


def cut_off(links: set[frozenset[int]], *, order: Sequence[int]) -> frozenset[int]:
    """Few without whom all links that are down are nobody's: again and again who has most of them,
    the first in this order of several.
    """
    found: set[int] = set()
    while left := {link for link in links if link <= set(order) - found}:
        found.add(max(order, key=lambda life: sum(life in link for link in left)))
    return frozenset(found)
