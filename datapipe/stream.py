"""SampleStream: one worker's share of all epochs, from any position on."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from datapipe.batch import Batch
from datapipe.batch_stream import BatchStream
from datapipe.config import DataConfig
from datapipe.counters import StreamCounters
from datapipe.errors import CorruptSample
from datapipe.index import ShardIndex
from datapipe.lanes import LaneWalk, assign_lanes
from datapipe.order import Order
from datapipe.plan import lane_batches
from datapipe.position import Position


class SampleStream:
    """An iterator of the batches of one of `world_size` workers that advance in step.

    Every sample comes once an epoch, over all workers; all have the same number of batches, each of
    `batch_size` / `num_lanes` rows for each lane that the worker owns. `position()` is all that has
    to be kept: a stream made from it goes on with the very next sample, in the middle of an epoch,
    with another number of workers, lanes or samples a batch too; with the same `num_lanes` and
    `batch_size`, the samples of each step are the same for every number of workers.

    `next` raises what `BatchStream` does. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        index: ShardIndex,
        config: DataConfig,
        *,
        order: Order,
        position: Position,
        batch_size: int,
        num_lanes: int,
        rank: int,
        world_size: int,
        num_epochs: int,
        training: bool,
        num_classes: int,
    ) -> None:
        """batch_size: samples of a step, over all workers. num_lanes: a divisor of it, at least
        `world_size`; several times as many let workers come and go. Raises `ValueError`.
        """
        if not 1 <= world_size <= num_lanes:
            raise ValueError(f"world_size is {world_size}; allowed: 1 to num_lanes ({num_lanes})")
        lanes = assign_lanes(num_lanes, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; allowed: 0 to {world_size - 1}")
        if batch_size < 1 or batch_size % num_lanes:
            raise ValueError(f"batch_size is {batch_size}; allowed: multiples of {num_lanes} lanes")
        if order.num_samples != index.num_samples:
            raise ValueError(
                f"order has {order.num_samples} samples, index {index.num_samples}; make the order "
                "from index.num_samples"
            )
        self._walk = LaneWalk(
            position,
            num_samples=order.num_samples,
            num_lanes=num_lanes,
            samples_per_lane=batch_size // num_lanes,
        )
        plans = lane_batches(
            position,
            num_samples=order.num_samples,
            num_lanes=num_lanes,
            samples_per_lane=batch_size // num_lanes,
            lanes=lanes[rank],
            num_epochs=num_epochs,
        )
        self._batches = BatchStream.of_plans(
            index, config, plans, order=order, training=training, num_classes=num_classes
        )

    @property
    def corrupt(self) -> tuple[CorruptSample, ...]:
        """The samples that could not be used so far, each once."""
        return tuple(self._batches.corrupt.values())

    def counters(self) -> StreamCounters:
        """What this worker's stream has given so far."""
        return self._batches.counters()

    def position(self) -> Position:
        """What all workers have done, once they have used as many batches as this one has given."""
        return self._walk.position

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._walk.next_step()
        return batch

    def close(self) -> None:
        """End the threads."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
