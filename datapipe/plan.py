"""Which places make up each batch: for lanes, for leases, for evaluation. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from datapipe.lanes import LanePlan, even_part
from datapipe.position import Position, Span


@dataclass(frozen=True)
class Segment:
    """A part of a batch: the places in `spans`, then padding up to `size`."""

    spans: tuple[Span, ...]
    size: int
    upcoming: Span | None = field(default=None, compare=False)
    """Places that the next batches go on with, as far as that is known: they can be read ahead."""


@dataclass(frozen=True)
class BatchPlan:
    """One batch; its shape, the sum of the segments' sizes, does not depend on what is left."""

    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(span for segment in self.segments for span in segment.spans)


def lane_batches(
    start: Position,
    *,
    num_samples: int,
    num_lanes: int,
    samples_per_lane: int,
    lanes: Sequence[int],
    num_epochs: int,
) -> Iterator[BatchPlan]:
    """The batches of the worker that owns `lanes`, one segment a lane, up to epoch `num_epochs`."""
    position = start
    while position.epoch < num_epochs:
        plan = LanePlan(position, num_samples, num_lanes, samples_per_lane)
        for step in range(plan.num_steps):
            yield BatchPlan(
                tuple(
                    Segment(plan.spans(step, lane), samples_per_lane, plan.following(step, lane))
                    for lane in lanes
                )
            )
        position = plan.position_after(plan.num_steps)


def leased_batches(leases: Iterable[Span | None], *, batch_size: int) -> Iterator[BatchPlan]:
    """The batches of an asynchronous worker, lease after lease; the last one has padding.

    So has a batch that was begun when None came: nothing is to be leased for now, and what waits to
    be filled up might wait for ever.
    """
    spans: list[Span] = []
    missing = batch_size
    for lease in leases:
        if lease is None:
            if spans:
                yield BatchPlan((Segment(tuple(spans), batch_size),))
                spans, missing = [], batch_size
            continue
        start = lease.start
        while start < lease.stop:
            stop = min(lease.stop, start + missing)
            spans.append(Span(lease.epoch, start, stop))
            missing -= stop - start
            start = stop
            if not missing:
                rest = Span(lease.epoch, start, lease.stop) if start < lease.stop else None
                yield BatchPlan((Segment(tuple(spans), batch_size, rest),))
                spans, missing = [], batch_size
    if spans:
        yield BatchPlan((Segment(tuple(spans), batch_size),))


def sequential_batches(
    num_samples: int, batch_size: int, *, part: int = 0, num_parts: int = 1
) -> Iterator[BatchPlan]:
    """One pass over a contiguous part of the samples, for evaluation."""
    start, stop = even_part(num_samples, num_parts=num_parts, part=part)
    return leased_batches([Span(0, start, stop)], batch_size=batch_size)
