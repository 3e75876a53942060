"""PushPull: asynchronous data parallelism over parameter servers.

A push stages its pieces on all servers, commits on server 0, and pulls the weights that contain it:
one worker alone trains exactly like a plain loop. Nobody waits for another worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError

from datapipe.batch import Batch
from datapipe.position import Span
from xdist.checkpoint import Part
from xdist.computation import BatchSums
from xdist.errors import PeerLost
from xdist.flat import FlatModel
from xdist.parameter_server import Commit, Push
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
    """The strategy of one incarnation of a worker."""

    def __init__(self, flat: FlatModel) -> None:
        self._flat = flat
        self._host_weights = flat.weights.to("cpu")  # On a CPU it is the same memory.
        self._progress = Progress(own_step=0, step=0, num_samples=0, learning_rate=0.0)
        self._observer: StepObserver = Nobody()
        self._base_version: int | None = None

    def join(self, membership: Servers) -> None:
        """Get this incarnation's fencing token, and the weights."""
        self._servers = membership.servers
        self._ranges = membership.ranges
        self._worker = membership.worker
        [(self._token, version)] = self._call([self._servers[0].register.remote(self._worker)])
        self._progress = Progress(own_step=0, step=version, num_samples=0, learning_rate=0.0)
        self._pull(min_version=version)

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

    def update(self, batch: Batch, sums: BatchSums) -> int:
        """Push the gradient and pull the weights that contain it. Returns the push's staleness."""
        self._observer.enter("push")
        own_step = self._progress.own_step + 1
        self._stage(own_step)
        commit = self._commit(own_step, batch, sums)
        self._progress = Progress(
            own_step, commit.version, commit.num_samples, commit.learning_rate
        )
        self._observer.enter("pull")
        self._pull(min_version=commit.version)
        return commit.staleness

    def _stage(self, sequence: int) -> None:
        gradients = self._flat.gradients.cpu().numpy()
        self._call(
            [
                server.stage.remote(self._worker, self._token, sequence, gradients[start:stop])
                for server, (start, stop) in zip(self._servers, self._ranges, strict=True)
            ]
        )

    def _commit(self, sequence: int, batch: Batch, sums: BatchSums) -> Commit:
        assert self._base_version is not None
        push = Push(
            self._worker, self._token, sequence, batch.spans, batch.corrupt, self._base_version
        )
        mean = sums.statistics / sums.num_parts if sums.num_parts else self._flat.statistics
        statistics = mean.cpu().numpy()
        [commit] = self._call([self._servers[0].commit.remote(push, statistics)])
        return commit

    def _pull(self, *, min_version: int) -> None:
        pulled = self._call([server.pull.remote(min_version) for server in self._servers])
        for (start, stop), (_, weights) in zip(self._ranges, pulled, strict=True):
            np.copyto(self._host_weights[start:stop].numpy(), weights)
        if self._flat.weights.device.type != "cpu":
            self._flat.weights.copy_(self._host_weights)
        self._base_version = min(version for version, _ in pulled)

    def _call(self, references: list[ray.ObjectRef[Any]]) -> list[Any]:
        try:
            return ray.get(references)
        except (RayActorError, ObjectLostError) as error:
            raise PeerLost(f"worker {self._worker}: a parameter server is gone: {error}") from error

    def save(self) -> tuple[Part, ...]:
        """Nothing: the servers own the state."""
        return ()

    def leases(self) -> Iterator[Span | None]:
        """The places that server 0 leases to this worker, as they are asked for; None where none is
        free, before it waits for one. Ends with the run.
        """
        lead = self._servers[0]
        while True:
            [span] = self._call([lead.lease.remote(self._worker, self._token)])
            if span is None:
                yield None
                [span] = self._call([lead.await_lease.remote(self._worker, self._token)])
                if span is None:
                    return
            yield span
