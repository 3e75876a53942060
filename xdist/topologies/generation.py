"""Generation: one group of synchronous workers, from its forming until the next one replaces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from xdist.segments import Course
from xdist.strategies.group import Rendezvous
from xdist.topologies import Fault, Task
from xdist.topologies.crew import Hand
from xdist.topologies.seats import Seat

MOST_FAILED = 2
"""Of a kind that may pass, as a switch that starts again does."""


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
    complaints: list[tuple[int, str]] = field(default_factory=list)
    """What workers that are there, by their lives, said of others, since `unexplained` was asked
    last.
    """

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

    def unexplained(self, present: Sequence[Hand]) -> tuple[Fault, ...]:
        """The faults of a group that parted, or did not come together, though all of it is there:
        of those who have trained in none yet, if others have; of a link, and if that happens
        again, of who complained first: it reaches the driver, but not its peers, or these not it.
        """
        complaints, self.complaints = self.complaints, []
        if self.has_lost or not complaints:
            self.num_failed = 0
            return ()
        first, cause = complaints[0]
        new = [hand for hand in present if not hand.has_trained]
        if self.round == "join" and 0 < len(new) < len(present):
            return tuple(Fault(hand.task("join"), cause, "lost") for hand in new)
        has_moved = any(hand.step is not None and hand.step > self.step for hand in present)
        self.num_failed = 0 if has_moved else self.num_failed + 1
        if self.num_failed >= MOST_FAILED and len(present) > 1:
            self.num_failed = 0
            return tuple(
                Fault(hand.task("join"), cause, "lost") for hand in present if hand.life == first
            )
        return (Fault(Task("link", "train", 0), cause, "link"),)
