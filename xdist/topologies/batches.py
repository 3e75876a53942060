"""Where a worker's batches come from, and which of them were applied.

A batch that was taken and not applied, as its update was interrupted, comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from datapipe.batch import Batch
from datapipe.batch_stream import BatchStream
from datapipe.plan import BatchPlan, lane_batches, leased_batches
from xdist.segments import Dealing
from xdist.strategies.all_reduce import Membership
from xdist.strategies.push_pull import PushPull
from xdist.topologies import RunPlan

OpenStream = Callable[[Iterator[BatchPlan]], BatchStream]


class TrainingStreams:
    """Opens streams of batches of a run's training set, of which the index is read once."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._index = plan.data.open_index()

    def __call__(self, plans: Iterator[BatchPlan]) -> BatchStream:
        return BatchStream.of_plans(
            self._index,
            self._plan.config.data,
            plans,
            order=self._plan.order,
            training=True,
            num_classes=self._plan.num_classes,
        )


class LaneBatches:
    """The batches of the lanes that a rank owns. While these stay the same, so does the stream:
    what it has read ahead is not read again.
    """

    def __init__(self, open_stream: OpenStream, *, num_epochs: int) -> None:
        self._open_stream = open_stream
        self._num_epochs = num_epochs
        self._stream: BatchStream | None = None
        self._taken: Batch | None = None
        self._step = 0
        self._lanes: tuple[int, ...] = ()
        self._dealing: Dealing | None = None

    @classmethod
    def of(cls, plan: RunPlan) -> LaneBatches:
        return cls(TrainingStreams(plan), num_epochs=plan.config.num_epochs)

    def join(self, membership: Membership, _strategy: Any) -> None:
        if self._taken is not None and membership.step == self._step + 1:
            self.applied()  # By the others, whose update went through.
        is_same = (self._lanes, self._dealing) == (membership.lanes, membership.dealing)
        if self._stream is None or not is_same or membership.step != self._step:
            self._open(membership)

    def _open(self, membership: Membership) -> None:
        if self._stream is not None:
            self._stream.close()
        dealing = membership.dealing
        plans = lane_batches(
            membership.position,
            num_samples=dealing.num_samples,
            num_lanes=dealing.num_lanes,
            samples_per_lane=dealing.samples_per_lane,
            lanes=membership.lanes,
            num_epochs=self._num_epochs,
        )
        self._stream = self._open_stream(plans)
        self._taken = None
        self._step, self._lanes, self._dealing = membership.step, membership.lanes, dealing

    def take(self) -> Batch | None:
        assert self._stream is not None
        if self._taken is None:
            self._taken = next(self._stream, None)
        return self._taken

    def applied(self) -> None:
        self._taken = None
        self._step += 1


class LeasedBatches:
    """The batches of what the ledger leases to an asynchronous worker."""

    def __init__(self, open_stream: OpenStream, *, batch_size: int) -> None:
        self._open_stream = open_stream
        self._batch_size = batch_size
        self._stream: BatchStream | None = None

    @classmethod
    def of(cls, plan: RunPlan) -> LeasedBatches:
        return cls(TrainingStreams(plan), batch_size=plan.config.batch_size)

    def join(self, _membership: Any, strategy: PushPull) -> None:
        if self._stream is not None:
            self._stream.close()
        leases = leased_batches(strategy.leases(), batch_size=self._batch_size)
        self._stream = self._open_stream(leases)

    def take(self) -> Batch | None:
        assert self._stream is not None
        return next(self._stream, None)

    def applied(self) -> None:
        """Its push was committed: the ledger knows."""
