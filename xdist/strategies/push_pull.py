"""PushPull: asynchronous data parallelism over parameter servers.

A push sends each server the gradient of its range, and returns the weights that contain it: one
worker alone trains exactly like a plain loop. Nobody waits for another worker. With `overlap` the
next gradient is computed while pushes are on their way.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from datapipe.batch import Batch
from datapipe.position import Span
from xdist.checkpoint import Part
from xdist.computation import BatchSums
from xdist.config import TrainConfig
from xdist.errors import LeaseLost, PeerLost
from xdist.flat import FlatModel
from xdist.sequencer import Push, PushId
from xdist.server_messages import Reply
from xdist.step_phases import Nobody, StepObserver
from xdist.strategies import Progress


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
        self._progress = Progress(own_step=0, step=0, num_samples=0, learning_rate=0.0)
        self._observer: StepObserver = Nobody()
        self._base_version: int | None = None
        self._on_the_way: deque[list[ray.ObjectRef[Any]]] = deque()
        self._staleness: Counter[int] = Counter()
        self._lacks_samples = False

    def join(self, membership: Servers) -> None:
        """Get this incarnation's fencing token, and the weights."""
        self._servers = membership.servers
        self._ranges = membership.ranges
        self._worker = membership.worker
        self._on_the_way.clear()
        self._lacks_samples = False
        [(self._token, version)] = self._call([self._servers[0].register.remote(self._worker)])
        self._progress = Progress(own_step=0, step=version, num_samples=0, learning_rate=0.0)
        self._take(self._call([server.pull.remote(version) for server in self._servers]))

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
    def wants_stop(self) -> bool:
        return False

    @property
    def peer_wait_s(self) -> float:
        return 0.0

    @property
    def lacks_samples(self) -> bool:
        return self._lacks_samples

    def take_staleness(self) -> dict[int, int]:
        taken, self._staleness = self._staleness, Counter()
        return dict(taken)

    def loss_divisor(self, batch: Batch) -> float:
        """Its samples: a push is a mean."""
        return max(1, batch.num_samples)

    def begin(self, sums: BatchSums) -> None:
        """Nothing is sent before the gradient is whole."""

    def gradient_ready(self, parameter: int) -> None:
        """Nothing is sent before the gradient is whole."""

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
        self._send(batch, sums)
        self._observer.enter("pull")
        while len(self._on_the_way) > self._overlap:
            self._receive()

    def finish(self) -> None:
        """See all pushes through."""
        while self._on_the_way:
            self._receive()

    def _send(self, batch: Batch, sums: BatchSums) -> None:
        assert self._base_version is not None
        own_step = self._progress.own_step + 1
        name = PushId(self._worker, self._token, own_step)
        gradients = self._flat.gradients.cpu().numpy()
        mean = sums.statistics / sums.num_parts if sums.num_parts else self._flat.statistics
        norm = torch.linalg.vector_norm(self._flat.gradients).item() if self._clips else 0.0
        push = Push(
            name, batch.spans, batch.corrupt, self._base_version, mean.cpu().numpy().copy(), norm
        )
        staged = [
            server.stage.remote(name, 0, gradients[start:stop])
            for server, (start, stop) in zip(self._servers, self._ranges, strict=True)
        ]
        lead, *others = self._servers
        replies = [server.push.remote(name) for server in others]
        self._on_the_way.append([lead.push.remote(name, push), *replies, *staged])
        self._progress = replace(self._progress, own_step=own_step)

    def _receive(self) -> None:
        """Wait for the oldest push that is on its way."""
        replies: list[Reply] = self._call(self._on_the_way[0])[: len(self._servers)]
        self._on_the_way.popleft()
        self._take(replies)
        commit = replies[0].commit
        if commit is None:
            return
        self._progress = Progress(
            self._progress.own_step, commit.version, commit.num_samples, commit.learning_rate
        )
        self._staleness[commit.staleness] += 1

    def _take(self, replies: list[Reply]) -> None:
        """Compute with these weights from now on."""
        for (start, stop), reply in zip(self._ranges, replies, strict=True):
            np.copyto(self._host_weights[start:stop].numpy(), reply.weights)
        if self._flat.weights.device.type != "cpu":
            self._flat.weights.copy_(self._host_weights)
        self._base_version = min(reply.version for reply in replies)

    def _call(self, references: list[ray.ObjectRef[Any]]) -> list[Any]:
        try:
            return ray.get(references)
        except (RayActorError, ObjectLostError) as error:
            raise PeerLost(f"worker {self._worker}: a parameter server is gone: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, (PeerLost, LeaseLost)):
                raise error.cause from error
            raise

    def save(self) -> tuple[Part, ...]:
        """Nothing: the servers own the state."""
        return ()

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
