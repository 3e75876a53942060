"""The segments of a synchronous run: at which steps all ranks report, and at which of them they
save. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from datapipe.lanes import LanePlan
from xdist import checkpoint
from xdist.checkpoint import Cut


@dataclass(frozen=True)
class Segment:
    """Steps that all ranks make between two reports. Its last step is saved when there is a cut."""

    until_step: int
    cut: Cut | None


class SegmentPlanner:
    """Walks a synchronous run from `start` to its end; the same walk for every number of
    workers.
    """

    def __init__(
        self,
        start: Cut,
        *,
        num_samples: int,
        num_lanes: int,
        samples_per_lane: int,
        num_epochs: int,
        max_steps: int | None,
        report_every_steps: int,
        save_every_samples: int,
    ) -> None:
        self._num_samples = num_samples
        self._num_lanes = num_lanes
        self._samples_per_lane = samples_per_lane
        self._num_epochs = num_epochs
        self._max_steps = max_steps
        self._report_every_steps = report_every_steps
        self._save_every_samples = save_every_samples
        self._step = start.step
        self._steps_in_plan = 0
        self._position = start.position
        self._plan = self._deal()

    def next_segment(self) -> Segment | None:
        """The segment after the last one; None when the run is over."""
        if self._is_over:
            return None
        while True:
            before = self._position.num_seen(self._num_samples)
            self._advance()
            after = self._position.num_seen(self._num_samples)
            if self._is_over or checkpoint.is_due(before, after, every=self._save_every_samples):
                return Segment(self._step, Cut(self._step, after, self._position, self._is_over))
            if self._step % self._report_every_steps == 0:
                return Segment(self._step, None)

    @property
    def _is_over(self) -> bool:
        at_limit = self._max_steps is not None and self._step >= self._max_steps
        return at_limit or self._position.epoch >= self._num_epochs

    def _advance(self) -> None:
        self._step += 1
        self._steps_in_plan += 1
        self._position = self._plan.position_after(self._steps_in_plan)
        if self._steps_in_plan == self._plan.num_steps:
            self._steps_in_plan = 0
            self._plan = self._deal()

    def _deal(self) -> LanePlan:
        return LanePlan(self._position, self._num_samples, self._num_lanes, self._samples_per_lane)
