"""Staging: the pieces of pushes that wait on a server for their commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xdist import wire
from xdist.errors import LeaseLost
from xdist.sequencer import Commit, PushId


@dataclass(frozen=True)
class StagedPiece:
    """The gradients of a push for one range."""

    gradients: Tensor
    num_missing: int
    """Of its elements; which ones, its sender knows."""


class Staging:
    """Pieces of pushes, (size,) each, float32 or bfloat16, in memory that does not go with a
    worker. That of the server's own is kept for the next ones: new pages cost more than a copy.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._size = size
        self._dtype = dtype
        self._pieces: dict[PushId, Tensor] = {}
        self._num_missing: dict[PushId, int] = {}
        self._lent: set[PushId] = set()
        """Those whose pieces lie in a worker's slots, and are only read."""
        self._spare: list[Tensor] = []
        self._tokens: dict[int, int] = {}
        self._least_token = 0

    def copies(self) -> dict[PushId, StagedPiece]:
        """What is staged, if only in part."""
        return {
            name: StagedPiece(piece.clone(), self._num_missing[name])
            for name, piece in self._pieces.items()
        }

    def take(self, copies: dict[PushId, StagedPiece]) -> None:
        """What another server has staged."""
        for name, piece in copies.items():
            self._pieces[name], self._num_missing[name] = piece.gradients, piece.num_missing

    def is_complete(self, name: PushId) -> bool:
        """Whether all of a piece is there."""
        return self._num_missing.get(name) == 0

    def accepts(self, name: PushId) -> bool:
        """Whether its worker has not been replaced."""
        return name.token >= self._tokens.get(name.worker, self._least_token)

    def check(self, name: PushId) -> None:
        """Raise `LeaseLost` for a push of a worker that was replaced."""
        if not self.accepts(name):
            raise LeaseLost(f"worker {name.worker} holds token {name.token}; it was replaced")

    def write(self, name: PushId, offset: int, values: wire.WireVector) -> None:
        """Copy part of a piece. Raises `LeaseLost`."""
        self.check(name)
        if name not in self._pieces:
            new = self._spare.pop() if self._spare else torch.empty(self._size, dtype=self._dtype)
            self._pieces[name], self._num_missing[name] = new, self._size
        out = wire.as_vector(self._pieces[name][offset : offset + len(values)])
        np.copyto(out, values, casting="no")
        self._num_missing[name] -= len(values)

    def lend(self, name: PushId, piece: Tensor) -> None:
        """All of a piece is here, where its worker leaves it until its commit. Raises
        `LeaseLost`.
        """
        self.check(name)
        self._pieces[name], self._num_missing[name] = piece, 0
        self._lent.add(name)

    def mean(self, commit: Commit) -> Tensor:
        """The mean of the pieces of a commit, by their shares: that of one push is itself."""
        assert all(map(self.is_complete, commit.pushes)), "staged before it is committed"
        pieces = [self._pieces[name] for name in commit.pushes]
        if len(pieces) == 1:
            return pieces[0]
        mean = torch.zeros(self._size)
        for piece, share in zip(pieces, commit.shares, strict=True):
            mean += piece.float() * share
        return mean

    def free(self, name: PushId) -> None:
        """A push was applied, or dropped."""
        if name not in self._pieces:
            return
        piece = self._pieces.pop(name)
        del self._num_missing[name]
        if name in self._lent:
            self._lent.remove(name)
        else:
            self._spare.append(piece)

    def forget(self, worker: int, token: int, *, spare: frozenset[PushId]) -> None:
        """Refuse what comes of a worker's tokens below this one, and drop what has come, but for
        the pushes that are to be applied yet.
        """
        self._tokens[worker] = max(token, self._least_token)
        self._drop(lambda name: name.worker == worker and name.token < token, spare)

    def forget_all(self, token: int, *, spare: frozenset[PushId]) -> None:
        """The same for all workers."""
        self._tokens, self._least_token = {}, token
        self._drop(lambda name: name.token < token, spare)

    def _drop(self, is_void: Callable[[PushId], bool], spare: frozenset[PushId]) -> None:
        for name in [name for name in self._pieces if is_void(name) and name not in spare]:
            self.free(name)
