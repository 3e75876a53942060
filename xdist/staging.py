"""Staging: the pieces of pushes that wait on a server for their commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist import wire
from xdist.errors import LeaseLost
from xdist.sequencer import Commit, PushId
from xdist.update import Parts, Step


@dataclass(frozen=True)
class StagedPiece:
    """The gradients of a push for one range."""

    parts: dict[int, Tensor]
    """By where they begin in the range."""

    @property
    def size(self) -> int:
        """Elements that have come."""
        return sum(map(len, self.parts.values()))


class Staging:
    """Pieces of pushes, (size,) each, float32 or bfloat16, which lie where they came: in a worker's
    slots, or as Ray brought them, in memory that does not go with a worker. They are only read.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._pieces: dict[PushId, StagedPiece] = {}
        self._tokens: dict[int, int] = {}
        self._least_token = 0

    def copies(self) -> dict[PushId, StagedPiece]:
        """What is staged, if only in part."""
        return {
            name: StagedPiece({start: part.clone() for start, part in piece.parts.items()})
            for name, piece in self._pieces.items()
        }

    def take(self, copies: dict[PushId, StagedPiece]) -> None:
        """What another server has staged."""
        self._pieces |= copies

    def is_complete(self, name: PushId) -> bool:
        """Whether all of a piece is there."""
        return name in self._pieces and self._pieces[name].size == self._size

    def accepts(self, name: PushId) -> bool:
        """Whether its worker has not been replaced."""
        return name.token >= self._tokens.get(name.worker, self._least_token)

    def check(self, name: PushId) -> None:
        """Raise `LeaseLost` for a push of a worker that was replaced."""
        if not self.accepts(name):
            raise LeaseLost(
                f"worker {name.worker} holds token {name.token}; it was replaced, or the servers"
                " have changed"
            )

    def add(self, name: PushId, offset: int, values: wire.WireVector) -> None:
        """Part of a piece, or all of it, which nobody changes before it is freed. Raises
        `LeaseLost`.
        """
        self.check(name)
        piece = self._pieces.setdefault(name, StagedPiece({}))
        assert offset not in piece.parts, f"{name} was sent twice"
        piece.parts[offset] = wire.as_tensor(values)

    def step(self, commit: Commit) -> Step:
        """What a commit does to the range."""
        return Step(
            self._mean(commit),
            commit.learning_rate,
            scale=commit.scale,
            average_share=1 - commit.average_decay,
        )

    def _mean(self, commit: Commit) -> Parts | Tensor:
        """The mean of the pieces of a commit, by their shares: that of one push is itself."""
        assert all(map(self.is_complete, commit.pushes)), "staged before it is committed"
        pieces = [self._pieces[name].parts for name in commit.pushes]
        if len(pieces) == 1:
            return Parts(pieces[0])
        mean = torch.zeros(self._size)
        for parts, share in zip(pieces, commit.shares, strict=True):
            for start, part in parts.items():
                mean[start : start + len(part)] += part.float() * share
        return mean

    def free(self, name: PushId) -> None:
        """A push was applied, or dropped."""
        self._pieces.pop(name, None)

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
