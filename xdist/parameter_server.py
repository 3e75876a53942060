"""ParameterServer: one range of the flat vector, its optimizer, its versions.

A push *stages* its pieces on all servers; then server 0, which has the `Lead`, *commits* it, and
every server applies it in the order of versions. What is staged without a commit is dropped. So all
servers apply a push or none does, "every server at version v" is a consistent state of the run, and
one cut holds ledger and weights.

A *replica* stages and applies what its primary does. When the primary is lost it takes its place,
in a new *term*: workers register anew, and what was not committed is computed again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from datapipe.position import Span
from xdist import wire
from xdist.alarm import Alarm
from xdist.answers import Answers
from xdist.background import Background
from xdist.changes import Changes
from xdist.checkpoint import Checkpoint, Cut
from xdist.commit_queue import CommitQueue
from xdist.cut_store import CutStore
from xdist.errors import LeaseLost, PeerLost
from xdist.gradient_slots import SlotsAddress
from xdist.lead import Lead, bring_level
from xdist.mirror import Mirror
from xdist.node_memory import NodeMemory
from xdist.own_server import OwnServer
from xdist.product import Product
from xdist.sequencer import Commit, Decision, Push, PushId, Sequencer
from xdist.server_messages import Replica, Reply, Server, ServerCopy, ServerSave, TermStart
from xdist.server_plan import ServerPlan
from xdist.server_range import ServerRange
from xdist.staging import Staging
from xdist.turns import Turn, Turns
from xdist.updates import Updates
from xdist.weights_board import BoardAddress

TOKENS_OF_TERM = 1 << 32


class ParameterServer:
    """Owner of one range. Its coroutines share one event loop, so each of them is atomic up to its
    `await`; updates are computed beside it, in a thread.
    """

    def __init__(self, plan: ServerPlan, *, share: Callable[[wire.WireVector], Any]) -> None:
        """share: stores weights; returns what any number of workers gets them from."""
        torch.set_num_threads(plan.num_threads)
        self._plan = plan
        self._memory = NodeMemory(plan.config.servers, start=plan.start, stop=plan.stop)
        self._range = ServerRange(plan, self._memory)
        self._sequencer: Sequencer | None = None
        if plan.checkpoint_url is not None:
            self._load(Checkpoint.open(plan.checkpoint_url))
        self._term = 0
        self._lead: Lead | None = None
        self._report: Server | None = None
        """Where the lead is."""
        self._mirror = Mirror()
        self._turns = Turns()
        self._staging = Staging(plan.stop - plan.start)
        self._answers = Answers()
        self._queue = CommitQueue()
        self._cuts = CutStore(plan)
        self._alarm = Alarm()
        self._changes = Changes()
        self._background = Background(self._alarm.failed)
        self._updates = Updates(
            self._range,
            queue=self._queue,
            staging=self._staging,
            answers=self._answers,
            cuts=self._cuts,
            share=share,
            background=self._background,
        )

    def _load(self, source: Checkpoint) -> None:
        plan = self._plan
        tensors = source.read_range(plan.start, plan.stop)
        self._range.load(tensors, version=source.manifest.cut.step)
        self._sequencer = plan.sequencer(source) if plan.is_first else None

    # What workers ask.

    async def connect(self, worker: int, token: int, slots: SlotsAddress) -> BoardAddress | None:
        """Read a worker's gradients in its slots, and tell it where weights are published; None
        where that cannot be. Raises `LeaseLost`.
        """
        self._staging.check(PushId(worker, token, 0))
        if not self._memory.open_slots(worker, token, slots):
            return None
        return await self._range.open_board()

    async def stage(self, name: PushId, offset: int, values: wire.WireVector) -> None:
        """Keep a part of a push's piece until its commit. values: from `offset` of this range.
        Raises `LeaseLost`.
        """
        self._staging.check(name)
        self._mirror.stage(name, offset, values)
        self._staging.add(name, offset, values)
        self._tell_if_staged(name)

    async def stage_product(self, name: PushId, offset: int, product: Product) -> None:
        """The same, of values that are computed here. Raises `LeaseLost`."""
        self._staging.check(name)
        values = await asyncio.to_thread(product.values)
        self._staging.check(name)
        # From here on at once: whoever has become the replica meanwhile has nothing of it.
        self._mirror.stage_product(name, offset, product)
        self._staging.add(name, offset, values)
        self._tell_if_staged(name)

    async def push(
        self,
        name: PushId,
        described: Push | None = None,
        slot: int | None = None,
        offset: int = 0,
        values: wire.WireVector | None = None,
    ) -> Reply:
        """The weights with a push, which is committed once all of it is staged on all servers.
        described: to server 0. slot: where all of its piece lies; else values, if any, are a part
        of it that is staged first, as by `stage`. Raises `LeaseLost`, and `PeerLost` when a new
        term begins.
        """
        self._staging.check(name)
        if described is not None:
            self._leading.describe(described)
        if slot is not None:
            values = wire.as_vector(self._memory.piece(name, slot))
        if values is not None:
            self._mirror.stage(name, offset, values)
            self._staging.add(name, offset, values)
        outcome = self._answers.wait_for(name, wants_weights=slot is None)
        self._tell_if_staged(name)
        reply = await outcome
        if described is not None:
            await self._leading.wait_for_others(name.worker)
        return reply

    async def pull(self, min_version: int, wants_weights: bool = True) -> Reply:
        """The weights, at `min_version` or later, if the worker does not see them in memory."""
        await self._changes.until(lambda: self._range.version >= min_version)
        async with self._range.at_rest:
            return Reply(self._range.version, self._range.weights() if wants_weights else None)

    async def register(self, worker: int) -> tuple[int, int]:
        """Server 0: a new fencing token for a worker, once it is its turn to begin, and the version
        that it starts from.
        """
        return await self._leading.register(worker)

    async def lease(self, worker: int, token: int) -> Span | None:
        """Server 0: the next places for a worker; None when none is free. Raises `LeaseLost`."""
        return self._leading.lease(worker, token)

    async def await_lease(self, worker: int, token: int) -> Span | None:
        """Server 0: the next places for a worker, as soon as there are any: others may be lost.
        None when the run is over. Raises `LeaseLost`.
        """
        return await self._leading.await_lease(worker, token)

    def _tell_if_staged(self, name: PushId) -> None:
        if name in self._answers and self._staging.is_complete(name):
            self._background.run(self._tell_staged(name))

    async def _tell_staged(self, name: PushId) -> None:
        """Tell the lead that a piece is here, and on the replica."""
        try:
            await self._mirror.until_staged(name)
        except LeaseLost:
            return  # Its worker hears of it by itself.
        if self._report is not None:
            self._report.staged(name)

    # What other servers ask, in turn.

    async def in_turn(self, turn: Turn, method: str, *arguments: Any) -> Any:
        """Call one of the methods below, once all has begun that the sender asked before. Raises
        `PeerLost` in a later term.
        """
        await self._turns.wait(turn)
        if method == "enter":  # Who else asked was of an earlier term.
            self._check_current(arguments[0])
            self._turns.hear_only(turn.sender)
        return await getattr(self, method)(*arguments)

    async def staged(self, name: PushId) -> None:
        """Server 0: a server has staged a push."""
        with self._alarm.on_failure():
            if self._lead is not None:
                self._lead.staged(name)

    async def apply(self, commit: Commit) -> None:
        """Apply this commit, and those that waited for it, in the order of versions."""
        if commit.term >= self._term and commit.version > self._range.version:
            await self._apply(commit)

    async def _apply(self, *commits: Commit) -> None:
        for commit in commits:
            self._queue.add(commit)
            if commit.cut is not None and self._report is not None:  # A replica saves nothing.
                self._queue.keep(commit.version)
            self._mirror.apply(commit)
        try:
            with self._alarm.on_failure():
                await self._updates.make_due()
        finally:
            self._changes.tell()

    async def drop(self, name: PushId, version: int) -> None:
        """A push will not be applied; its worker gets weights of that version or a later one."""
        await self.free(name)
        if name in self._answers:
            wants_weights = bool(self._answers.want_weights([name]))
            self._answers.give(name, await self.pull(version, wants_weights))

    async def free(self, name: PushId) -> None:
        """Drop a push."""
        self._staging.free(name)
        self._mirror.free(name)

    async def forget(self, worker: int, token: int) -> None:
        """Refuse what comes of the tokens of a worker below this one."""
        self._staging.forget(worker, token, spare=self._queue.pushes)
        self._memory.forget(worker, token)
        self._mirror.keep_staging(self._staging.accepts)
        self._mirror.forget(worker, token)
        error = LeaseLost(f"worker {worker} was replaced")
        self._answers.refuse(error, worker=worker, below_token=token)

    async def forget_all(self, token: int) -> None:
        """Drop what has a token below this one, and is in no commit that has come."""
        self._staging.forget_all(token, spare=self._queue.pushes)
        self._memory.forget_all(token)
        self._mirror.keep_staging(self._staging.accepts)
        self._mirror.forget_all(token)
        # Those that came since the term began: nobody commits them.
        self._answers.refuse(PeerLost.in_another_term(), worker=None, below_token=token)

    async def keep(self, cut: Cut) -> None:
        """Keep the state of a cut, which is no commit's, until it is saved."""
        self._queue.keep(cut.step)
        await self._updates.keep_if_due()

    # What a new term asks.

    async def begin_term(self, term: int, servers: Sequence[Server], saved_step: int) -> TermStart:
        """Server 0: lead from now on. servers: all, in the order of their ranges; this one as the
        others reach it. saved_step: of the last checkpoint; what came after it is saved first.
        """
        if term <= self._term:
            return "interrupted"
        lead, *others = servers
        followers, sequencer = (OwnServer(self), *others), self._sequencer
        assert sequencer is not None, "server 0 and its replica have one"
        if self._lead is not None:
            await self._lead.end_term()
        self._turns.hear_only(None)
        try:
            versions = await self._entered(term, followers, lead)
        except PeerLost:
            return "interrupted"
        if max(versions) > sequencer.version:
            return "lacks_updates"
        bring_level(followers, versions, sequencer.commits, term=term)
        token = term * TOKENS_OF_TERM
        for server in followers:
            server.forget_all(token)
        sequencer.begin_term(self._plan.ledger(sequencer.ledger.position, first_token=token))
        self._lead = Lead(
            sequencer,
            term=term,
            servers=followers,
            replicate=self._mirror.follow,
            most_workers=self._plan.most_workers,
            start_over_steps=self._plan.config.servers.start_over_steps,
            background=self._background,
        )
        if sequencer.version > saved_step:
            self._lead.cut_here()
        return sequencer.version

    async def _entered(self, term: int, servers: Sequence[Server], lead: Server) -> list[int]:
        """The versions that all are at as the term begins. lead: this one, as others reach it."""
        own, *others = servers
        for other in others:
            other.tell_of_parting(partial(self._part, term))
        entering = [own.enter(term, own), *(other.enter(term, lead) for other in others)]
        versions = await asyncio.gather(*entering)
        self._check_current(term)
        return versions

    def _check_current(self, term: int) -> None:
        if term < self._term:
            raise PeerLost(f"term {self._term} has begun")

    async def enter(self, term: int, lead: Server) -> int:
        """End what belongs to the term before; returns the version that this server is at. Raises
        `PeerLost` in a later term.
        """
        self._check_current(term)
        self._term, self._report = term, lead
        lead.tell_of_parting(partial(self._part, term))
        self._answers.refuse(PeerLost.in_another_term(), worker=None, below_token=math.inf)
        async with self._range.at_rest:  # What has come is applied first.
            self._cuts.begin_term(term)
            return self._range.version

    def _part(self, term: int) -> None:
        """Another server was not reached in a term."""
        if term == self._term:
            self._alarm.parted(term)

    @property
    def _leading(self) -> Lead:
        if self._lead is None:
            raise PeerLost("this server does not lead")
        return self._lead

    # Its replica.

    async def attach(self, replica: Replica) -> bool:
        """Have a replica from now on; returns when it is what this server is. False where it is
        gone.
        """
        async with self._range.at_rest:
            tensors = await self._range.copy()
            version, staged = self._range.version, self._staging.copies()
            copy = ServerCopy(
                self._term, version, tensors, staged, self._queue.commits, self._sequencer
            )
            taken = self._mirror.begin(replica, copy)
        return await taken

    async def take(self, copy: ServerCopy) -> None:
        """Be what the primary is."""
        self._range.load(copy.tensors, version=copy.version)
        self._term, self._sequencer = copy.term, copy.sequencer
        self._staging.take(copy.staged)
        # All at once, whatever their term: its primary will apply them, and nobody drops a piece.
        await self._apply(*copy.pending)

    async def follow(self, decision: Decision) -> None:
        """The replica of server 0: know of a commit before anybody else does; not of one that comes
        when it has taken over.
        """
        assert self._sequencer is not None, "the replica of server 0 has one"
        if decision.commit.term < self._term:
            return
        self._sequencer.follow(decision)

    # What the driver asks.

    async def next_cut(self, after_step: int) -> Cut | None:
        """Server 0: the first cut after `after_step`, once there is one; None at the lead's end."""
        return None if self._lead is None else await self._lead.next_cut(after_step)

    async def save(self, step: int, url: str) -> ServerSave:
        """Write this server's parts of the cut at `step` into the checkpoint directory `url`,
        beside the updates. To be called in the order of cuts, and again for one that was not saved.
        """
        known = None if self._lead is None else self._lead.take_snapshot(step)
        return await self._cuts.save(step, url, known)

    async def drop_cut(self, step: int, term: int) -> None:
        """The cut of a term at `step` is not to be saved."""
        self._cuts.drop(step, term)

    async def release(self, worker: int) -> None:
        """Server 0: a worker is lost; what it had leased goes to whoever asks first."""
        if self._lead is not None:  # A new term knows of no worker.
            self._lead.release(worker)

    async def expect(self, workers: frozenset[int]) -> None:
        """Server 0: these workers are there, or will be soon."""
        if self._lead is not None:
            self._lead.expect(workers)

    async def pulse(self, wait_s: float) -> int:
        """Returns after `wait_s`, while this process runs, with the version that it is at."""
        await asyncio.sleep(wait_s)
        return self._range.version

    async def watch(self) -> int:
        """Whoever waits for it learns at once when this server is gone, and what failed in it that
        nobody waited for. Returns a term in which it did not reach another server.
        """
        return await self._alarm.term_of_parting()
