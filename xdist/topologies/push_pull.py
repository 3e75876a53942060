"""PushPullTopology: asynchronous workers and parameter servers.

A lost worker touches nobody else: what it had leased is leased again, and it is replaced as soon as
there is room. A lost server takes the run back to the last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from xdist.checkpoint import Checkpoint, Cut, checkpoint_url
from xdist.errors import NotEnoughResources
from xdist.flat import FlatModel, even_ranges
from xdist.parameter_server import Commit, ServerPlan
from xdist.strategies import UpdateStrategy
from xdist.strategies.push_pull import PushPull, Servers
from xdist.topologies import Fault, Outcome, Pending, RunPlan, Saved, Task
from xdist.topologies.actors import Room, end, server_on
from xdist.topologies.batches import LeasedBatches, open_stream
from xdist.worker import WorkerReport

MakeStrategy = Callable[..., UpdateStrategy]


class PushPullTopology:
    """`num_servers` servers, of which the first leads, and `num_workers` workers that do not know
    each other.
    """

    def __init__(self, plan: RunPlan, *, make_strategy: MakeStrategy | None = None) -> None:
        """`make_strategy` wraps or replaces the workers' strategies; it takes the arguments of
        `push_pull_strategy`.
        """
        self._plan = plan
        self._make_strategy = make_strategy or push_pull_strategy
        self._servers: list[ActorHandle[Any]] = []
        self._workers: dict[int, ActorHandle[Any]] = {}
        self._room: Room | None = None
        self._waiting: dict[int, float] = {}
        """Workers that have not started yet, and since when."""

    def launch(self, start: Checkpoint) -> Pending:
        plan = self._plan
        num_in_room = 0 if plan.servers_node else plan.num_servers
        self._room = Room(plan.config, num_workers=plan.num_workers, num_servers=num_in_room)
        self._ranges = even_ranges(start.manifest.layout.num_weights, plan.num_servers)
        self._servers = [self._server(number, start) for number in range(plan.num_servers)]
        send = partial(send_commit, self._servers[1:])
        pending: Pending = {self._servers[0].connect.remote(send): Task("server 0", "connect", 0)}
        pending |= {
            actor.watch.remote(): Task(f"server {number}", "watch", number)
            for number, actor in enumerate(self._servers)
        }
        return pending | self._next_cut(after_step=start.manifest.cut.step)

    def _start_workers(self) -> Pending:
        pending: Pending = {}
        for rank in range(self._plan.num_workers):
            pending |= self._start_worker(rank)
        return pending

    def _server(self, number: int, start: Checkpoint) -> ActorHandle[Any]:
        first, last = self._ranges[number]
        plan = ServerPlan(
            config=self._plan.config,
            checkpoint_url=start.url,
            start=first,
            stop=last,
            order=self._plan.order,
            num_places=self._plan.num_places,
            save_every_samples=self._plan.save_every_samples,
            is_lead=number == 0,
        )
        assert self._room is not None
        node = self._plan.servers_node
        return server_on(node, plan) if node else self._room.server(number, plan)

    def _start_worker(self, rank: int) -> Pending:
        assert self._room is not None
        self._workers[rank] = self._room.worker(
            rank,
            self._plan.config,
            num_classes=self._plan.num_classes,
            make_strategy=partial(self._make_strategy, number=rank),
            make_batches=partial(
                LeasedBatches,
                partial(open_stream, self._plan.for_workers()),
                batch_size=self._plan.config.batch_size,
            ),
        )
        self._waiting[rank] = time.monotonic()
        return {self._workers[rank].start.remote(): Task(f"worker {rank}", "start", rank)}

    def _join(self, rank: int) -> Pending:
        servers = Servers(tuple(self._servers), self._ranges, worker=rank)
        return {self._workers[rank].join.remote(servers): Task(f"worker {rank}", "join", rank)}

    def _train(self, rank: int, *, until_step: int) -> Pending:
        return {self._workers[rank].train.remote(until_step): Task(f"worker {rank}", "train", rank)}

    def _next_cut(self, *, after_step: int) -> Pending:
        return {self._servers[0].next_cut.remote(after_step): Task("server 0", "cut", 0)}

    def receive(self, task: Task, result: Any) -> Outcome:
        match task.action:
            case "connect":
                return Outcome(pending=self._start_workers())
            case "start":
                del self._waiting[task.number]
                return Outcome(pending=self._join(task.number))
            case "join" if result.interrupted is not None:
                return Outcome(faults=(Fault(task, result.interrupted, "complaint"),))
            case "join":
                until_step = self._plan.config.report_every_steps
                return Outcome(pending=self._train(task.number, until_step=until_step))
            case "train":
                return self._receive_report(task.number, result)
            case "cut":
                return Outcome(pending=self._save(result))
            case "release":
                return Outcome(pending=self._start_worker(task.number))
            case "save":
                assert task.cut is not None
                parts, corrupt = result
                return Outcome(saved=(Saved(task.cut, parts, corrupt),))
        raise AssertionError(f"{task} does not end")

    def _receive_report(self, rank: int, report: WorkerReport) -> Outcome:
        if report.interrupted is not None:
            task = Task(f"worker {rank}", "train", rank)
            return Outcome((report,), faults=(Fault(task, report.interrupted, "complaint"),))
        if report.is_final:
            return Outcome(reports=(report,))
        until_step = report.progress.own_step + self._plan.config.report_every_steps
        return Outcome(reports=(report,), pending=self._train(rank, until_step=until_step))

    def _save(self, cut: Cut) -> Pending:
        url = checkpoint_url(self._plan.run_dir, cut.step)
        saves: Pending = {
            actor.save.remote(cut.step, url): Task(f"server {number}", "save", number, cut=cut)
            for number, actor in enumerate(self._servers)
        }
        return saves if cut.is_final else saves | self._next_cut(after_step=cut.step)

    def replace(self, lost: Task, /) -> Outcome | None:
        if lost.action not in ("start", "join", "train"):
            return None
        end([self._workers.pop(lost.number)])
        self._waiting.pop(lost.number, None)
        lead = self._servers[0]
        release: ray.ObjectRef[Any] = lead.release.remote(lost.number)
        return Outcome(pending={release: Task("server 0", "release", lost.number)})

    def is_current(self, _task: Task, /) -> bool:
        """True: an actor that is lost is heard of once."""
        return True

    def watch(self) -> Outcome:
        """What is lost says so itself; but room that is not there is waited for."""
        wait_s = self._plan.config.cluster.wait_s
        since = min(self._waiting.values(), default=math.inf)
        is_anybody_left = self._workers.keys() != self._waiting.keys()
        if not is_anybody_left and time.monotonic() - since > wait_s and self._lacks_room:
            lost = ", ".join(f"worker {rank}" for rank in sorted(self._waiting))
            raise NotEnoughResources(
                f"{lost} lost, nobody is left, and there was no room for a replacement within "
                f"{wait_s:g} s (cluster.wait_s); add nodes, or end what else runs; "
                "the same command resumes from the last checkpoint"
            )
        return Outcome()

    @property
    def _lacks_room(self) -> bool:
        return self._room is not None and not self._room.is_placed(self._plan.num_workers)

    def close(self) -> None:
        end([*self._workers.values(), *self._servers])
        self._workers, self._servers, self._waiting = {}, [], {}
        if self._room is not None:
            self._room.close()
            self._room = None


def send_commit(followers: Sequence[ActorHandle[Any]], commit: Commit) -> None:
    """Tell the other servers of a commit, without waiting; they apply by version, whatever arrives
    first.
    """
    for follower in followers:
        follower.apply.remote(commit)


def push_pull_strategy(flat: FlatModel, *, number: int) -> PushPull:
    """The strategy of one incarnation of the worker of this number."""
    assert number >= 0
    return PushPull(flat)
