"""Position: which samples are done; one type for every set-up and any number of workers."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Interval = tuple[int, int]


@dataclass(frozen=True, order=True)
class Span:
    """Places [start, stop) of one epoch's sequence of samples."""

    epoch: int
    start: int
    stop: int

    @property
    def num_samples(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Position:
    """What has been trained on: all epochs before `epoch`, and the places in `done`.

    `done` holds sorted, disjoint, non-adjacent intervals counted from the start of `epoch`. They
    may reach into the epochs that follow, since asynchronous workers start an epoch without a
    barrier. Whenever all of `epoch` is done, the position moves on to the next one.
    """

    epoch: int = 0
    done: tuple[Interval, ...] = ()

    def with_done(self, spans: Iterable[Span], *, num_samples: int) -> Position:
        """The position after these spans too. `ValueError` if a place of theirs was done before."""
        merged = list(self.done)
        for span in spans:
            if span.num_samples:
                _insert(merged, self._interval(span, num_samples=num_samples), epoch=self.epoch)
        epoch = self.epoch
        while merged and merged[0][0] == 0 and merged[0][1] >= num_samples:
            epoch += 1
            merged = [
                (max(0, start - num_samples), stop - num_samples)
                for start, stop in merged
                if stop > num_samples
            ]
        return Position(epoch=epoch, done=tuple(merged))

    def remaining(self, epoch: int, *, num_samples: int) -> tuple[Span, ...]:
        """The places of that epoch which are not done, in order."""
        if epoch < self.epoch:
            return ()
        shift = (epoch - self.epoch) * num_samples
        spans = []
        cursor = 0
        for start, stop in (*self.done, (shift + num_samples, shift + num_samples)):
            start, stop = max(0, start - shift), min(num_samples, stop - shift)
            if cursor < min(start, num_samples):
                spans.append(Span(epoch, cursor, min(start, num_samples)))
            cursor = max(cursor, stop)
        return tuple(spans)

    def num_seen(self, num_samples: int) -> int:
        """Places done since training began, in all epochs."""
        return self.epoch * num_samples + sum(stop - start for start, stop in self.done)

    def to_json(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "done": [list(interval) for interval in self.done]}

    @staticmethod
    def from_json(value: Any) -> Position:
        """Read back what `to_json` wrote; anything else is a `ValueError`."""
        well_formed = (
            isinstance(value, dict)
            and set(value) == {"epoch", "done"}
            and _is_integers([value["epoch"]], 1)
            and isinstance(value["done"], list)
            and all(_is_integers(interval, 2) for interval in value["done"])
        )
        if not well_formed:
            raise ValueError(
                f"position is {value!r}; allowed: {{'epoch': e, 'done': [[a, b], ...]}}"
            )
        done = tuple((start, stop) for start, stop in value["done"])
        edges = [edge for interval in done for edge in interval]
        if value["epoch"] < 0 or any(edge < 0 for edge in edges):
            raise ValueError(f"position is {value!r}; allowed: no negative numbers")
        if any(a >= b for a, b in pairwise(edges)):
            raise ValueError(
                f"position is {value!r}; allowed: sorted, disjoint, non-empty intervals"
            )
        return Position(epoch=value["epoch"], done=done)

    def _interval(self, span: Span, *, num_samples: int) -> Interval:
        if not 0 <= span.start <= span.stop <= num_samples:
            raise ValueError(f"{span} is outside an epoch of {num_samples} samples")
        if span.epoch < self.epoch:
            raise ValueError(f"{span} was done before: epoch {self.epoch} has begun")
        shift = (span.epoch - self.epoch) * num_samples
        return (shift + span.start, shift + span.stop)


def _insert(intervals: list[Interval], added: Interval, *, epoch: int) -> None:
    """Put an interval among sorted, disjoint, non-adjacent ones, in place."""
    start, stop = added
    place = bisect(intervals, added)
    first, last = place, place
    if place and intervals[place - 1][1] >= start:
        first = place - 1
    if place < len(intervals) and intervals[place][0] <= stop:
        last = place + 1
    for other_start, other_stop in intervals[first:last]:
        if other_start < stop and start < other_stop:
            overlap = f"[{max(start, other_start)}, {min(stop, other_stop)})"
            raise ValueError(f"places {overlap} from epoch {epoch} on were done before")
    touched = [added, *intervals[first:last]]
    intervals[first:last] = [(min(touched)[0], max(end for _, end in touched))]


def _is_integers(value: Any, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )
