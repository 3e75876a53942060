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


@dataclass
class Generation:
    """Who is in it, and what has become of it. The one before the first has nobody in it."""

    rendezvous: Rendezvous
    course: Course
    """The way that it goes once it has come together."""
    seats: tuple[Seat, ...] = ()
    """In the order of the ranks; also those of workers that are lost meanwhile."""
    newcomers: frozenset[int] = frozenset()
    """Lives of those who were not in the one before."""
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
    complaints: list[str] = field(default_factory=list)
    """What workers that are there said of others, since `unexplained` was asked last."""

    @property
    def number(self) -> int:
        return self.rendezvous.generation

    @property
    def lives(self) -> frozenset[int]:
        return frozenset(seat.life for seat in self.seats)

    def next(self, seats: tuple[Seat, ...], course: Course) -> Generation:
        """The one that replaces it; its workers are to join."""
        rendezvous = replace(self.rendezvous, generation=self.number + 1)
        newcomers = frozenset(seat.life for seat in seats) - self.lives
        return Generation(rendezvous, course, seats, newcomers, round="join")

    def unexplained(self, present: Sequence[Hand]) -> tuple[Fault, ...]:
        """The faults of a group that parted, or did not come together, though all of it is there:
        of those who were new in it, if it did well before them.
        """
        complaints, self.complaints = self.complaints, []
        if self.has_lost or not complaints:
            return ()
        new = [hand for hand in present if hand.life in self.newcomers]
        if self.round == "join" and 0 < len(new) < len(present):
            return tuple(Fault(hand.task("join"), complaints[0], "lost") for hand in new)
        return (Fault(Task("link", "train", 0), complaints[0], "link"),)
