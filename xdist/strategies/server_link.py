"""ServerLink: one parameter server, as a worker reaches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from xdist import bfloat16, wire
from xdist.errors import NotShared
from xdist.product import Product
from xdist.sequencer import Push, PushId
from xdist.server_messages import Reply
from xdist.strategies.factors import Factors
from xdist.strategies.outbox import Outgoing
from xdist.weights_board import BoardAddress, BoardReader

READ_LIMIT_S = 60.0
"""For weights that are there already, in the memory of this node."""


@dataclass(frozen=True)
class ServerLink:
    """Gradients go to it, and weights come back; through shared memory if it has a board."""

    server: ActorHandle[Any]
    start: int
    stop: int
    """Of its range."""
    board: BoardReader | None
    """Where it publishes its weights; it reads gradients where they are."""

    @classmethod
    def through(
        cls, board: BoardAddress | None, server: ActorHandle[Any], weights: tuple[int, int]
    ) -> ServerLink:
        """board: where the server says that it publishes; None where it does not."""
        try:
            reader = None if board is None else BoardReader(board)
        except NotShared:
            reader = None
        return cls(server, *weights, reader)

    def stage(
        self, name: PushId, part: Outgoing, factors: Factors | None
    ) -> list[ray.ObjectRef[Any]]:
        """Send what the server needs of a part of a push, as factors where these are given and
        small; nothing where it sees all of it.
        """
        start, stop = max(part.start, self.start), min(part.start + len(part.values), self.stop)
        if self.board is not None or start >= stop:
            return []
        pieces = [(start, stop, None)] if factors is None else factors.split(start, stop)
        return [self._stage(name, part, *piece) for piece in pieces]

    def _stage(
        self, name: PushId, part: Outgoing, start: int, stop: int, product: Product | None
    ) -> ray.ObjectRef[Any]:
        if product is not None:
            return self.server.stage_product.remote(name, start - self.start, product)
        values = wire.as_vector(part.values[start - part.start : stop - part.start])
        return self.server.stage.remote(name, start - self.start, values)

    def push(self, name: PushId, described: Push | None, *, slot: int) -> ray.ObjectRef[Any]:
        """All of a push is sent; what comes of it."""
        shared_slot = None if self.board is None else slot
        reference: ray.ObjectRef[Any] = self.server.push.remote(name, described, shared_slot)
        return reference

    def pull(self, version: int) -> ray.ObjectRef[Any]:
        """The weights, at `version` or later."""
        reference: ray.ObjectRef[Any] = self.server.pull.remote(version, self.board is None)
        return reference

    def take(self, reply: Reply, out: Tensor) -> int:
        """Copy what the server gives into its range of `out`: (P,) float32, on the host. The
        version that it is of, or a later one. Raises `PeerLost`.
        """
        own = out[self.start : self.stop]
        if self.board is not None:
            return self.board.read(own, min_version=reply.version, timeout_s=READ_LIMIT_S)
        assert reply.weights is not None
        weights = wire.as_tensor(reply.weights)
        if weights.dtype == torch.bfloat16:
            bfloat16.widen(weights, own)
        else:
            own.copy_(weights)
        return reply.version
