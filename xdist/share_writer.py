"""ShareWriter: a worker's shares of checkpoints, written beside its training from copies that it
keeps.

Training stands still for the copy, and for a while where two are kept that are not written: at most
so many are, of the share that is being written, and of the one that follows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from xdist import checkpoint
from xdist.beside import Beside
from xdist.checkpoint import Part
from xdist.errors import RunDirectoryError
from xdist.payload import Payload

MOST_KEPT = 2
WAIT_S = 10.0
"""For an earlier share to be written, where two are kept."""
NOT_KEPT = "it was not kept, as others were being written"


@dataclass(frozen=True)
class Piece:
    """What is to become a file of a checkpoint, as `checkpoint.write` takes it."""

    name: str
    start: int
    stop: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Written:
    """What became of a share."""

    parts: tuple[Part, ...] = ()
    unsaved: str | None = None
    """Why it could not be written, if so."""
    is_kept: bool = True
    """Whether it may be tried again: no other one has needed its place."""
    seconds: float = 0.0
    """From when it was copied."""


@dataclass
class _Share:
    url: str
    pieces: tuple[Piece, ...]
    payloads: list[Payload]
    """None of them once they are written."""
    write: Future[Written]
    copied: float = field(default_factory=time.monotonic)
    is_told: bool = False
    """Whether somebody knows what has become of it."""

    @property
    def is_refused(self) -> bool:
        return self.write.done() and self.write.result().unsaved is not None


class ShareWriter:
    """`save` is called by the thread that trains, `written` by any."""

    def __init__(self) -> None:
        self._beside = Beside("share-writer")
        self._shares: dict[int, _Share] = {}
        """By their steps."""
        self._replaced: list[_Share] = []
        """By another one of their step, before they were written."""
        self._free: list[list[Payload]] = []
        self._changed = threading.Condition()

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Find memory for such a share beside what follows, if there is none of its size."""

        def reserve() -> None:
            with self._changed:
                if self._num_kept or any(_fit(payloads, pieces) for payloads in self._free):
                    return
            payloads = [Payload(piece.tensors) for piece in pieces]
            for payload in payloads:
                payload.touch()
            with self._changed:
                self._free.append(payloads)

        self._beside.submit(reserve)

    def save(self, step: int, url: str, pieces: Sequence[Piece]) -> None:
        """Copy a share, of the checkpoint in the directory `url`, and begin to write it; one of the
        same step and names that is being written goes on. It is left out where two earlier ones are
        not written in a while.
        """
        with self._changed:
            known = self._shares.get(step)
            if known and [p.name for p in known.pieces] == [p.name for p in pieces]:
                return
            if not self._changed.wait_for(self._makes_room, WAIT_S):
                return
            if (known := self._shares.get(step)) is not None and known.payloads:
                self._replaced.append(known)
            payloads = self._take_payloads(pieces)
        for payload, piece in zip(payloads, pieces, strict=True):
            payload.fill(piece.tensors)
        with self._changed:
            share = _Share(url, tuple(pieces), payloads, Future())
            self._shares[step] = share
            self._begin(share)

    def _makes_room(self) -> bool:
        """Drop what was refused, and what is written, once somebody knows; whether there is room
        then.
        """
        for step, share in list(self._shares.items()):
            if share.is_refused or (share.is_told and not share.payloads):
                self._free += [share.payloads] if share.payloads else []
                del self._shares[step]
        for share in [share for share in self._replaced if share.is_refused]:
            self._free.append(share.payloads)
            share.payloads = []
        self._replaced = [share for share in self._replaced if share.payloads]
        return self._num_kept < MOST_KEPT

    @property
    def _num_kept(self) -> int:
        shares = [*self._shares.values(), *self._replaced]
        return sum(bool(share.payloads) for share in shares)

    def _take_payloads(self, pieces: Sequence[Piece]) -> list[Payload]:
        """Some that were used before, if there are any that fit."""
        self._free = [payloads for payloads in self._free if _fit(payloads, pieces)]
        return self._free.pop() if self._free else [Payload(piece.tensors) for piece in pieces]

    def _begin(self, share: _Share) -> None:
        share.is_told = False
        share.write = self._beside.submit(partial(self._write, share))
        share.write.add_done_callback(lambda _: self._tell())

    def _tell(self) -> None:
        """Who waits for room may have some."""
        with self._changed:
            self._changed.notify_all()

    def _write(self, share: _Share) -> Written:
        try:
            parts = tuple(
                checkpoint.write(share.url, piece.name, payload, piece.start, piece.stop)
                for piece, payload in zip(share.pieces, share.payloads, strict=True)
            )
        except RunDirectoryError as error:
            return Written(unsaved=str(error))
        with self._changed:
            self._free.append(share.payloads)
            share.payloads = []
        return Written(parts, seconds=time.monotonic() - share.copied)

    def written(self, step: int) -> Written:
        """Wait for the share of this step. One that could not be written is tried again with the
        next call.
        """
        with self._changed:
            share = self._shares.get(step)
            if share is None:
                return Written(unsaved=NOT_KEPT, is_kept=False)
            if share.is_told and share.is_refused:
                self._begin(share)
            write = share.write
        written = write.result()
        share.is_told = True
        return written


def _fit(payloads: Sequence[Payload], pieces: Sequence[Piece]) -> bool:
    return len(payloads) == len(pieces) and all(
        payload.fits(piece.tensors) for payload, piece in zip(payloads, pieces, strict=True)
    )
