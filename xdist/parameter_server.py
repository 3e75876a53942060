"""ParameterServer: one range of the flat vector, its optimizer, its versions; and Sequencer, which
orders the updates.

A push *stages* its pieces on all servers; then a *commit* on server 0, where the `Sequencer` lives,
fixes version and order, and every server applies in that order. What is staged without a commit is
dropped. So all servers apply a push or none does, "every server at version v" is a consistent state
of the run, and one cut holds ledger and weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datapipe.errors import CorruptSample
from datapipe.order import Order
from datapipe.position import Span
from xdist import checkpoint, optim
from xdist.checkpoint import Checkpoint, Cut, Part
from xdist.config import TrainConfig
from xdist.errors import LeaseLost
from xdist.ledger import Ledger
from xdist.state import RangeState, StatisticsState, copies

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Push:
    """What a worker asks server 0 to commit, once its pieces are staged everywhere."""

    worker: int
    token: int
    """Fencing token: of this incarnation of the worker."""
    sequence: int
    """Number of this push, from 1, under this token."""
    spans: tuple[Span, ...]
    """The places it covers."""
    corrupt: tuple[CorruptSample, ...]
    """The samples at these places that could not be decoded."""
    base_version: int
    """Oldest version, over the ranges, of the weights that the gradient was computed with."""


@dataclass(frozen=True)
class Commit:
    """One update, as every server applies it."""

    version: int
    worker: int
    token: int
    sequence: int
    learning_rate: float
    average_decay: float
    num_samples: int
    """Places done since the start of training, this update's included."""
    staleness: int
    """Commits between the push's pull and this commit."""
    cut: Cut | None
    """Set when the state after this update is to be saved."""


class Sequencer:
    """Decides the order of updates; keeps the ledger, the schedules, the batch-norm statistics, the
    version, and which samples were corrupt. Pure.
    """

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
        self._config = config
        self._save_every_samples = save_every_samples

    def commit(self, push: Push, batch_statistics: Vector) -> Commit:
        """Fix version and order of a push. Raises `LeaseLost` and changes nothing when the worker
        was replaced.
        """
        before = self.ledger.num_done
        self.ledger.commit(push.worker, push.token, push.sequence, push.spans)
        after = self.ledger.num_done
        self.corrupt += push.corrupt
        decay = optim.average_decay(
            self._config.optimizer, num_samples=after - before, num_updates=self.version
        )
        self.statistics.apply(torch.tensor(batch_statistics), average_decay=decay)
        staleness = self.version - push.base_version
        self.version += 1
        commit = Commit(
            version=self.version,
            worker=push.worker,
            token=push.token,
            sequence=push.sequence,
            learning_rate=optim.learning_rate(self._config.optimizer, before),
            average_decay=decay,
            num_samples=after,
            staleness=staleness,
            cut=None,
        )
        if self.ledger.is_finished or checkpoint.is_due(
            before, after, every=self._save_every_samples
        ):
            cut = Cut(self.version, after, self.ledger.position, self.ledger.is_finished)
            return replace(commit, cut=cut)
        return commit


@dataclass(frozen=True)
class ServerPlan:
    """What a server is built from: plain values, so that the actor loads its own range."""

    config: TrainConfig
    checkpoint_url: str
    start: int
    stop: int
    order: Order
    num_places: int
    save_every_samples: int
    is_lead: bool
    """Server 0, the one with the sequencer."""


def load_state(plan: ServerPlan) -> RangeState:
    """The range of a server, from the checkpoint."""
    source = Checkpoint.open(plan.checkpoint_url)
    return RangeState.from_tensors(
        source.read_range(plan.start, plan.stop),
        config=plan.config.optimizer,
        start=plan.start,
        stop=plan.stop,
        l2_mask=source.manifest.layout.l2_mask(plan.config.optimizer.l2_on)[plan.start : plan.stop],
    )


def load_sequencer(plan: ServerPlan) -> Sequencer:
    """The sequencer, from the checkpoint."""
    source = Checkpoint.open(plan.checkpoint_url)
    cut = source.manifest.cut
    ledger = Ledger(
        cut.position,
        order=plan.order,
        num_places=plan.num_places,
        batch_size=plan.config.batch_size,
    )
    statistics = StatisticsState.from_tensors(
        source.read_statistics(),
        config=plan.config.optimizer,
        momentum=source.manifest.layout.statistics_momentum,
    )
    return Sequencer(
        plan.config,
        ledger=ledger,
        statistics=statistics,
        version=cut.step,
        save_every_samples=plan.save_every_samples,
    )


class ParameterServer:
    """Owner of one range. Its coroutines share one event loop, so each of them is atomic up to its
    `await`.

    Server 0 also has the sequencer; `connect` tells it how to reach the other servers. Messages may
    arrive in any order: commits are applied by version, and a pull waits for the version it asks
    for.
    """

    def __init__(self, plan: ServerPlan) -> None:
        torch.set_num_threads(max(1, int(plan.config.cluster.cpus_per_server)))
        self._state = load_state(plan)
        self._sequencer = load_sequencer(plan) if plan.is_lead else None
        self._version = Checkpoint.open(plan.checkpoint_url).manifest.cut.step
        self._send_to_others: Callable[[Commit], object] = _alone
        self._staged: dict[int, Staged] = {}
        self._pending: dict[int, Commit] = {}
        self._saved: dict[int, Snapshot] = {}
        self._cuts: list[Cut] = []
        self._broken: BaseException | None = None
        self._changed = asyncio.Condition()

    async def connect(self, send_to_others: Callable[[Commit], object]) -> None:
        """Server 0: `send_to_others(commit)` calls `apply(commit)` on every other server and does
        not wait.
        """
        self._send_to_others = send_to_others

    async def register(self, worker: int) -> tuple[int, int]:
        """Server 0: a new fencing token for a worker, and the version that it starts from.

        Its predecessor's last commit is in that version: who pulls it from a server may stage there
        without replacing what is still needed.
        """
        return self._lead.ledger.register(worker), self._lead.version

    async def release(self, worker: int) -> None:
        """Server 0: a worker is lost; what it had leased goes to whoever asks first."""
        self._lead.ledger.release(worker)
        async with self._changed:
            self._changed.notify_all()

    async def lease(self, worker: int, token: int) -> Span | None:
        """Server 0: the next places for a worker; None when none is free. Raises `LeaseLost`."""
        return self._lead.ledger.lease(worker, token)

    async def await_lease(self, worker: int, token: int) -> Span | None:
        """Server 0: the next places for a worker, as soon as there are any: others may be lost.
        None when the run is over. Raises `LeaseLost`.
        """
        ledger = self._lead.ledger
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    ledger.has_free or ledger.is_finished or not ledger.is_current(worker, token)
                )
            )
            return ledger.lease(worker, token)

    async def stage(self, worker: int, token: int, sequence: int, gradients: Vector) -> None:
        """Keep one push's piece until its commit. gradients: (stop - start,) float32, copied.
        Raises `LeaseLost`.

        A worker has one piece staged at a time: the next replaces one that was never committed.
        """
        staged = self._staged.get(worker)
        if staged is None:
            staged = self._staged[worker] = Staged(
                token, sequence, torch.empty_like(self._state.weights)
            )
        if token < staged.token:
            raise LeaseLost(
                f"worker {worker} holds token {token}, {staged.token} was seen; it was replaced"
            )
        staged.token, staged.sequence = token, sequence
        np.copyto(staged.gradients.numpy(), gradients)

    async def commit(self, push: Push, batch_statistics: Vector) -> Commit:
        """Server 0: order a push that is staged on all servers, and have all apply it. Raises
        `LeaseLost`.
        """
        commit = self._lead.commit(push, batch_statistics)
        self._send_to_others(commit)
        await self.apply(commit)
        return commit

    async def apply(self, commit: Commit) -> None:
        """Apply this commit, and those that waited for it, in the order of versions."""
        self._pending[commit.version] = commit
        try:
            while (due := self._pending.pop(self._version + 1, None)) is not None:
                self._apply(due)
        except BaseException as error:
            self._broken = error
            raise
        finally:
            async with self._changed:
                self._changed.notify_all()

    def _apply(self, commit: Commit) -> None:
        staged = self._staged[commit.worker]
        assert (staged.token, staged.sequence) == (commit.token, commit.sequence)
        self._state.apply(
            staged.gradients,
            learning_rate=commit.learning_rate,
            average_decay=commit.average_decay,
        )
        self._version = commit.version
        if commit.cut is not None:
            self._take_snapshot(commit.cut)

    def _take_snapshot(self, cut: Cut) -> None:
        snapshot = Snapshot(copies(self._state.tensors()))
        if self._sequencer is not None:
            statistics = copies(self._sequencer.statistics.tensors())
            snapshot = replace(snapshot, statistics=statistics, corrupt=self._sequencer.corrupt)
        self._saved[cut.step] = snapshot
        self._cuts.append(cut)

    async def pull(self, min_version: int) -> tuple[int, Vector]:
        """Version, at least `min_version`, and a copy of the weights, (stop - start,) float32, at
        that version.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._version >= min_version)
        return self._version, self._state.weights.numpy().copy()

    async def next_cut(self, after_step: int) -> Cut:
        """Server 0: the first cut after `after_step`, as soon as there is one."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: bool(self._cuts) and self._cuts[-1].step > after_step
            )
        return next(cut for cut in self._cuts if cut.step > after_step)

    async def save(self, step: int, url: str) -> tuple[tuple[Part, ...], tuple[CorruptSample, ...]]:
        """Write this server's parts of the cut at `step` into the checkpoint directory `url`,
        beside the updates. Server 0 also returns the corrupt samples met since it began.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: step in self._saved)
        snapshot = self._saved.pop(step)
        parts = await asyncio.to_thread(snapshot.write, url, self._state.start, self._state.stop)
        return parts, snapshot.corrupt

    async def watch(self) -> None:
        """Never returns: whoever waits for it learns at once when this server is gone, and what a
        commit raised that nobody waited for.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._broken is not None)
        raise RuntimeError(f"a commit could not be applied: {self._broken!r}") from self._broken

    @property
    def _lead(self) -> Sequencer:
        assert self._sequencer is not None, "only server 0 has the sequencer"
        return self._sequencer


@dataclass
class Staged:
    """A push's piece that waits for its commit."""

    token: int
    sequence: int
    gradients: Tensor


@dataclass(frozen=True)
class Snapshot:
    """Host copies of a server's state at a cut."""

    tensors: dict[str, Tensor]
    statistics: dict[str, Tensor] | None = None
    """Server 0's."""
    corrupt: tuple[CorruptSample, ...] = ()

    def write(self, url: str, start: int, stop: int) -> tuple[Part, ...]:
        part = checkpoint.write_range(url, self.tensors, start=start, stop=stop)
        if self.statistics is None:
            return (part,)
        return (part, checkpoint.write_statistics(url, self.statistics))


def _alone(_commit: Commit) -> None:
    """There are no other servers."""
