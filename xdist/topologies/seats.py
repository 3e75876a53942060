"""Who sits where in a group of ranks, from who sat there before and who is there now. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from datapipe.lanes import assign_lanes, move_lanes


@dataclass(frozen=True)
class Seat:
    """A rank: who has it, and its lanes."""

    life: int
    """Of the actor."""
    lanes: tuple[int, ...] = ()


def reseat(
    seats: Sequence[Seat], *, present: Collection[int], joining: Sequence[int], most: int
) -> tuple[Seat, ...]:
    """The ranks of the next group, at most `most`: who is present keeps its place in the order; who
    joins takes the place and the lanes of somebody lost, else comes last.

    A rank that was swapped in so adds what the lost one would have added, in the same order: to the
    bit. The lanes are complete only after `with_lanes`.
    """
    joining = list(joining)
    num_free = max(0, most - sum(seat.life in present for seat in seats))
    joining = joining[:num_free]
    next_seats = []
    for seat in seats:
        if seat.life in present:
            next_seats.append(seat)
        elif joining:
            next_seats.append(Seat(joining.pop(0), seat.lanes))
    return (*next_seats, *map(Seat, joining))


def with_lanes(seats: Sequence[Seat], *, num_lanes: int, dealt_anew: bool) -> tuple[Seat, ...]:
    """The same seats with all lanes: dealt anew, or as few of them moved as can be."""
    if dealt_anew:
        lanes = assign_lanes(num_lanes, len(seats))
    else:
        lanes = move_lanes([seat.lanes for seat in seats], num_lanes)
    return tuple(Seat(seat.life, own) for seat, own in zip(seats, lanes, strict=True))


def senders(steps: Sequence[int | None], *, newest: int) -> dict[int, int]:
    """Ranks that have not the state of step `newest` -> the rank that sends it to them, in the
    order in which each sends: who has got it sends it on, so that twice as many have it each time.

    steps: of each rank; None where it has no state yet.
    """
    have = [rank for rank, step in enumerate(steps) if step == newest]
    lack = [rank for rank, step in enumerate(steps) if step != newest]
    found: dict[int, int] = {}
    while lack:
        now, lack = lack[: len(have)], lack[len(have) :]
        found |= dict(zip(now, have, strict=False))
        have += now
    return found
