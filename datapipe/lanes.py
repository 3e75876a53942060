"""How synchronous workers share an epoch: lanes.

What remains of an epoch is cut into `num_lanes` contiguous parts of equal length (the first ones
may have one place more). Every step takes the same number of places from each lane, so the places
of a step do not depend on the number of workers; lanes belong to workers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from datapipe.position import Position, Span


def even_part(total: int, *, num_parts: int, part: int) -> tuple[int, int]:
    """[start, stop) of one of `num_parts` contiguous parts of 0 .. total - 1; sizes differ by 1."""
    size, num_larger = divmod(total, num_parts)
    start = part * size + min(part, num_larger)
    return start, start + size + (part < num_larger)


def assign_lanes(num_lanes: int, world_size: int) -> tuple[tuple[int, ...], ...]:
    """The lanes of every rank: contiguous, as even as they can be. Ranks beyond `num_lanes` have
    none.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; allowed: at least 1")
    return tuple(
        tuple(range(*even_part(num_lanes, num_parts=world_size, part=rank)))
        for rank in range(world_size)
    )


def move_lanes(lanes: Sequence[tuple[int, ...]], num_lanes: int) -> tuple[tuple[int, ...], ...]:
    """The lanes of every rank, from those that they had: what belongs to nobody goes to whoever has
    least; then whoever has most gives to whoever has least, until they differ by one at most. No
    other lane moves.
    """
    if not lanes:
        raise ValueError("world_size is 0; allowed: at least 1")
    owned = [list(own) for own in lanes]
    for lane in sorted(set(range(num_lanes)).difference(*owned)):
        min(owned, key=len).append(lane)
    while len(most := max(owned, key=len)) - len(least := min(owned, key=len)) > 1:
        least.append(most.pop())
    return tuple(tuple(sorted(own)) for own in owned)


@dataclass(frozen=True)
class LanePlan:
    """The steps through what remains of `position.epoch`.

    A plan made from `position_after(k)`, with the same `num_lanes` and `samples_per_lane`,
    continues with the very same places; made with other numbers, it deals what is left anew.
    """

    position: Position
    num_samples: int
    num_lanes: int
    samples_per_lane: int

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_lanes", "samples_per_lane"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        if not self._remaining:
            raise ValueError(
                f"{self.position} leaves nothing of an epoch of {self.num_samples} samples; "
                "it is a position in another data set"
            )

    @property
    def num_steps(self) -> int:
        """Steps until every lane is at its end."""
        longest = -(-self._ends[-1] // self.num_lanes)
        return -(-longest // self.samples_per_lane)

    def spans(self, step: int, lane: int) -> tuple[Span, ...]:
        """The places that this lane gives to this step: `samples_per_lane`, fewer at its end."""
        return self._lane_spans(lane, from_step=step, to_step=step + 1)

    def num_places(self, step: int) -> int:
        """Places that all lanes together give to this step."""
        length, num_longer = divmod(self._ends[-1], self.num_lanes)
        num_before = step * self.samples_per_lane
        longer, others = (
            min(max(size - num_before, 0), self.samples_per_lane) for size in (length + 1, length)
        )
        return num_longer * longer + (self.num_lanes - num_longer) * others

    def following(self, step: int, lane: int) -> Span | None:
        """The run of places that this lane goes on with after a step; None at its end."""
        start, stop = even_part(self._ends[-1], num_parts=self.num_lanes, part=lane)
        first = start + (step + 1) * self.samples_per_lane
        if first >= stop:
            return None
        (span,) = self._cut(first, min(stop, self._ends[bisect_right(self._ends, first)]))
        return span

    def position_after(self, num_steps: int) -> Position:
        done = [
            span
            for lane in range(self.num_lanes)
            for span in self._lane_spans(lane, from_step=0, to_step=num_steps)
        ]
        return self.position.with_done(done, num_samples=self.num_samples)

    @cached_property
    def _remaining(self) -> tuple[Span, ...]:
        return self.position.remaining(self.position.epoch, num_samples=self.num_samples)

    @cached_property
    def _ends(self) -> list[int]:
        """For each remaining span: how many places remain up to its end."""
        return list(accumulate(span.num_samples for span in self._remaining))

    def _lane_spans(self, lane: int, *, from_step: int, to_step: int) -> tuple[Span, ...]:
        start, stop = even_part(self._ends[-1], num_parts=self.num_lanes, part=lane)
        first = start + from_step * self.samples_per_lane
        return self._cut(first, min(stop, start + to_step * self.samples_per_lane))

    def _cut(self, first: int, last: int) -> tuple[Span, ...]:
        """The remaining places number first .. last - 1, as spans."""
        spans = []
        number = bisect_right(self._ends, first)
        while first < last:
            span, end = self._remaining[number], self._ends[number]
            stop = min(last, end)
            spans.append(Span(span.epoch, span.stop - (end - first), span.stop - (end - stop)))
            first, number = stop, number + 1
        return tuple(spans)


class LaneWalk:
    """The steps of a run, from `position` on, through as many epochs as one likes."""

    def __init__(
        self, position: Position, *, num_samples: int, num_lanes: int, samples_per_lane: int
    ) -> None:
        self._num_samples = num_samples
        self._num_lanes = num_lanes
        self._samples_per_lane = samples_per_lane
        self._deal(position)

    @property
    def position(self) -> Position:
        """What is done before the next step."""
        return self._plan.position_after(self._num_steps)

    def next_step(self) -> int:
        """Make a step; returns its places."""
        if self._num_steps == self._plan.num_steps:
            self._deal(self.position)
        self._num_steps += 1
        return self._plan.num_places(self._num_steps - 1)

    def _deal(self, position: Position) -> None:
        self._num_steps = 0
        self._plan = LanePlan(position, self._num_samples, self._num_lanes, self._samples_per_lane)
