"""ServerCrew: the parameter server actors of a run, their replicas, and whose turn it is to lead.

A *term* is the time between two changes of who is a primary. When a primary is lost its replica
takes its place, in a new term, and another replica is started. Each server has a pulse: a call that
comes back once a second, and does not where the process hangs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from xdist.parameter_server import ParameterServer
from xdist.topologies import Fault, Pending, Task, nodes
from xdist.topologies.actors import answers
from xdist.topologies.crew import LEAST_PATIENCE_S, PULSE_S
from xdist.topologies.nodes import Process
from xdist.topologies.remote_server import RemoteServer

logger = logging.getLogger(__name__)

PARTED_S = 5.0
"""Since a server did not reach another one, before that is taken for alive: Ray may yet tell."""

MakeServer = Callable[[int, str | None], ActorHandle[Any]]
"""From the number of a server and, of a replica, the node that it is to be away from, if it can."""


@dataclass
class ServerHand:
    """One server actor."""

    number: int
    life: int
    actor: ActorHandle[Any]
    known_nodes: frozenset[str]
    """Ids of the nodes that there were when it was to start."""
    process: Process | None = None
    """None before it has started."""
    pulse_sent: float = field(default_factory=time.monotonic)
    pulse_reference: ray.ObjectRef[Any] | None = None

    def task(self, action: Any, **more: Any) -> Task:
        return Task(f"server {self.number}", action, self.number, life=self.life, **more)

    @property
    def remote(self) -> RemoteServer:
        return RemoteServer(self.actor)


class ServerCrew:
    """The servers, by their numbers: primaries, and replicas if the run has them."""

    def __init__(
        self,
        make_server: MakeServer,
        end_server: Callable[[ActorHandle[Any]], None],
        *,
        num_servers: int,
        has_replicas: bool,
        saved_step: int,
        lives: Iterator[int],
    ) -> None:
        """lives: their numbers, which no other server of the run has had."""
        self._make_server = make_server
        self._end_server = end_server
        self._has_replicas = has_replicas
        self._lives = lives
        self._made = time.monotonic()
        self._replicas: dict[int, ServerHand] = {}
        self._attached: set[int] = set()
        """Lives of the replicas that are what their primaries are."""
        self._primaries = {number: self._new(number, None) for number in range(num_servers)}
        self.newest_version = self.saved_step = saved_step
        """Of the last checkpoint that is complete."""
        self.term = 0
        self.is_led = False
        """Whether the servers of this term take pushes."""
        self._saved_for: set[int] = set()
        """Lives of servers for whose nodes' notice the state was saved."""
        self._parted_since: float | None = None
        """When a server did not reach another one in this term."""

    def __iter__(self) -> Iterator[ServerHand]:
        yield from self._primaries.values()
        yield from self._replicas.values()

    @property
    def lead(self) -> ServerHand:
        return self._primaries[0]

    @property
    def primaries(self) -> tuple[ServerHand, ...]:
        """In the order of their ranges."""
        return tuple(self._primaries[number] for number in sorted(self._primaries))

    def find(self, life: int) -> ServerHand | None:
        """The server of this life; None if it is gone."""
        return next((hand for hand in self if hand.life == life), None)

    def _new(self, number: int, away_from: str | None) -> ServerHand:
        actor = self._make_server(number, away_from)
        return ServerHand(number, next(self._lives), actor, nodes.staying())

    def start(self) -> Pending:
        """Begin with the servers that have just been made."""
        pending: Pending = {}
        for hand in self.primaries:
            pending |= self._watched(hand)
        return pending

    def _watched(self, hand: ServerHand) -> Pending:
        locate: ray.ObjectRef[Any] = hand.actor.__ray_call__.remote(_locate)
        return {locate: hand.task("start"), **self._watch(hand)}

    @staticmethod
    def _watch(hand: ServerHand) -> Pending:
        watch: ray.ObjectRef[Any] = hand.actor.watch.remote()
        return {watch: hand.task("watch")}

    def started(self, hand: ServerHand, process: Process) -> Pending:
        """A server is there: give it a replica, or to its primary; once all are there, begin."""
        hand.process = process
        pending = self._feel(hand)
        if hand.number in self._replicas and hand is self._replicas[hand.number]:
            primary = self._primaries[hand.number]
            attached: ray.ObjectRef[Any] = primary.actor.attach.remote(hand.remote)
            return pending | {attached: hand.task("attach")}
        if self._has_replicas:
            pending |= self._start_replica(hand.number)
        return pending | self._begin_if_complete()

    def _start_replica(self, number: int) -> Pending:
        process = self._primaries[number].process
        assert process is not None, "a replica follows its primary"
        hand = self._new(number, process.node_id)
        self._replicas[number] = hand
        return self._watched(hand)

    def attached(self, hand: ServerHand) -> Pending:
        """A replica is what its primary is."""
        self._attached.add(hand.life)
        logger.info("replica attached server=%d", hand.number)
        return self._begin_if_complete()

    def _begin_if_complete(self) -> Pending:
        """The first term, once all are there."""
        is_complete = all(hand.process is not None for hand in self)
        if self._has_replicas:
            is_complete = is_complete and len(self._attached) == len(self._primaries)
        return self._begin_term() if is_complete and not self.term else {}

    def begin_without(self, *, wait_s: float) -> Pending:
        """The first term, where replicas are not there after so long, as where there is no room for
        them. They may come later.
        """
        are_there = all(hand.process is not None for hand in self.primaries)
        if self.term or not are_there or time.monotonic() - self._made < wait_s:
            return {}
        lacking = set(self._primaries) - {
            number for number, hand in self._replicas.items() if hand.life in self._attached
        }
        logger.warning(
            "replicas not there within %g s servers=%s; until then, losing one takes the run back",
            wait_s,
            ",".join(map(str, sorted(lacking))),
        )
        return self._begin_term()

    def _begin_term(self) -> Pending:
        self.term += 1
        self.is_led, self._parted_since = False, None
        servers = [hand.remote for hand in self.primaries]
        begin: Any = self.lead.actor.begin_term
        begun = begin.remote(self.term, servers, self.saved_step)
        return {begun: self.lead.task("term", term=self.term)}

    def begin_anew(self) -> Pending:
        """A new term, unless one is about to begin."""
        return self._begin_term() if self.is_led else {}

    def parted(self, term: int) -> None:
        """In this term, a server did not reach another one."""
        if term == self.term:
            self._parted_since = self._parted_since or time.monotonic()

    def watch_again(self, hand: ServerHand, *, parted_in: int) -> Pending:
        """A server tells of such a term."""
        self.parted(parted_in)
        return self._watch(hand)

    def reunite(self) -> Pending:
        """A new term, where both are there all the same: what one was not told, it is told then."""
        since = self._parted_since
        if since is None or time.monotonic() - since < PARTED_S:
            return {}
        logger.warning("servers did not reach one another term=%d; another one begins", self.term)
        return self._begin_term()

    def lose(self, hand: ServerHand) -> Pending | None:
        """A server is gone: what follows, or None where its state is gone with it."""
        self._end_server(hand.actor)
        if hand.process is not None:
            nodes.kill(hand.process)
        self._attached.discard(hand.life)
        if self._replicas.get(hand.number) is hand:
            del self._replicas[hand.number]
            return self._start_replica(hand.number) if self._has_replicas else {}
        replica = self._replicas.pop(hand.number, None)
        if replica is None or replica.life not in self._attached:
            if replica is not None:
                self._end_server(replica.actor)
            self._ask_newest(but=hand)
            return None
        self._attached.discard(replica.life)
        self._primaries[hand.number] = replica
        logger.warning("replica took over server=%d term=%d", hand.number, self.term + 1)
        begun = self._begin_term()
        return begun | self._start_replica(hand.number) if self._has_replicas else begun

    def _ask_newest(self, *, but: ServerHand) -> None:
        """Ask those who are left how far the run has come, which nobody will know any more."""
        others = [hand for hand in self if hand is not but and hand.process is not None]
        asked: list[ray.ObjectRef[int]] = [hand.actor.pulse.remote(0.0) for hand in others]
        self.newest_version = max([self.newest_version, *answers(asked)])

    def settle(self) -> Pending:
        """Have servers leave a node that is about to go, once each has a replica elsewhere, and a
        replica one that it shares with its primary, when another node has come. One after the
        other: meanwhile the state is on one node.
        """
        if not self.is_led:
            return {}
        draining, staying = nodes.to_leave(), nodes.staying()
        if saved := self._save_before_loss(draining):
            return saved
        if self._has_replicas and len(self._attached) < len(self._primaries):
            return {}
        for number, replica in self._replicas.items():
            if replica.life not in self._attached:
                continue
            primary = self._primaries[number]
            assert replica.process is not None, "it is attached"
            assert primary.process is not None, "it has a replica"
            at, beside = replica.process.node_id, primary.process.node_id
            has_new = bool(staying - replica.known_nodes)
            if at in draining or (at == beside and has_new):
                logger.info("replica starts anew on another node server=%d", number)
                return self.lose(replica) or {}
            if beside in draining:
                logger.info("server %d leaves its node, which is being drained", number)
                return self.lose(primary) or {}
        return self._start_successors(draining)

    def _on(self, going: Collection[str]) -> list[ServerHand]:
        """Primaries without a replica on these nodes."""
        replicated = {
            number for number, each in self._replicas.items() if each.life in self._attached
        }
        return [
            hand
            for hand in self.primaries
            if hand.number not in replicated
            and hand.process is not None
            and hand.process.node_id in going
        ]

    def _save_before_loss(self, draining: Collection[str]) -> Pending:
        """A node may go before those who have the only state on it can leave: in a new term, what
        there is is saved.
        """
        told = {hand.life for hand in self._on(draining)}
        if told.issubset(self._saved_for):
            return {}
        self._saved_for |= told
        logger.warning("servers are on a node that is about to go: what there is is saved")
        return self._begin_term()

    def _start_successors(self, draining: Collection[str]) -> Pending:
        """Replicas elsewhere, which will take the places of servers without one on such a node."""
        pending: Pending = {}
        for hand in self._on(draining):
            if hand.number not in self._replicas:
                logger.info("server %d is to leave its node, which is being drained", hand.number)
                pending |= self._start_replica(hand.number)
        return pending

    def felt(self, hand: ServerHand, version: int) -> Pending:
        """A pulse came back, with the version that the server is at; send the next one."""
        self.newest_version = max(self.newest_version, version)
        return self._feel(hand)

    def _feel(self, hand: ServerHand) -> Pending:
        hand.pulse_sent = time.monotonic()
        hand.pulse_reference = hand.actor.pulse.remote(PULSE_S)
        return {hand.pulse_reference: hand.task("pulse")}

    def silent(self) -> list[Fault]:
        """Servers whose process does not answer: not those whose answer is there, and was not
        looked at yet.
        """
        limit_s, now = PULSE_S + LEAST_PATIENCE_S, time.monotonic()
        cause = f"gave no answer for {limit_s:g} s"
        return [
            Fault(hand.task("pulse"), cause, "lost")
            for hand in self
            if hand.process is not None
            and now - hand.pulse_sent > limit_s
            and not ray.wait([hand.pulse_reference], timeout=0)[0]
        ]

    def clear(self) -> None:
        """End all of them."""
        for hand in self:
            self._end_server(hand.actor)
        self._primaries, self._replicas = {}, {}


def _locate(_server: ParameterServer) -> Process:
    """In the server's process: where that is."""
    return nodes.this_process()
