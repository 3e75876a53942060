"""PushPullTopology: asynchronous workers and parameter servers.

A lost worker touches nobody else: what it had leased is leased again, and it is replaced as soon as
there is room. The replica of a lost server takes its place; where there is none, the run goes back
to its last checkpoint. Workers may come and go at any time.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from xdist import fork_servers
from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.errors import NotEnoughResources
from xdist.flat import FlatModel, even_ranges
from xdist.server_messages import TermStart
from xdist.server_plan import ServerPlan
from xdist.strategies import UpdateStrategy
from xdist.strategies.push_pull import PushPull, Servers
from xdist.topologies import Outcome, Pending, RunPlan, Task, nodes
from xdist.topologies.actors import server_on
from xdist.topologies.batches import LeasedBatches
from xdist.topologies.crew import Crew, Hand
from xdist.topologies.restarts import Restarts
from xdist.topologies.room import Room
from xdist.topologies.server_crew import ServerCrew, ServerHand
from xdist.topologies.server_saves import ServerSaves
from xdist.worker_messages import WorkerReport

logger = logging.getLogger(__name__)

MakeStrategy = Callable[..., UpdateStrategy]


class PushPullTopology:
    """`num_servers` servers, of which the first leads, and workers that do not know each other."""

    def __init__(self, plan: RunPlan, *, make_strategy: MakeStrategy | None = None) -> None:
        """`make_strategy` wraps or replaces the workers' strategies; it takes the arguments of
        `push_pull_strategy`.
        """
        self._plan = plan
        self._make_strategy = make_strategy or push_pull_strategy
        self._has_room = False
        self._num_told = plan.num_workers
        self._server_lives = itertools.count(1)
        self._launches = itertools.count()
        self._starts = Restarts()
        self._workers = Crew(
            self._worker, patience_s=plan.config.servers.lease_timeout_s, warm_up_images=()
        )

    def launch(self, start: Checkpoint) -> Pending:
        plan = self._plan
        self._start = start
        saved_step = start.manifest.cut.step
        self._draining: frozenset[str] = frozenset()
        self._starts.clear()
        self._since_somebody = time.monotonic()
        self._told_to_expect: frozenset[int] | None = None
        self._is_ending = False
        num_in_room = 0 if plan.servers_node else plan.num_servers
        is_again = next(self._launches) > 0
        self._room = Room(
            plan.config,
            num_workers=plan.num_workers,
            num_servers=num_in_room,
            num_replicas=num_in_room * plan.config.servers.replicas,
            fewest_workers=1 if is_again else plan.fewest_to_begin,
        )
        self._has_room = True
        self._ranges = even_ranges(start.manifest.layout.num_weights, plan.num_servers)
        self._servers = ServerCrew(
            self._server,
            self._room.end_server,
            num_servers=plan.num_servers,
            has_replicas=plan.config.servers.replicas > 0,
            saved_step=saved_step,
            lives=self._server_lives,
        )
        self._saves = ServerSaves(self._servers, plan.run_dir)
        self._request = nodes.WorkerRequest(plan.config, plan.most_workers)
        self._request.keep()
        pending = self._servers.start()
        for number in range(plan.most_workers):
            is_expected = number < plan.num_workers
            step = saved_step if is_expected else None
            pending |= self._workers.start(number, step=step, ends_run=is_expected and not is_again)
        return pending

    def _server(self, number: int, away_from: str | None) -> ActorHandle[Any]:
        first, last = self._ranges[number]
        plan = ServerPlan(
            config=self._plan.config,
            most_workers=self._plan.most_workers,
            checkpoint_url=self._start.url if away_from is None else None,
            layout=self._start.manifest.layout,
            start=first,
            stop=last,
            order=self._plan.order,
            num_places=self._plan.num_places,
            save_every_samples=self._plan.save_every_samples,
            is_first=number == 0,
        )
        if self._plan.servers_node is not None:
            return server_on(self._plan.servers_node, plan)
        near = None if away_from is None else nodes.other_than(away_from, turn=number)
        return self._room.server(number, plan, near=near)

    def _worker(self, number: int, _has_state: bool) -> ActorHandle[Any]:
        plan = self._plan
        return self._room.worker(
            number,
            plan.config,
            num_classes=plan.num_classes,
            make_strategy=partial(self._make_strategy, plan.config, number=number),
            make_batches=partial(LeasedBatches.of, plan.for_workers()),
        )

    def receive(self, task: Task, result: Any) -> Outcome:
        if task.role == "server":
            return self._receive_of_server(task, result)
        hand = self._workers.find(task)
        if hand is None:
            return Outcome()
        match task.action:
            case "pulse":
                return Outcome(pending=self._workers.felt(hand, result))
            case "start":
                self._workers.started(hand, result)
                hand.step = None  # It is the servers that have the state.
                return Outcome(pending=self._join(hand))
            case "join":
                hand.state = "ready"
                if result.interrupted is not None:
                    logger.info("%s did not join cause=%s", task.actor, result.interrupted.cause)
                    return Outcome(pending=self._join_others(hand))
                joined = "%s joined servers=%d sharing_memory=%d"
                logger.info(joined, task.actor, self._plan.num_servers, result.num_shared)
                return Outcome(pending=self._train(hand, own_step=0))
            case "train":
                return self._receive_report(hand, result)
        return Outcome()

    def _receive_of_server(self, task: Task, result: Any) -> Outcome:
        hand = self._servers.find(task.life)
        if hand is None:
            return Outcome()
        match task.action:
            case "start":
                return Outcome(pending=self._servers.started(hand, result))
            case "attach":
                return Outcome(pending=self._servers.attached(hand) if result else {})
            case "pulse":
                return Outcome(pending=self._servers.felt(hand, result))
            case "watch":
                return Outcome(pending=self._servers.watch_again(hand, parted_in=result))
            case "term":
                return self._receive_term(task.term, result)
            case "cut" if result is not None and task.term == self._servers.term:
                return Outcome(
                    pending=self._saves.begin(result)
                )  # Another term has cuts of its own.
            case "save":
                return self._saves.receive(hand, task, result)
        return Outcome()

    def _receive_term(self, term: int, start: TermStart) -> Outcome:
        if start == "interrupted":
            self._servers.parted(term)
        if start == "lacks_updates":
            logger.warning("replica lacks updates server=0 term=%d", term)
            return Outcome(is_lost=True)
        if not isinstance(start, int) or term != self._servers.term:
            return Outcome()
        self._servers.is_led = True
        self._saves.begin_term()
        self._told_to_expect = None  # It knows of nobody.
        follows = self._tell_whom_to_expect() | self._saves.next_cut() | self._join_ready()
        return Outcome(pending=follows, ends_at=start if self._is_ending else None)

    def _tell_whom_to_expect(self) -> Pending:
        """Where an update is made of several pushes: whose it waits for."""
        if self._plan.config.servers.commit_first is None or not self._servers.is_led:
            return {}
        expected = frozenset(hand.number for hand in self._workers if self._is_expected(hand))
        if expected == self._told_to_expect:
            return {}
        self._told_to_expect, lead = expected, self._servers.lead
        told: ray.ObjectRef[Any] = lead.actor.expect.remote(expected)
        return {told: lead.task("tell")}

    def _is_expected(self, hand: Hand) -> bool:
        """Whether a worker will push: not one that has come to the end of the run."""
        if hand.state == "starting":
            is_hopeless = hand.number in self._starts.hopeless
            return self._room.has_place(hand.number) and not is_hopeless
        return hand.state != "idle"

    def _join_ready(self) -> Pending:
        pending: Pending = {}
        for hand in self._workers:
            if hand.state == "ready":
                pending |= self._join(hand)
        return pending

    def _join(self, hand: Hand) -> Pending:
        """Have a worker that is ready take part, if the servers take pushes."""
        if not self._servers.is_led or self._is_ending:
            return {}
        hand.begin()
        hand.term = self._servers.term
        actors = tuple(server.actor for server in self._servers.primaries)
        servers = Servers(actors, self._ranges, worker=hand.number)
        return {hand.actor.join.remote(servers): hand.task("join")}

    def _join_others(self, hand: Hand) -> Pending:
        """The same, at once where the servers have changed meanwhile; else with the next look."""
        return self._join(hand) if hand.term < self._servers.term else {}

    def _train(self, hand: Hand, *, own_step: int) -> Pending:
        if self._is_ending:
            return {}
        hand.begin()
        hand.has_trained = True
        self._starts.forget(hand.number)
        until_step = own_step + self._plan.config.report_every_steps
        return {hand.actor.train.remote(until_step): hand.task("train")}

    def _receive_report(self, hand: Hand, report: WorkerReport) -> Outcome:
        hand.state = "ready"
        outcome = Outcome(reports=(report,))
        if report.is_final:
            hand.state = "idle"
            return outcome
        if report.interrupted is not None:
            left = "worker %d left its servers cause=%s"
            logger.info(left, hand.number, report.interrupted.cause)
            return replace(outcome, pending=self._join_others(hand))
        if hand.node_id in self._draining:
            return replace(outcome, pending=self._move(hand))
        return replace(outcome, pending=self._train(hand, own_step=report.progress.own_step))

    def _move(self, hand: Hand) -> Pending:
        """Have a worker that is not at work start anew on another node."""
        logger.info("worker %d leaves its node, which is being drained", hand.number)
        pending = self._release(hand)
        self._workers.end(hand)
        self._room.give_back(hand.number)
        pending |= self._workers.start(hand.number, step=None)
        return pending | self._tell_whom_to_expect()

    def _release(self, hand: Hand) -> Pending:
        self._told_to_expect = None  # It expects this one no more, and may have to again.
        lead = self._servers.lead
        released: ray.ObjectRef[Any] = lead.actor.release.remote(hand.number)
        return {released: lead.task("tell")}

    def replace(self, lost: Task, /) -> Outcome | None:
        if lost.role == "server":
            server = self._servers.find(lost.life)
            assert server is not None
            pending = self._servers.lose(server)
            if pending is None:
                self._workers.ask_newest()
            return None if pending is None else Outcome(pending=pending)
        hand = self._workers.find(lost)
        assert hand is not None
        pending = self._release(hand)
        self._workers.end(hand)
        node = hand.node_id or self._room.node_of(hand.number)
        self._starts.add(hand.number, has_trained=hand.has_trained, node=node)
        return Outcome(pending=pending | self._start_due() | self._tell_whom_to_expect())

    def _start_due(self) -> Pending:
        """Start the replacements whose time has come."""
        self._room.look_for_better(self._starts.waiting)
        pending: Pending = {}
        for number in self._starts.due(self._room.node_of):
            pending |= self._workers.start(number, step=None)
        return pending

    def _find(self, task: Task) -> Hand | ServerHand | None:
        is_of_server = task.role == "server"
        return self._servers.find(task.life) if is_of_server else self._workers.find(task)

    def is_current(self, task: Task, /) -> bool:
        return self._find(task) is not None

    def host_of(self, task: Task, /) -> str | None:
        hand = self._find(task)
        return None if hand is None or hand.process is None else hand.process.host

    def end_soon(self) -> Outcome:
        """In a term that nobody joins: what its servers have when it begins is saved."""
        self._is_ending = True
        if not self._servers.term:
            return Outcome(ends_at=self._saves.asked_step)
        return Outcome(pending=self._servers.begin_anew())

    def watch(self) -> Outcome:
        """Who does not answer, or is stuck, loses what it had leased; those that parted from the
        servers join again.
        """
        self._request.keep()
        faults = [*self._workers.silent(is_broken=False), *self._workers.stuck_alone()]
        faults += self._servers.silent()
        faults += self._workers.unheard(self._room.has_place)
        if faults:
            return Outcome(faults=tuple(faults))
        if self._is_ending:
            return Outcome(pending=self._servers.reunite())
        self._draining = nodes.to_leave()
        fork_servers.leave(self._draining)
        self._check_room()
        pending: Pending = {}
        for hand in list(self._workers) if self._draining else []:
            if hand.state == "starting" and self._room.node_of(hand.number) in self._draining:
                pending |= self._move(hand)
        pending |= self._servers.reunite()
        pending |= self._servers.settle()
        pending |= self._servers.begin_without(wait_s=self._plan.config.cluster.wait_s)
        pending |= self._start_due() | self._join_ready() | self._tell_whom_to_expect()
        return Outcome(pending=pending, num_workers=self._num_at_work())

    def _num_at_work(self) -> int | None:
        """Workers that train, if these are others than the last time."""
        before, self._num_told = self._num_told, sum(hand.has_trained for hand in self._workers)
        return self._num_told if self._num_told not in (0, before) else None

    def _check_room(self) -> None:
        """Somebody must be at work, or start, or have a place to start at."""
        cluster = self._plan.config.cluster
        starting = {hand.number for hand in self._workers if hand.state == "starting"}
        missing = starting.union(self._starts.waiting)
        is_at_work = len(starting) < len(list(self._workers))
        placed = {number for number in missing if self._room.has_place(number)}
        if is_at_work or placed - self._starts.hopeless:
            self._since_somebody = time.monotonic()
        if time.monotonic() - self._since_somebody > cluster.wait_s:
            lost = ", ".join(f"worker {number}" for number in sorted(missing))
            lacking = "there was no room for a replacement"
            todo = "add nodes, or end what else runs"
            if placed:
                lacking, todo = "no replacement could start", "mend or remove the nodes (see above)"
            raise NotEnoughResources(
                f"{lost} lost, nobody is left, and {lacking} within {cluster.wait_s:g} s "
                f"(cluster.wait_s); {todo}; the same command resumes from the last checkpoint"
            )

    @property
    def is_saving(self) -> bool:
        return self._has_room and self._saves.is_at_work

    @property
    def newest_step(self) -> int:
        return max(self._servers.newest_version, self._workers.newest_step)

    def close(self) -> None:
        self._workers.clear()
        if self._has_room:
            self._servers.clear()
            self._room.close()
        self._has_room = False


def push_pull_strategy(config: TrainConfig, flat: FlatModel, *, number: int) -> PushPull:
    """The strategy of the worker of this number."""
    assert number >= 0
    return PushPull(config, flat)
