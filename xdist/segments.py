"""The segments of a synchronous run: at which steps all ranks report, and at which of them they
save.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from datapipe.lanes import LaneWalk
from datapipe.position import Position
from xdist import checkpoint
from xdist.checkpoint import Cut


@dataclass(frozen=True)
class Dealing:
    """How an epoch is dealt to the steps of a synchronous run."""

    num_samples: int
    """Of an epoch."""
    num_lanes: int
    samples_per_lane: int
    """In every step."""

    @property
    def batch_size(self) -> int:
        """Places of a step, as long as all lanes have some."""
        return self.num_lanes * self.samples_per_lane

    def walk(self, position: Position) -> LaneWalk:
        """The steps from `position` on."""
        return LaneWalk(
            position,
            num_samples=self.num_samples,
            num_lanes=self.num_lanes,
            samples_per_lane=self.samples_per_lane,
        )


@dataclass(frozen=True)
class Segment:
    """Steps that all ranks make between two reports. Its last step is saved when there is a cut."""

    start: Cut
    dealing: Dealing
    until_step: int
    cut: Cut | None


@dataclass(frozen=True)
class SegmentRules:
    """Where segments end."""

    num_epochs: int
    max_steps: int | None
    report_every_steps: int
    save_every_samples: int


def segments(start: Cut, dealing: Dealing, rules: SegmentRules) -> Iterator[Segment]:
    """From `start` to the end of the run; the same for every number of workers."""
    num_places = rules.num_epochs * dealing.num_samples
    walk = dealing.walk(start.position)
    step, num_seen = start.step, start.num_samples
    while not _is_over(step, num_seen, num_places, rules):
        before = num_seen
        step += 1
        num_seen += walk.next_step()
        is_over = _is_over(step, num_seen, num_places, rules)
        is_saved = is_over or checkpoint.is_due(before, num_seen, every=rules.save_every_samples)
        if is_saved or step % rules.report_every_steps == 0:
            end = Cut(step, num_seen, walk.position, is_over)
            yield Segment(start, dealing, step, end if is_saved else None)
            start = end


def _is_over(step: int, num_seen: int, num_places: int, rules: SegmentRules) -> bool:
    return num_seen >= num_places or (rules.max_steps is not None and step >= rules.max_steps)


def cut_at(step: int, segment: Segment) -> Cut:
    """The cut after a step of the segment, or at its start."""
    walk = segment.dealing.walk(segment.start.position)
    num_seen = segment.start.num_samples
    for _ in range(step - segment.start.step):
        num_seen += walk.next_step()
    return Cut(step, num_seen, walk.position, is_final=False)


@dataclass(frozen=True)
class Dealer:
    """Deals the steps of a run to workers that come and go."""

    num_samples: int
    """Of an epoch."""
    num_lanes: int
    """For the most workers that there may be."""
    samples_per_lane: int
    most_workers: int
    keeps_worker_batch: bool
    """Whether a worker's samples of a step stay, not those of all."""

    def dealing(self, num_workers: int) -> Dealing:
        """How steps are dealt to so many workers; to more than there may be, as to these."""
        num_lanes = self.num_lanes
        if self.keeps_worker_batch:
            num_lanes = num_lanes // self.most_workers * min(num_workers, self.most_workers)
        return Dealing(self.num_samples, num_lanes, self.samples_per_lane)


class Course:
    """The way of a run from `start` to its end, also when workers come and go on it."""

    def __init__(
        self, start: Cut, dealer: Dealer, rules: SegmentRules, *, num_workers: int
    ) -> None:
        self._dealer = dealer
        self._rules = rules
        self.dealing = dealer.dealing(num_workers)
        self._rest = segments(start, self.dealing, rules)
        self.segment: Segment | None = next(self._rest, None)
        """The one that is under way; None when the run is over."""

    def complete_segment(self) -> None:
        """On to the next one."""
        self.segment = next(self._rest, None)

    def cut_at(self, step: int) -> Cut:
        """What is done after this step of the segment."""
        assert self.segment is not None
        assert self.segment.start.step <= step <= self.segment.until_step
        return cut_at(step, self.segment)

    def step_to_go_on_from(self, step: int | None) -> int | None:
        """A state's step, if training can go on from it: not that of a checkpoint long past."""
        is_past = step is not None and self.segment is not None and step < self.segment.start.step
        return None if is_past else step

    def cut_short(self, step: int) -> None:
        """The segment ends at this step, and is saved there."""
        cut = self.cut_at(step)
        assert self.segment is not None
        if step == self.segment.until_step and self.segment.cut is not None:
            return
        self.segment = replace(self.segment, until_step=step, cut=cut)
        self._rest = segments(cut, self.dealing, self._rules)

    def save_at_end(self) -> None:
        """The segment's last step is to be saved, also where the rules do not say so."""
        assert self.segment is not None
        if self.segment.cut is None:
            cut = self.cut_at(self.segment.until_step)
            self.segment = replace(self.segment, cut=cut)

    def regrouped(self, step: int, *, num_workers: int) -> Course:
        """The way on, if so many workers go it after this step of the segment. This one stays as it
        is: they may not come together.

        A segment whose last step this is stays: it is still to be reported, and saved.
        """
        cut = self.cut_at(step)
        if self._dealer.dealing(num_workers) == self.dealing:
            return self
        assert self.segment is not None
        course = Course(cut, self._dealer, self._rules, num_workers=num_workers)
        if step == self.segment.until_step:
            course._rest = segments(cut, course.dealing, self._rules)
            course.segment = self.segment
        return course
