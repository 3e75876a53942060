"""PushPull: asynchronous data parallelism over parameter servers.

A push sends each server the gradient of its range, part by part while backward still runs, and
returns the weights that contain it: one worker alone trains exactly like a plain loop. Nobody waits
for another worker. With `overlap` the next gradient is computed while pushes are on their way.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from datapipe.batch import Batch
from datapipe.position import Span
from xdist import wire
from xdist.computation import BatchSums
from xdist.config import TrainConfig
from xdist.errors import LeaseLost, PeerLost
from xdist.flat import FlatModel
from xdist.sequencer import Push, PushId
from xdist.server_messages import Reply
from xdist.share_writer import Written
from xdist.step_phases import Nobody, StepObserver
from xdist.strategies import Progress, Share
from xdist.strategies.factors import Factors, flop_per_byte
from xdist.strategies.outbox import Outbox, Outgoing
from xdist.strategies.server_link import ServerLink
from xdist.weights_board import BoardAddress


@dataclass(frozen=True)
class Servers:
    """Where a worker pushes to and pulls from."""

    servers: tuple[ActorHandle[Any], ...]
    """In the order of their ranges; server 0 leads."""
    ranges: tuple[tuple[int, int], ...]
    worker: int
    """The number of this worker."""


class PushPull:
    """The strategy of one worker."""

    def __init__(self, config: TrainConfig, flat: FlatModel) -> None:
        self._flat = flat
        self._overlap = config.servers.overlap
        self._clips = config.optimizer.clip_norm is not None
        self._host_weights = flat.weights.to("cpu")  # On a CPU it is the same memory.
        is_summed = config.compute.accumulation_steps > 1 or config.bn_group == "lane"
        self._outbox = Outbox(config.servers, flat, is_summed=is_summed)
        self._factors: Factors | None = None
        if config.servers.factors:
            dtype = wire.dtype_of(config.servers)
            self._factors = Factors(flat, dtype, flop_per_byte=flop_per_byte(config))
        self._links: tuple[ServerLink, ...] = ()
        self._staged: list[ray.ObjectRef[Any]] = []
        """Of the push that is being computed."""
        self._last: Outgoing | None = None
        """The last part of that push, once it is there: it is sent with the push itself."""
        self._progress = Progress(own_step=0, step=0, num_samples=0, learning_rate=0.0)
        self._observer: StepObserver = Nobody()
        self._base_version: int | None = None
        self._on_the_way: deque[list[ray.ObjectRef[Any]]] = deque()
        self._staleness: Counter[int] = Counter()
        self._lacks_samples = False
        self._is_sending = False
        self._is_dropped = False

    def join(self, membership: Servers) -> None:
        """Get this incarnation's fencing token, and the weights."""
        servers = self._servers = membership.servers
        self._worker = membership.worker
        self._on_the_way.clear()
        self._staged, self._last = [], None
        self._lacks_samples = self._is_sending = False
        [(self._token, version)] = self._call([servers[0].register.remote(self._worker)])
        self._progress = Progress(own_step=0, step=version, num_samples=0, learning_rate=0.0)
        boards = self._share(servers)
        self._links = tuple(
            ServerLink.through(board, server, weights)
            for board, server, weights in zip(boards, servers, membership.ranges, strict=True)
        )
        if not self.num_shared:
            self._outbox.keep()
        if self._factors is not None:
            self._factors.is_wanted = self.num_shared < len(servers)
            self._factors.clear()
        self._take(self._call([link.pull(version) for link in self._links]))

    def _share(self, servers: tuple[ActorHandle[Any], ...]) -> list[BoardAddress | None]:
        """Where the servers publish weights that see this worker's gradients in memory."""
        slots = self._outbox.share(f"gradients of worker {self._worker}")
        if slots is None:
            return [None] * len(servers)
        who = self._worker, self._token
        return self._call([server.connect.remote(*who, slots) for server in servers])

    @property
    def progress(self) -> Progress:
        return self._progress

    @property
    def state_step(self) -> int | None:
        return self._base_version

    @property
    def dropout_keys(self) -> tuple[int, ...]:
        return (self._worker,)

    @property
    def seed_step(self) -> int:
        return self._progress.step + len(self._on_the_way)

    @property
    def wants_stop(self) -> bool:
        return False

    @property
    def peer_wait_s(self) -> float:
        return 0.0

    @property
    def num_shared(self) -> int:
        return sum(link.board is not None for link in self._links)

    @property
    def lacks_samples(self) -> bool:
        return self._lacks_samples

    @property
    def is_sending(self) -> bool:
        return self._is_sending

    def take_staleness(self) -> dict[int, int]:
        taken, self._staleness = self._staleness, Counter()
        return dict(taken)

    def loss_divisor(self, batch: Batch) -> float:
        """Its samples: a push is a mean."""
        return max(1, batch.num_samples)

    def begin(self, _batch: Batch, _sums: BatchSums) -> None:
        self._outbox.begin()

    def gradient_ready(self, parameter: int) -> None:
        for part in self._outbox.ready(parameter):
            self._stage(part)

    def request_stop(self) -> None:
        """Workers that do not know each other need no common step."""

    def observe(self, observer: StepObserver) -> None:
        self._observer = observer

    def wait_at_most(self, timeout_s: float) -> None:
        """Servers are waited for until they are gone."""

    def abort(self) -> None:
        """No other worker is waited for."""

    def leave(self) -> None:
        """Nobody waits for this worker."""

    def update(self, batch: Batch, sums: BatchSums) -> None:
        """Push the gradient; take the weights that contain it, or, with overlap, one before it."""
        self._observer.enter("push")
        self._is_sending = True
        self._send(batch, sums)
        self._is_sending = False
        self._observer.enter("pull")
        while len(self._on_the_way) > self._overlap:
            self._receive()

    @property
    def is_dropped(self) -> bool:
        return self._is_dropped

    def finish(self) -> None:
        """See all pushes through."""
        while self._on_the_way:
            self._receive()

    @property
    def _name(self) -> PushId:
        """Of the next push."""
        return PushId(self._worker, self._token, self._progress.own_step + 1)

    def _stage(self, part: Outgoing) -> None:
        if part.start == 0:  # Backward ends with the first weights.
            self._last = part
            return
        for link in self._links:
            self._staged += link.stage(self._name, part, self._factors)

    def _send(self, batch: Batch, sums: BatchSums) -> None:
        assert self._base_version is not None
        for part in self._outbox.rest():
            self._stage(part)
        mean = sums.statistics / sums.num_parts if sums.num_parts else self._flat.statistics
        norm = self._norm() if self._clips else 0.0
        statistics = mean.cpu().numpy().copy()
        name, base_version = self._name, self._base_version
        push = Push(name, batch.spans, batch.corrupt, base_version, statistics, norm)
        assert self._last is not None
        send = partial(
            ServerLink.push,
            name=name,
            slot=self._outbox.slot,
            last=self._last,
            factors=self._factors,
        )
        lead, *others = self._links
        answers = [send(link, described=None) for link in others]
        answers.insert(0, send(lead, described=push))
        replies, staged = [first for first, *_ in answers], [rest for _, *rest in answers]
        self._on_the_way.append([*replies, *itertools.chain(self._staged, *staged)])
        self._staged, self._last = [], None
        self._outbox.end()
        if self._factors is not None:
            self._factors.clear()
        self._progress = replace(self._progress, own_step=self._progress.own_step + 1)

    def _norm(self) -> float:
        """Of the gradient; what error feedback adds to it is not counted."""
        norm: float = torch.linalg.vector_norm(self._flat.gradients, dtype=torch.float32).item()
        return norm

    def _receive(self) -> None:
        """Wait for the oldest push that is on its way."""
        replies: list[Reply] = self._call(self._on_the_way[0])[: len(self._links)]
        self._on_the_way.popleft()
        self._take(replies)
        commit = replies[0].commit
        self._is_dropped = commit is None
        if commit is None:
            return
        self._progress = Progress(
            self._progress.own_step, commit.version, commit.num_samples, commit.learning_rate
        )
        self._staleness[commit.staleness] += 1

    def _take(self, replies: list[Reply]) -> None:
        """Compute with these weights from now on."""
        host = self._host_weights
        replies = self._fetched(replies)
        versions = [link.take(r, host) for link, r in zip(self._links, replies, strict=True)]
        if self._flat.weights.device.type != "cpu":
            self._flat.weights.copy_(host)
        self._base_version = min(versions)

    def _fetched(self, replies: list[Reply]) -> list[Reply]:
        """The replies, with the weights that others of this node may have fetched already."""
        shared = [r.weights for r in replies if isinstance(r.weights, ray.ObjectRef)]
        if not shared:
            return replies
        found = iter(self._call(shared))
        return [
            replace(r, weights=next(found)) if isinstance(r.weights, ray.ObjectRef) else r
            for r in replies
        ]

    def _call(self, references: list[ray.ObjectRef[Any]]) -> list[Any]:
        try:
            return ray.get(references)
        except (RayActorError, ObjectLostError) as error:
            raise PeerLost(f"worker {self._worker}: a parameter server is gone: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, (PeerLost, LeaseLost)):
                raise error.cause from error
            raise

    def save(self, _share: Share) -> None:
        """Nothing: the servers own the state."""

    def written(self, _step: int) -> Written:
        """Nothing."""
        return Written()

    def leases(self) -> Iterator[Span | None]:
        """The places that server 0 leases to this worker, as they are asked for; None where none is
        free, before it waits for one. Ends with the run.
        """
        lead, token = self._servers[0], self._token
        while True:
            [span] = self._call([lead.lease.remote(self._worker, token)])
            if span is None:
                yield None
                self._lacks_samples = True
                [span] = self._call([lead.await_lease.remote(self._worker, token)])
                self._lacks_samples = False
                if span is None:
                    return
            yield span
