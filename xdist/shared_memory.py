"""Segment: memory of one process that others on its node may map; VectorLayout: vectors in it.

A segment is an anonymous file (`memfd_create`) that the others open as `/proc/PID/fd/FD`. That is
what a descriptor sent over a Unix socket would give, without the socket and the thread that
listens at it. It has no name that could outlive its processes: the memory is freed when the last of
them ends, also by SIGKILL.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from xdist.errors import NotShared
from xdist.liveness import Process
from xdist.wire import as_tensor

PAGE = 4096
"""What lies in a segment begins at multiples of it."""
KEY_BYTES = 16
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The file keeps its size: to read where it was cut off would be a SIGBUS."""


@dataclass(frozen=True)
class SegmentAddress:
    """Where other processes of the node find a segment."""

    process_id: int
    descriptor: int
    key: bytes
    """Random, and kept in the segment: the same two numbers mean something else on another node,
    and on this one when its process is gone.
    """


class Segment:
    """Bytes that their creator reads and writes, and all others read. They are zeros at first.

    There is nothing to close: a process lets go of the memory with its last view of it, and a view
    is valid for as long as it lives, also when the creator is gone. Others can open the segment
    while its creator keeps it. There it is read-only, which torch does not know: an operation in
    place ends that process with SIGSEGV.
    """

    def __init__(
        self, address: SegmentAddress, *, owner: Process, descriptor: int, memory: Tensor
    ) -> None:
        self.address = address
        self.owner = owner
        """The process that created it."""
        self._memory = memory
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, name: str, num_bytes: int) -> Self:
        """A segment of this process; /proc shows the name. Raises `NotShared` where the system
        gives no such memory, or not as much.
        """
        owner = Process.find(os.getpid())
        if owner is None:
            raise NotShared(f"{name}: others find shared memory in /proc, which is not there")
        key = secrets.token_bytes(KEY_BYTES)
        try:
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with _closed_after_error(descriptor):
                # The pages too, while other threads run: mmap would make them under Python's lock.
                os.posix_fallocate(descriptor, 0, PAGE + num_bytes)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
                os.pwrite(descriptor, key, 0)
                memory = _mapped(descriptor, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise NotShared(f"{name}: no {num_bytes} bytes of shared memory: {error}") from error
        address = SegmentAddress(owner.process_id, descriptor, key)
        return cls(address, owner=owner, descriptor=descriptor, memory=memory)

    @classmethod
    def open(cls, address: SegmentAddress, num_bytes: int) -> Self:
        """The segment of another process. Raises `NotShared` where it cannot be had: that process
        is gone, or on another node, or hidden from this one (another user or container).
        """
        path = f"/proc/{address.process_id}/fd/{address.descriptor}"
        # Looked up before the key is read: who has the key then had this process id already.
        owner = Process.find(address.process_id)
        try:
            if owner is None or not os.readlink(path).startswith("/memfd:"):
                raise NotShared(f"{path} is no shared memory: its process is gone or elsewhere")
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with _closed_after_error(descriptor):
                if os.pread(descriptor, KEY_BYTES, 0) != address.key:
                    raise NotShared(f"{path} has another key: its process is gone or elsewhere")
                bytes_there = os.fstat(descriptor).st_size - PAGE
                if bytes_there < num_bytes:
                    raise NotShared(f"{path} has {bytes_there} bytes, not {num_bytes}")
                memory = _mapped(descriptor, num_bytes, mmap.PROT_READ)
        except OSError as error:
            raise NotShared(f"{path} cannot be mapped here: {error}") from error
        return cls(address, owner=owner, descriptor=descriptor, memory=memory)

    def view(self, dtype: torch.dtype, *, offset: int, size: int) -> Tensor:
        """(size,) elements that begin `offset` bytes into the segment, in place."""
        return self._memory[offset : offset + size * dtype.itemsize].view(dtype)


@dataclass(frozen=True)
class VectorLayout:
    """Equal vectors that lie one after the other, each from a page of its own."""

    num_vectors: int
    size: int
    """Elements of one vector."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.num_vectors * self.stride_bytes

    @property
    def stride_bytes(self) -> int:
        """From the start of a vector to that of the next."""
        return -(-self.size * self.dtype.itemsize // PAGE) * PAGE

    def views(self, segment: Segment, *, offset: int) -> tuple[Tensor, ...]:
        """The vectors, in place; the first one begins `offset` bytes into the segment."""
        return tuple(
            segment.view(self.dtype, offset=offset + i * self.stride_bytes, size=self.size)
            for i in range(self.num_vectors)
        )


def _mapped(descriptor: int, num_bytes: int, protection: int) -> Tensor:
    """What follows the page of the key: (num_bytes,) uint8. Its pages are there already, so that
    the first update is as fast as the others.
    """
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    memory = mmap.mmap(descriptor, PAGE + num_bytes, flags=flags, prot=protection)
    # Never closed, as that would unmap it under its views: it ends with the last of these.
    return as_tensor(np.frombuffer(memory, np.uint8))[PAGE:]


@contextmanager
def _closed_after_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise
