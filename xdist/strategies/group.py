"""Group: the ranks of one generation, connected; NCCL between GPUs, gloo between CPUs.

It is a process group of its own, not torch's global one, so that leaving it is dropping it. Where a
peer is gone, all that waits for it ends with `PeerLost`: with gloo because its connection ends, and
then those of whoever noticed and left, or as the driver says so (`abort`), since gloo may miss it.
A peer that hangs keeps its connections: end it first.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xdist.errors import PeerLost
from xdist.strategies.door import JOIN_LIMIT_S, Door

NUM_GLOO_THREADS = 2
POLL_S = 0.0002
NOTICED_WITHIN = timedelta(seconds=0.05)
"""An abort, by who waits for gloo."""
NCCL_WATCHDOG = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING")
CONNECT_TIMEOUT_S = 30.0
PIECE = 1 << 22
"""Values that are sent at a time."""
TURN_LIMIT_S = 600.0
"""For a rank that sends to others first."""
GO, CANCELLED = "go", "cancelled"
HERE, REACHED = "here", "reached"
"""What all ranks of a group wait for before they connect."""
NOTES = "notes"


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one generation of the group meet."""

    host: str
    port: int
    generation: int

    @property
    def prefix(self) -> str:
        """Of this generation's keys in the store."""
        return f"generation-{self.generation}"


Store = dist.TCPStore


def open_store(host: str) -> Store:
    """A rendezvous store in this process, on a free port of `host` alone. It lives in the driver:
    any rank may die.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def reach_store(rendezvous: Rendezvous, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Store:
    """The store that a driver opened. Raises `PeerLost`."""
    timeout = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(rendezvous.host, rendezvous.port, is_master=False, timeout=timeout)
    except RuntimeError as error:
        raise PeerLost(f"the driver's rendezvous is not reached: {error}") from error


class Group:
    """One rank's end of the group. Construction waits until all ranks are there.

    own_address: of this node, as its peers know it. timeout_s: for the others, then and in
    everything that follows; with gloo a piece of a tensor that is sent or received has
    `CONNECT_TIMEOUT_S` at most. Raises `PeerLost` when one is not there in time or not reached, or
    the rendezvous is cancelled.
    """

    def __init__(
        self,
        store: Store,
        rendezvous: Rendezvous,
        *,
        rank: int,
        world_size: int,
        own_address: str,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._rank = rank
        self.timeout_s = timeout_s
        self._aborted = threading.Event()
        self._is_nccl = device.type == "cuda"
        self._waits_for_gpu = self._is_nccl and world_size > 1
        """Nobody but itself ends the sum of one rank: its update may be queued behind that."""
        self._group: Any = None
        self._meeting = meeting = dist.PrefixStore(rendezvous.prefix, store)
        self._door = Door(own_address)
        try:
            with self._peers("the group did not come together"):
                self._meet(meeting, world_size)
                self._connect(meeting, world_size, own_address)
        except PeerLost:
            self._door.close()
            raise

    def _meet(self, meeting: dist.Store, world_size: int) -> None:
        """See whether all ranks are there, and reach each other: who connected to one that is lost
        meanwhile, or not reached, would wait long, and cannot be freed.
        """
        meeting.set_timeout(timedelta(seconds=min(self.timeout_s, CONNECT_TIMEOUT_S)))
        meeting.set(f"door-{self._rank}", self._door.place)
        _wait_for_all(meeting, HERE, world_size)
        others = [rank for rank in range(world_size) if rank != self._rank]
        places = meeting.multi_get([f"door-{rank}" for rank in others])
        self._door.know(dict(zip(others, map(bytes.decode, places), strict=True)))
        if unreached := self._door.unreached(limit_s=JOIN_LIMIT_S):
            meeting.set(REACHED, CANCELLED)
            names = ", ".join(map(str, unreached))
            raise PeerLost(f"rank {self._rank}: no link to ranks {names}", unreached)
        _wait_for_all(meeting, REACHED, world_size)

    def _connect(self, meeting: dist.Store, world_size: int, own_address: str) -> None:
        rank, timeout = self._rank, timedelta(seconds=min(self.timeout_s, CONNECT_TIMEOUT_S))
        if self._is_nccl:
            for name in NCCL_WATCHDOG:  # It would end the process for a peer that is lost.
                os.environ.setdefault(name, "0")
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(meeting, rank, world_size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timeout
            options._threads = NUM_GLOO_THREADS
            options._devices = [gloo.create_device(hostname=own_address)]
            self._group = gloo(meeting, rank, world_size, options)
        self._group._set_default_timeout(timedelta(seconds=self.timeout_s))

    def all_reduce(self, tensor: Tensor) -> Any:
        """Begin to sum a tensor over the ranks, in place; `wait` for what this returns."""
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM
        options.timeout = timedelta(seconds=self.timeout_s)
        with self._peers("an all-reduce did not begin"):
            return self._group.allreduce([tensor], options)

    def wait(self, work: Any) -> None:
        """Until a collective has ended. On a GPU too it is the host that waits: an update must not
        be queued behind a sum that may never come.
        """
        with self._peers("a collective failed"):
            if not self._is_nccl:
                self._wait_for_gloo(work)
            self._see_through(work)

    def _see_through(self, work: Any) -> None:
        if self._waits_for_gpu:
            self._wait_for_gpu(work)
        work.wait()

    def wait_for_own(self) -> None:
        """Until this rank's GPU has done all that its host has asked of it, so that what follows is
        the wait for others. Nothing to wait for on a CPU, nor alone.
        """
        if not self._waits_for_gpu:
            return
        cuda: Any = torch.cuda  # Its events are not typed.
        done = cuda.Event()
        done.record()
        with self._peers("a collective was given up"):
            while not done.query():
                if self._aborted.wait(POLL_S):
                    raise RuntimeError("a peer is lost")

    def _wait_for_gpu(self, work: Any) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if self._aborted.wait(POLL_S):
                raise RuntimeError("a peer is lost")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer within {self.timeout_s:g} s")

    def _wait_for_gloo(self, work: Any) -> None:
        """It sees connections end, but once in some hundred times with three ranks or more it does
        not, and waits until its own timeout. What failed is raised when it is seen through.
        """
        while not work.is_completed():
            with suppress(RuntimeError):
                work.wait(NOTICED_WITHIN)
            if self._aborted.is_set() and not work.is_completed():
                raise RuntimeError("a peer is lost")

    def abort(self) -> None:
        """Free who waits for a peer that is lost; from any thread."""
        self._aborted.set()

    def await_turn(self) -> None:
        """Until another rank is about to send to this one: it may send to others before. This wait
        can be cancelled.
        """
        with self._peers("its turn to receive did not come"):
            self._meeting.set_timeout(timedelta(seconds=TURN_LIMIT_S))
            if self._meeting.get(_turn(self._rank)) != GO.encode():
                raise RuntimeError("the rendezvous was cancelled")

    def give_turn(self, rank: int) -> None:
        """Tell it that this one is about to send to it."""
        with self._peers(f"rank {rank} was not told that it is to receive"):
            self._meeting.compare_set(_turn(rank), "", GO)  # Not over a cancellation.

    def send(self, tensor: Tensor, *, to: int) -> None:
        """A vector, in pieces, so that a slow link has time enough for each."""
        for piece in torch.split(tensor, PIECE):
            with self._peers(f"sending to rank {to} failed"):
                self._see_through(self._group.send([piece], to, 0))

    def receive(self, tensor: Tensor, *, sender: int) -> None:
        """Fill a vector with what was sent."""
        for piece in torch.split(tensor, PIECE):
            with self._peers(f"receiving from rank {sender} failed"):
                self._see_through(self._group.recv([piece], sender, 0))

    def leave(self) -> None:
        """End the connections, so that what peers wait for fails. With gloo they end when nobody
        refers to the group or its work any more: drop what `all_reduce` returned before.
        """
        if self._is_nccl and self._group is not None:
            self._group.abort()
        # In a thread, as gloo ends only when all ends that it waits for.
        last = [self._group]
        self._group = None
        threading.Thread(target=last.clear, daemon=True).start()
        self._door.close()

    @contextmanager
    def _peers(self, what: str) -> Iterator[None]:
        try:
            yield
        except torch.AcceleratorError:  # Of this rank's own GPU.
            raise
        except RuntimeError as error:  # Also DistBackendError, DistNetworkError, DistStoreError.
            message = f"rank {self._rank}: {what}: {error}"
            raise PeerLost(message, self._door.unreached()) from error


def _wait_for_all(meeting: dist.Store, what: str, world_size: int) -> None:
    """Until all ranks have come so far; this wait can be cancelled."""
    if meeting.add(f"num-{what}", 1) == world_size:
        meeting.compare_set(what, "", GO)  # Not over a cancellation.
    if meeting.get(what) != GO.encode():
        raise RuntimeError("the rendezvous was cancelled")


def _turn(rank: int) -> str:
    return f"turn-{rank}"


def cancel(store: Store, rendezvous: Rendezvous, *, world_size: int) -> None:
    """Somebody of this generation is lost: whoever waits for all to come, or for a turn, is not
    to.
    """
    meeting = dist.PrefixStore(rendezvous.prefix, store)
    for what in (HERE, REACHED, *map(_turn, range(world_size))):
        meeting.set(what, CANCELLED)


def forget(store: Store, rendezvous: Rendezvous) -> None:
    """Nobody will join this generation any more: a store would grow with every one."""
    for key in store.list_keys():
        if key.startswith(f"{rendezvous.prefix}/"):
            store.delete_key(key)


class NoteBoard:
    """Notes in the rendezvous store, which the driver reads also when their writer is gone."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, note: str) -> None:
        """Leave a note."""
        try:
            self._store.queue_push(NOTES, note)
        except RuntimeError as error:
            raise PeerLost(f"the driver's rendezvous is not reached: {error}") from error

    def read(self) -> list[str]:
        """The notes that came since the last call."""
        num_notes = self._store.queue_len(NOTES)
        return [self._store.queue_pop(NOTES).decode() for _ in range(num_notes)]
