"""Group: the ranks of one generation, connected; NCCL between GPUs, gloo between CPUs.

It is a process group of its own, not torch's global one, so that leaving it is dropping it. Where a
peer is gone, all that waits for it ends with `PeerLost`: with gloo because its connection ends, and
then those of whoever noticed and left. A peer that hangs keeps its connections: end it first.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xdist.errors import PeerLost

NUM_GLOO_THREADS = 2
POLL_S = 0.0002
NCCL_WATCHDOG = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING")
CONNECT_TIMEOUT_S = 30.0
GO, CANCELLED = "go", "cancelled"
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
    everything that follows. Raises `PeerLost` when one is not there in time, or the rendezvous is
    cancelled.
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
        self._group: Any = None
        with self._peers("the group did not come together"):
            meeting = dist.PrefixStore(rendezvous.prefix, store)
            _wait_for_all(meeting, world_size, min(timeout_s, CONNECT_TIMEOUT_S))
            timeout = timedelta(seconds=min(timeout_s, CONNECT_TIMEOUT_S))
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
            self._group._set_default_timeout(timedelta(seconds=timeout_s))

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
            if self._is_nccl:
                self._wait_for_gpu(work)
            work.wait()

    def _wait_for_gpu(self, work: Any) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if self._aborted.wait(POLL_S):
                raise RuntimeError("a peer is lost")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer within {self.timeout_s:g} s")

    def abort(self) -> None:
        """Free who waits for a peer that is lost; from any thread. Gloo needs none: it sees the
        connection end.
        """
        self._aborted.set()

    def send(self, tensor: Tensor, *, to: int) -> None:
        with self._peers(f"sending to rank {to} failed"):
            work = self._group.send([tensor], to, 0)
        self.wait(work)

    def receive(self, tensor: Tensor, *, sender: int) -> None:
        """Fill the tensor."""
        with self._peers(f"receiving from rank {sender} failed"):
            work = self._group.recv([tensor], sender, 0)
        self.wait(work)

    def leave(self) -> None:
        """End the connections, so that what peers wait for fails. With gloo they end when nobody
        refers to the group or its work any more: drop what `all_reduce` returned before.
        """
        if self._is_nccl and self._group is not None:
            self._group.abort()
        self._group = None

    @contextmanager
    def _peers(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # Also DistBackendError, DistNetworkError, DistStoreError.
            raise PeerLost(f"rank {self._rank}: {what}: {error}") from error


def _wait_for_all(meeting: dist.Store, world_size: int, timeout_s: float) -> None:
    """Before ranks connect: one that is lost meanwhile would keep the others for the whole timeout,
    while this wait can be cancelled.
    """
    meeting.set_timeout(timedelta(seconds=timeout_s))
    if meeting.add("num_ranks", 1) == world_size:
        meeting.compare_set(GO, "", GO)  # Not over a cancellation.
    if meeting.get(GO) != GO.encode():
        raise RuntimeError("the rendezvous was cancelled")


def cancel(store: Store, rendezvous: Rendezvous) -> None:
    """Somebody of this generation is lost: whoever waits for all to come is not to."""
    dist.PrefixStore(rendezvous.prefix, store).set(GO, CANCELLED)


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
