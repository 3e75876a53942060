"""What other processes do in the tests of shared memory."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

import torch

from xdist.errors import NotShared
from xdist.gradient_slots import GradientSlots
from xdist.shared_memory import Segment, SegmentAddress


def hold_slots(connection: Connection, name: str, dtype: torch.dtype) -> None:
    """A worker with two slots, which it fills with what it is sent."""
    slots = GradientSlots.create(name, num_slots=2, size=10_001, dtype=dtype)
    connection.send(slots.address)
    while True:
        slot, number = connection.recv()
        slots.slots[slot].copy_(torch.arange(number, number + 10_001))
        connection.send(None)


def hold_both(connection: Connection, name: str) -> None:
    """A process with memory of its own and of another one."""
    own = Segment.create(name, 1 << 20)
    connection.send(own.address)
    other = Segment.open(connection.recv(), 1 << 20)
    connection.send(None)
    connection.recv()
    assert own is not other


def open_address(connection: Connection, address: SegmentAddress, user: int) -> None:
    os.setuid(user)
    connection.send(error_of(address))


def write_to(connection: Connection, address: SegmentAddress) -> None:
    memory = Segment.open(address, 64).view(torch.uint8, offset=0, size=64)
    connection.send(int(memory.sum()))
    memory.fill_(1)


def error_of(address: SegmentAddress, num_bytes: int = 64) -> str:
    """Why a segment cannot be opened; nothing if it can."""
    try:
        Segment.open(address, num_bytes)
    except NotShared as error:
        return str(error)
    return ""
