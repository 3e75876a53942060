"""Sequencer: decides, on server 0, which update comes next and of which pushes it is made.

It keeps the ledger, the schedules, the batch-norm statistics, the version, and which samples were
corrupt. Pure: no clock, no I/O. A replica follows its decisions, one after the other, and has then
all of it but the leases, which are void when it takes over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from datapipe.errors import CorruptSample
from datapipe.position import Span
from xdist import checkpoint, optim
from xdist.checkpoint import Cut
from xdist.config import TrainConfig
from xdist.errors import LeaseLost
from xdist.ledger import Ledger
from xdist.state import StatisticsState

COMMITS_REMEMBERED = 1024
"""More than can be on their way to a server."""
Vector = NDArray[np.float32]


@dataclass(frozen=True, order=True)
class PushId:
    """Which push."""

    worker: int
    token: int
    """Fencing token: of this incarnation of the worker."""
    sequence: int
    """Number of this push, from 1, under this token."""


@dataclass(frozen=True)
class Push:
    """What server 0 is to know of a push."""

    id: PushId
    spans: tuple[Span, ...]
    """The places it covers."""
    corrupt: tuple[CorruptSample, ...]
    """The samples at these places that could not be decoded."""
    base_version: int
    """Oldest version, over the ranges, of the weights that the gradient was computed with."""
    statistics: Vector
    """Raw batch-norm statistics of its batch."""
    gradient_norm: float = 0.0
    """Of the whole gradient, where gradients are clipped."""


@dataclass(frozen=True)
class Commit:
    """One update, as every server applies it."""

    term: int
    """In which it is sent; it may have been decided in an earlier one."""
    version: int
    pushes: tuple[PushId, ...]
    shares: tuple[float, ...]
    """Of each push in the update: of its samples in all of theirs."""
    learning_rate: float
    average_decay: float
    scale: float
    """That the gradient is multiplied by first."""
    num_samples: int
    """Places done since the start of training, this update's included."""
    staleness: int
    """Commits between the pull of its weights and this commit."""
    cut: Cut | None
    """Set when the state after this update is to be saved."""


@dataclass(frozen=True)
class Decision:
    """What a replica of server 0 is to know of a commit."""

    commit: Commit
    pushes: tuple[Push, ...]


class Sequencer:
    """Orders the pushes that are staged on all servers."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        ledger: Ledger,
        statistics: StatisticsState,
        version: int,
        save_every_samples: int,
    ) -> None:
        self.ledger = ledger
        self.statistics = statistics
        self.version = version
        self.corrupt: tuple[CorruptSample, ...] = ()
        self.commits: deque[Commit] = deque(maxlen=COMMITS_REMEMBERED)
        """The last ones, for a server that has not heard of them."""
        self._config = config
        self._save_every_samples = save_every_samples
        self._offered: dict[PushId, Push] = {}
        self._sequences: dict[int, int] = {}
        """Worker -> number of the last push that it offered."""
        self._clocks: dict[int, int] = {}
        """Worker -> its pushes that were committed, and those of others before it came."""

    def register(self, worker: int) -> int:
        """A new fencing token for a worker, whose clock starts with that of the slowest."""
        self._forget(worker)
        self._clocks[worker] = min(self._clocks.values(), default=0)
        self._sequences[worker] = 0
        return self.ledger.register(worker)

    def release(self, worker: int) -> int:
        """A worker is lost: what it had leased goes to whoever asks first. Returns the least token
        that counts from now on.
        """
        self._forget(worker)
        return self.ledger.release(worker)

    def _forget(self, worker: int) -> None:
        self._clocks.pop(worker, None)
        self._offered = {key: push for key, push in self._offered.items() if key.worker != worker}

    def next_push(self, worker: int, token: int) -> PushId:
        """The push of this worker that is to be offered next."""
        return PushId(worker, token, self._sequences[worker] + 1)

    def offer(self, push: Push) -> bool:
        """Take a push that is staged on all servers; False where it is dropped, as its weights are
        not those of the update that is being made. Raises `LeaseLost` for a worker that was
        replaced, and for a push that came before.
        """
        worker, sequence = push.id.worker, push.id.sequence
        self.ledger.check(worker, push.id.token)
        if sequence != self._sequences[worker] + 1:
            raise LeaseLost(
                f"worker {worker} offers push {sequence} after push {self._sequences[worker]}; "
                "a push is offered once, and in order"
            )
        self._sequences[worker] = sequence
        if self._config.servers.commit_first is not None and push.base_version != self.version:
            self.ledger.give_back(worker, push.spans)
            return False
        self._offered[push.id] = push
        return True

    def decide(self, *, num_active: int) -> Decision | None:
        """The next commit, if enough pushes are there. num_active: workers that have, or are about
        to have, samples to compute.
        """
        needed = min(self._config.servers.commit_first or 1, max(1, num_active))
        if len(self._offered) < needed:
            return None
        before = self.ledger.num_done
        pushes = tuple(self._offered.values())[:needed]
        for push in pushes:
            del self._offered[push.id]
            self._clocks[push.id.worker] += 1
            self.ledger.commit(push.id.worker, push.spans)
        commit = self._commit(pushes, before=before)
        self._apply(commit, pushes)
        return Decision(commit, pushes)

    def take_late(self) -> tuple[Push, ...]:
        """The offered pushes that no commit will take any more; they are dropped."""
        if self._config.servers.commit_first is None:
            return ()
        late = tuple(p for p in self._offered.values() if p.base_version != self.version)
        for push in late:
            del self._offered[push.id]
            self.ledger.give_back(push.id.worker, push.spans)
        return late

    def _commit(self, pushes: tuple[Push, ...], *, before: int) -> Commit:
        after = self.ledger.num_done
        optimizer = self._config.optimizer
        is_due = self.ledger.is_finished or checkpoint.is_due(
            before, after, every=self._save_every_samples
        )
        sizes = [sum(span.num_samples for span in push.spans) for push in pushes]
        staleness = max(self.version - push.base_version for push in pushes)
        rate = optim.learning_rate(optimizer, before)
        if self._config.servers.scale_by_staleness:
            rate /= max(1, staleness)
        norm = max(push.gradient_norm for push in pushes)
        return Commit(
            term=0,
            version=self.version + 1,
            pushes=tuple(push.id for push in pushes),
            shares=tuple(size / max(1, sum(sizes)) for size in sizes) if len(sizes) > 1 else (1.0,),
            learning_rate=rate,
            average_decay=optim.average_decay(
                optimizer, num_samples=after - before, num_updates=self.version
            ),
            scale=optim.clip_scale(optimizer, norm),
            num_samples=after,
            staleness=staleness,
            cut=self._cut(self.version + 1) if is_due else None,
        )

    def cut_here(self) -> Cut:
        """A cut of the state as it is."""
        return self._cut(self.version)

    def _cut(self, version: int) -> Cut:
        ledger = self.ledger
        return Cut(version, ledger.num_done, ledger.position, ledger.is_finished)

    def follow(self, decision: Decision) -> None:
        """On a replica: take over what the other one decided; again, it changes nothing."""
        if decision.commit.version <= self.version:
            return
        for push in decision.pushes:
            self.ledger.complete(push.spans)
        self._apply(decision.commit, decision.pushes)

    def _apply(self, commit: Commit, pushes: tuple[Push, ...]) -> None:
        self.corrupt += tuple(sample for push in pushes for sample in push.corrupt)
        statistics = np.mean([push.statistics for push in pushes], axis=0, dtype=np.float32)
        self.statistics.apply(torch.from_numpy(statistics), average_decay=commit.average_decay)
        self.version = commit.version
        self.commits.append(commit)

    def begin_term(self, ledger: Ledger) -> None:
        """Forget the workers, and what they have offered: they register anew, in this ledger."""
        self.ledger = ledger
        self._offered, self._sequences, self._clocks = {}, {}, {}

    def may_go_on(self, worker: int, *, waiting: frozenset[int]) -> bool:
        """Whether a worker may compute another push, or is too far ahead of the slowest one.
        waiting: workers that have no samples for now, and hold nobody up.
        """
        lead = self._config.servers.max_clock_lead
        clock = self._clocks.get(worker)
        if lead is None or clock is None:
            return True
        slowest = min(c for w, c in self._clocks.items() if w == worker or w not in waiting)
        return clock + 1 - slowest <= lead

    @property
    def workers(self) -> frozenset[int]:
        """Those that are registered."""
        return frozenset(self._clocks)
