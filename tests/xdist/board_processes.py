"""What other processes do in the tests of boards."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from xdist.errors import PeerLost
from xdist.weights_board import BoardAddress, BoardReader, WeightsBoard


def value_of(version: int) -> float:
    """What every element of a version is; neighbours differ, and bfloat16 holds it."""
    return float(version * 97 % 251)


def write(connection: Connection, board_options: dict[str, Any]) -> None:
    """A server that does what it is told: ("publish", version), or ("begin", version), which stays
    half written.
    """
    board = WeightsBoard("test", **board_options)
    connection.send(board.address)
    while True:
        what, version = connection.recv()
        buffer = board.next_buffer()
        if what == "begin":
            buffer[: len(buffer) // 2] = value_of(version)
        else:
            buffer.fill_(value_of(version))
            board.publish(version)
        connection.send(None)


def write_without_pause(connection: Connection, board_options: dict[str, Any]) -> None:
    """A server that publishes one version after the other until it is sent something; it answers
    with their number.
    """
    board = WeightsBoard("test", **board_options)
    connection.send(board.address)
    version = 0
    while not connection.poll():
        board.next_buffer().fill_(value_of(version))
        board.publish(version)
        version += 1
    connection.send(version)
    connection.poll(None)


@dataclass(frozen=True)
class Readings:
    """What a reader got."""

    num_whole: int
    num_torn: int
    num_given_up: int
    last_version: int


def read_without_pause(connection: Connection, address: BoardAddress, seconds: float) -> None:
    """A worker that reads one version after the other, and answers with its `Readings`."""
    connection.send(readings(address, seconds))


def readings(address: BoardAddress, seconds: float) -> Readings:
    reader = BoardReader(address)
    out = torch.empty(address.layout.size)
    num_whole = num_torn = num_given_up = 0
    version = -1
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            version = reader.read(out, min_version=version + 1, timeout_s=seconds / 10)
        except PeerLost:
            num_given_up += 1
            continue
        smallest, largest = out.aminmax()
        if smallest == largest == value_of(version):
            num_whole += 1
        else:
            num_torn += 1
    return Readings(num_whole, num_torn, num_given_up, version)
