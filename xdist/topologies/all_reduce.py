"""AllReduceTopology: synchronous workers, each of which owns all state.

All ranks get the same segment before anything is waited for. When one is lost, all start again from
the last checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from datapipe.batch import Batch
from datapipe.lanes import assign_lanes
from datapipe.position import Position
from datapipe.stream import SampleStream
from xdist import sizing
from xdist.checkpoint import Checkpoint
from xdist.flat import FlatModel
from xdist.segments import Segment, SegmentPlanner
from xdist.strategies import UpdateStrategy
from xdist.strategies.all_reduce import AllReduce, Rendezvous, open_store
from xdist.topologies import Outcome, Pending, RunPlan, Saved, Task
from xdist.topologies.actors import Room, end
from xdist.worker import WorkerReport

logger = logging.getLogger(__name__)

MakeStrategy = Callable[..., UpdateStrategy]


class AllReduceTopology:
    """One group of `num_workers` ranks; a launch makes a new generation of it."""

    def __init__(self, plan: RunPlan, *, make_strategy: MakeStrategy | None = None) -> None:
        """`make_strategy` wraps or replaces the ranks' strategies; it takes the arguments of
        `all_reduce_strategy`.
        """
        self._plan = plan
        self._make_strategy = make_strategy or all_reduce_strategy
        self._num_lanes = sizing.num_lanes(plan.config, num_workers=plan.num_workers)
        self._lanes = assign_lanes(self._num_lanes, plan.num_workers)
        self._host = ray.util.get_node_ip_address()
        self._store = open_store(self._host)
        self._generation = 0
        self._workers: list[ActorHandle[Any]] = []
        self._room: Room | None = None
        most = max(len(lanes) for lanes in self._lanes)
        efficiency = self._num_lanes / (plan.num_workers * most)
        logger.info("lanes dealt lanes=%d efficiency=%.2f", self._num_lanes, efficiency)

    def launch(self, start: Checkpoint) -> Pending:
        config = self._plan.config
        self._planner = SegmentPlanner(
            start.manifest.cut,
            num_samples=self._plan.order.num_samples,
            num_lanes=self._num_lanes,
            samples_per_lane=config.batch_size // self._num_lanes,
            num_epochs=config.num_epochs,
            max_steps=config.max_steps,
            report_every_steps=config.report_every_steps,
            save_every_samples=self._plan.save_every_samples,
        )
        self._segment: Segment | None = None
        self._reports: list[WorkerReport] = []
        self._num_started = 0
        self._generation += 1
        self._room = Room(config, num_workers=self._plan.num_workers)
        self._workers = [self._worker(rank, start, self._room) for rank in range(len(self._lanes))]
        return {
            worker.start.remote(): _task("start", rank) for rank, worker in enumerate(self._workers)
        }

    def _worker(self, rank: int, start: Checkpoint, room: Room) -> ActorHandle[Any]:
        return room.worker(
            rank,
            self._plan.config,
            num_classes=self._plan.num_classes,
            make_strategy=partial(
                self._make_strategy,
                self._plan,
                rank=rank,
                rendezvous=Rendezvous(self._host, self._store.port, self._generation),
                checkpoint_url=start.url,
            ),
            make_batches=partial(
                _stream,
                self._plan,
                position=start.manifest.cut.position,
                num_lanes=self._num_lanes,
                rank=rank,
            ),
        )

    def receive(self, task: Task, result: Any) -> Outcome:
        if task.action == "start":
            self._num_started += 1
            all_started = self._num_started == len(self._workers)
            return Outcome(pending=self._next_segment()) if all_started else Outcome()
        self._reports.append(result)
        if len(self._reports) < len(self._workers):
            return Outcome()
        reports = tuple(sorted(self._reports, key=lambda report: report.rank))
        return Outcome(reports, self._saved(reports), self._next_segment())

    def _saved(self, reports: tuple[WorkerReport, ...]) -> tuple[Saved, ...]:
        assert self._segment is not None
        if self._segment.cut is None:
            return ()
        parts = tuple(part for report in reports for part in report.parts)
        return (Saved(self._segment.cut, parts),)

    def _next_segment(self) -> Pending:
        self._reports = []
        self._segment = segment = self._planner.next_segment()
        if segment is None:
            return {}
        snapshot_at = segment.until_step if segment.cut else None
        return {
            worker.train.remote(segment.until_step, snapshot_at): _task("train", rank)
            for rank, worker in enumerate(self._workers)
        }

    def replace(self, _lost: Task, /) -> Pending | None:
        """None: the group is gone, whoever it was."""
        return None

    def lacks_room(self) -> bool:
        """False: a launch waits for room, and nobody is replaced without one."""
        return False

    def close(self) -> None:
        end(self._workers)
        self._workers = []
        if self._room is not None:
            self._room.close()
            self._room = None


def _task(action: Literal["start", "train"], rank: int) -> Task:
    return Task(f"worker {rank}", action, rank)


def all_reduce_strategy(
    plan: RunPlan, flat: FlatModel, *, rank: int, rendezvous: Rendezvous, checkpoint_url: str
) -> UpdateStrategy:
    """The strategy of one rank."""
    return AllReduce(
        plan.config,
        flat,
        rank=rank,
        world_size=plan.num_workers,
        rendezvous=rendezvous,
        checkpoint_url=checkpoint_url,
        run_dir=plan.run_dir,
    )


def _stream(
    plan: RunPlan,
    _strategy: UpdateStrategy,
    *,
    position: Position,
    num_lanes: int,
    rank: int,
) -> Iterator[Batch]:
    return SampleStream(
        plan.data.open_index(),
        plan.config.data,
        order=plan.order,
        position=position,
        batch_size=plan.config.batch_size,
        num_lanes=num_lanes,
        rank=rank,
        world_size=plan.num_workers,
        num_epochs=plan.config.num_epochs,
        training=True,
        num_classes=plan.num_classes,
    )
