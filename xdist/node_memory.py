"""NodeMemory: how gradients and weights pass between a parameter server and its workers.

It reads the gradients of workers of its node where these lie, and publishes each version of the
weights where it makes it. Workers elsewhere get copies. The torch fallback of updates would write
into gradients, so memory is shared where updates are compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from xdist import host_copy, native_update, weights_board, wire
from xdist.errors import LeaseLost, NotShared
from xdist.gradient_slots import GradientSlots, SlotsAddress
from xdist.sequencer import PushId
from xdist.servers_config import ServersConfig
from xdist.state import RangeState
from xdist.update import Step
from xdist.weights_board import BoardAddress, WeightsBoard

SPARE_BUFFERS = 3


class NodeMemory:
    """For a server of the weights [start, stop)."""

    def __init__(self, config: ServersConfig, *, start: int, stop: int) -> None:
        self._dtype = wire.dtype_of(config)
        self._start, self._stop = start, stop
        self._slots: dict[int, tuple[int, tuple[Tensor, ...]]] = {}
        """By worker: its token, and its slots."""
        self._board: WeightsBoard | None = None
        self._spare: list[Tensor] = []

    def open_slots(self, worker: int, token: int, address: SlotsAddress) -> bool:
        """Read the gradients of this incarnation of a worker there; False where that cannot be.
        Raises `LeaseLost`.
        """
        if not (native_update.is_available() and weights_board.is_available()):
            return False
        if self._slots.get(worker, (-1, ()))[0] > token:
            raise LeaseLost(f"worker {worker} holds token {token}; it was replaced")
        try:
            slots = GradientSlots.open(address).slots
        except NotShared:
            return False
        self._slots[worker] = token, tuple(slot[self._start : self._stop] for slot in slots)
        return True

    def piece(self, name: PushId, slot: int) -> Tensor:
        """(stop - start,): the piece of a push that lies in a slot. Raises `LeaseLost`."""
        token, slots = self._slots.get(name.worker, (-1, ()))
        if token != name.token:
            raise LeaseLost(f"worker {name.worker} has no slots under token {name.token}")
        return slots[slot]

    def forget(self, worker: int, token: int) -> None:
        """What this worker had under tokens below this one is not asked for any more."""
        if worker in self._slots and self._slots[worker][0] < token:
            del self._slots[worker]

    def forget_all(self, token: int) -> None:
        """The same for all workers."""
        for worker in list(self._slots):
            self.forget(worker, token)

    def open_board(self, state: RangeState, version: int) -> BoardAddress | None:
        """Publish this version, and each one that is made from now on. Returns where; None if there
        is no such memory. To be called at rest.
        """
        if self._board is None:
            name, size = f"weights {self._start} to {self._stop}", self._stop - self._start
            try:
                self._board = WeightsBoard(name, size=size, dtype=self._dtype)
            except NotShared:
                return None
            first = self._board.next_buffer().copy_(state.weights)
            self._board.publish(version)
            if self._dtype == torch.float32 and state.fused_update is None:
                state.weights = first
        return self._board.address

    def update(
        self, state: RangeState, steps: Sequence[Step], version: int, *, is_wanted: bool
    ) -> wire.WireVector | None:
        """Apply steps to `state`, and publish what they make, which is `version`. Returns `copy` if
        it is wanted.
        """
        is_rounded, board = self._dtype == torch.bfloat16, self._board
        is_for_reply = is_rounded and is_wanted and board is None
        out = self._buffer() if is_for_reply else board.next_buffer() if board else None
        state.apply(
            *steps,
            weights_out=None if is_rounded else out,
            bfloat16_out=out if is_rounded else None,
        )
        if board is not None:
            board.publish(version)
        if is_for_reply and out is not None:
            return self._lent(out)
        return self.copy(state) if is_wanted else None

    def copy(self, state: RangeState) -> wire.WireVector:
        """The weights, as they are sent to workers elsewhere. To be called at rest."""
        out = self._buffer()
        return self._lent(host_copy.copy(state.weights, out))

    def _buffer(self) -> Tensor:
        size = self._stop - self._start
        return self._spare.pop() if self._spare else torch.empty(size, dtype=self._dtype)

    def _lent(self, buffer: Tensor) -> wire.WireVector:
        """It is used again when nobody has this array any more: new pages cost more than a copy."""
        vector = wire.as_vector(buffer)
        weakref.finalize(vector, self._take_back, buffer)
        return vector

    def _take_back(self, buffer: Tensor) -> None:
        if len(self._spare) < SPARE_BUFFERS:
            self._spare.append(buffer)
