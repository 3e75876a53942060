"""ServerLink: one parameter server, as a worker reaches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from xdist import bfloat16, host_copy, wire
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
class _Piece:
    """What a server needs of a part."""

    offset: int
    """Of its first weight in the server's range."""
    values: wire.WireVector | Product


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
        return [self._stage(name, piece) for piece in self._pieces(part, factors)]

    def push(
        self,
        *,
        name: PushId,
        described: Push | None,
        slot: int,
        last: Outgoing,
        factors: Factors | None,
    ) -> list[ray.ObjectRef[Any]]:
        """Send what the server needs of the last part of a push, and ask what comes of all of it:
        in one call if it can be. That answer is the first.
        """
        if self.board is not None:
            return [self.server.push.remote(name, described, slot)]
        pieces = self._pieces(last, factors)
        if not pieces or isinstance(pieces[-1].values, Product):
            carried: tuple[Any, ...] = ()
        else:
            carried = (pieces[-1].offset, pieces.pop().values)
        answer: ray.ObjectRef[Any] = self.server.push.remote(name, described, None, *carried)
        return [answer, *(self._stage(name, piece) for piece in pieces)]

    def _pieces(self, part: Outgoing, factors: Factors | None) -> list[_Piece]:
        start, stop = max(part.start, self.start), min(part.start + len(part.values), self.stop)
        if self.board is not None or start >= stop:
            return []
        split = [(start, stop, None)] if factors is None else factors.split(start, stop)
        return [
            _Piece(
                start - self.start,
                wire.as_vector(part.values[start - part.start : stop - part.start])
                if product is None
                else product,
            )
            for start, stop, product in split
        ]

    def _stage(self, name: PushId, piece: _Piece) -> ray.ObjectRef[Any]:
        is_product = isinstance(piece.values, Product)
        method: Any = self.server.stage_product if is_product else self.server.stage
        reference: ray.ObjectRef[Any] = method.remote(name, piece.offset, piece.values)
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
            host_copy.copy(weights, own)
        return reply.version
