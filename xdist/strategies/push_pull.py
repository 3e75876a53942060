"""PushPull: asynchronous data parallelism over parameter servers.

A push stages its pieces on all servers, commits on server 0, and pulls the weights that contain it:
one worker alone trains exactly like a plain loop. Nobody waits for another worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError

from datapipe.batch import Batch
from datapipe.position import Span
from xdist.checkpoint import Part
from xdist.errors import PeerLost
from xdist.flat import FlatModel
from xdist.parameter_server import Commit, Push
from xdist.strategies import Progress


class PushPull:
    """The strategy of one incarnation of a worker; construction pulls the weights.

    servers: in the order of their ranges; server 0 leads, and gives this incarnation its fencing
    token.
    """

    def __init__(
        self,
        flat: FlatModel,
        *,
        servers: Sequence[ActorHandle[Any]],
        ranges: Sequence[tuple[int, int]],
        worker: int,
    ) -> None:
        self._flat = flat
        self._servers = servers
        self._ranges = ranges
        self._worker = worker
        self._host_weights = flat.weights.to("cpu")  # On a CPU it is the same memory.
        [(self._token, version)] = self._call([servers[0].register.remote(worker)])
        self._progress: Progress = Progress(
            own_step=0, step=version, num_samples=0, learning_rate=0.0
        )
        self._pull(min_version=version)

    @property
    def progress(self) -> Progress:
        return self._progress

    def update(self, batch: Batch) -> int:
        """Push the gradient and pull the weights that contain it. Returns the push's staleness."""
        own_step = self._progress.own_step + 1
        self._stage(own_step)
        commit = self._commit(own_step, batch)
        self._progress = Progress(
            own_step, commit.version, commit.num_samples, commit.learning_rate
        )
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

    def _commit(self, sequence: int, batch: Batch) -> Commit:
        push = Push(
            self._worker, self._token, sequence, batch.spans, batch.corrupt, self._base_version
        )
        statistics = self._flat.statistics.cpu().numpy()
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
