"""Lead: what only server 0 does: it deals samples, and commits pushes that all servers have staged.

A *commit* fixes version and order of an update. Each server hears of each, and applies them in the
order of versions, whatever arrives first; so all servers apply a push or none does. Where server 0
has a replica, that one hears of a commit before anybody else: what anybody knows, it knows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from datapipe.errors import CorruptSample
from datapipe.position import Span
from xdist.background import Background
from xdist.changes import Changes
from xdist.checkpoint import Cut
from xdist.errors import PeerLost
from xdist.sequencer import Commit, Decision, Push, PushId, Sequencer
from xdist.state import copies


class Follower(Protocol):
    """A server, as the lead tells it what is to happen. Calls arrive in the order in which they are
    made; whoever waits for what they return learns that it has happened.
    """

    def apply(self, commit: Commit) -> Awaitable[None]:
        """Apply an update, in the order of versions."""

    def drop(self, name: PushId, version: int) -> Awaitable[None]:
        """A push will not be applied; its worker gets weights of that version or a later one."""

    def forget(self, worker: int, token: int) -> Awaitable[None]:
        """Refuse what comes of the tokens of a worker below this one."""

    def keep(self, cut: Cut) -> Awaitable[None]:
        """Keep the state of a cut, which is no commit's, until it is saved."""


def bring_level(
    servers: Sequence[Follower], versions: Sequence[int], commits: Sequence[Commit], *, term: int
) -> None:
    """Have servers at these versions make the updates that they have not heard of, in a term."""
    for commit in commits:
        for server, version in zip(servers, versions, strict=True):
            if commit.version > version:
                server.apply(replace(commit, term=term))


@dataclass(frozen=True)
class LeadSnapshot:
    """What only server 0 has of a cut."""

    statistics: dict[str, Tensor]
    corrupt: tuple[CorruptSample, ...]


@dataclass(frozen=True)
class _Forget:
    """Servers are to refuse what comes of the tokens of a worker below this one."""

    worker: int
    token: int


class Lead:
    """Leads the servers for one term."""

    def __init__(
        self,
        sequencer: Sequencer,
        *,
        term: int,
        servers: Sequence[Follower],
        replicate: Callable[[Decision], Awaitable[None]],
        most_workers: int,
        start_over_steps: int,
        background: Background,
    ) -> None:
        """servers: all, server 0 included. replicate: returns when the replica of server 0 knows of
        a decision, or there is none. most_workers: that there may be, all of which have begun after
        start_over_steps.
        """
        self.sequencer = sequencer
        self.cuts: list[Cut] = []
        self._snapshots: dict[int, LeadSnapshot] = {}
        """By the steps of cuts, until they are saved."""
        self._term = term
        self._servers = tuple(servers)
        self._replicate = replicate
        self._most_workers = most_workers
        self._start_over_steps = start_over_steps
        self._background = background
        self._described: dict[PushId, Push] = {}
        self._num_staged: dict[PushId, int] = {}
        self._complete: set[PushId] = set()
        """Staged on all servers, before one that its worker pushed earlier."""
        self._waiting: set[int] = set()
        """Workers whose readers wait for samples."""
        self._expected = frozenset(range(most_workers))
        """Workers that are there or will be soon, as far as the driver has told."""
        self._to_send: deque[Decision | _Forget] = deque()
        self._sending: asyncio.Future[None] | None = None
        self._is_over = False
        self._changes = Changes()

    async def register(self, worker: int) -> tuple[int, int]:
        """A new fencing token for a worker, once it is its turn to begin, and the version that it
        starts from. Raises `LeaseLost` where it was replaced meanwhile.
        """
        ledger = self.sequencer.ledger
        before = ledger.token(worker)
        await self._changes.until(
            lambda: self._is_over or ledger.token(worker) != before or self._may_begin(worker)
        )
        self._check_term()
        ledger.check(worker, before)
        token = self.sequencer.register(worker)
        self._forget(worker, token)
        self._changes.tell()
        return token, self.sequencer.version

    def _may_begin(self, worker: int) -> bool:
        """Whether it is the turn of one more than have begun, whichever that is."""
        num_begun = len(self.sequencer.workers - {worker})
        turn = self._start_over_steps * num_begun // self._most_workers
        return self.sequencer.version >= turn

    def expect(self, workers: frozenset[int]) -> None:
        """These are there, or will be soon: an update that is made of several pushes waits for
        theirs.
        """
        self._expected = workers
        self._go_on()

    def release(self, worker: int) -> None:
        """A worker is lost: what it had leased goes to whoever asks first."""
        self._expected -= {worker}
        self._forget(worker, self.sequencer.release(worker))
        self._go_on()

    def _forget(self, worker: int, token: int) -> None:
        self._waiting.discard(worker)
        for name in [name for name in self._described if name.worker == worker]:
            del self._described[name]
        for name in [name for name in self._num_staged if name.worker == worker]:
            del self._num_staged[name]
        self._complete = {name for name in self._complete if name.worker != worker}
        self._to_send.append(_Forget(worker, token))  # After what is decided of its pushes.
        self._send_soon()

    def lease(self, worker: int, token: int) -> Span | None:
        """The next places for a worker; None when none is free. Raises `LeaseLost`."""
        return self.sequencer.ledger.lease(worker, token)

    async def await_lease(self, worker: int, token: int) -> Span | None:
        """The next places for a worker, as soon as there are any: others may be lost. None when the
        run is over. Raises `LeaseLost`.
        """
        ledger = self.sequencer.ledger
        ledger.check(worker, token)
        self._waiting.add(worker)
        self._go_on()  # Without its pushes.
        await self._changes.until(
            lambda: (
                self._is_over
                or ledger.has_free
                or ledger.is_finished
                or not ledger.is_current(worker, token)
            )
        )
        self._check_term()
        span = ledger.lease(worker, token)
        if span is not None:  # Who has nothing left to do holds nobody up either.
            self._waiting.discard(worker)
        return span

    async def wait_for_others(self, worker: int) -> None:
        """While a worker is too far ahead of the slowest one."""
        await self._changes.until(
            lambda: self._is_over or self.sequencer.may_go_on(worker, waiting=self._without_samples)
        )
        self._check_term()

    def describe(self, push: Push) -> None:
        """Take what is to be known of a push, before it is staged on server 0. Raises
        `LeaseLost`.
        """
        self.sequencer.ledger.check(push.id.worker, push.id.token)
        self._described[push.id] = push

    def staged(self, name: PushId) -> None:
        """One more server has staged a push."""
        if self._is_over or not self.sequencer.ledger.is_current(name.worker, name.token):
            return
        self._num_staged[name] = self._num_staged.get(name, 0) + 1
        if self._num_staged[name] < len(self._servers):
            return
        del self._num_staged[name]
        self._complete.add(name)
        while (due := self.sequencer.next_push(name.worker, name.token)) in self._complete:
            self._complete.remove(due)
            if not self.sequencer.offer(self._described.pop(due)):
                self._drop(due)
        self._go_on()

    def _drop(self, name: PushId) -> None:
        for server in self._servers:
            server.drop(name, self.sequencer.version)

    def _go_on(self) -> None:
        """Something has changed: commit what can be committed, and wake who waits for it."""
        while not self._is_over:
            decision = self.sequencer.decide(num_active=self._num_active)
            if decision is None:
                break
            self._to_send.append(
                replace(decision, commit=replace(decision.commit, term=self._term))
            )
            if decision.commit.cut is not None:
                self._keep(decision.commit.cut)
            for push in self.sequencer.take_late():
                self._drop(push.id)
        self._send_soon()
        self._changes.tell()

    @property
    def _num_active(self) -> int:
        """Workers that have, or are about to have, samples to compute."""
        is_starting = self.sequencer.version < self._start_over_steps
        coming = frozenset() if is_starting else self._expected  # Else they come by updates.
        return len((self.sequencer.workers | coming) - self._without_samples)

    @property
    def _without_samples(self) -> frozenset[int]:
        """Workers that wait for samples, and have computed all that they had: they read ahead."""
        ledger = self.sequencer.ledger
        return frozenset(worker for worker in self._waiting if not ledger.has_leased(worker))

    def _send_soon(self) -> None:
        if self._to_send and (self._sending is None or self._sending.done()):
            self._sending = self._background.run(self._send())

    def _keep(self, cut: Cut) -> None:
        statistics = copies(self.sequencer.statistics.tensors())
        self._snapshots[cut.step] = LeadSnapshot(statistics, self.sequencer.corrupt)

    def take_snapshot(self, step: int) -> LeadSnapshot | None:
        """What is known of the cut at `step`, once; those before it are not asked for any more."""
        found = self._snapshots.get(step)
        self._snapshots = {later: each for later, each in self._snapshots.items() if later > step}
        return found

    def cut_here(self) -> None:
        """Have all servers keep what they are at, before anything is committed in this term."""
        cut = self.sequencer.cut_here()
        self._keep(cut)
        for server in self._servers:
            server.keep(cut)
        self.cuts.append(cut)

    async def _send(self) -> None:
        while self._to_send:
            decision = self._to_send.popleft()
            if isinstance(decision, _Forget):
                for server in self._servers:
                    server.forget(decision.worker, decision.token)
                continue
            await self._replicate(decision)
            for server in self._servers:
                server.apply(decision.commit)
            if decision.commit.cut is not None:
                self.cuts.append(decision.commit.cut)
                self._changes.tell()

    async def next_cut(self, after_step: int) -> Cut | None:
        """The first cut after `after_step`, as soon as there is one; None when the term is over."""
        await self._changes.until(
            lambda: self._is_over or (bool(self.cuts) and self.cuts[-1].step > after_step)
        )
        return next((cut for cut in self.cuts if cut.step > after_step), None)

    async def end_term(self) -> None:
        """Send what is decided; who waits for anything else gets `PeerLost`."""
        self._is_over = True
        self._changes.tell()
        if self._sending is not None:
            await self._sending

    def _check_term(self) -> None:
        if self._is_over:
            raise PeerLost.in_another_term()
