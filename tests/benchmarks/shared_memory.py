"""Weights that workers copy out of a server's shared memory, against memcpy of as many.

python -m tests.benchmarks.shared_memory

One process publishes; one worker and then two at once copy, by turns: memcpy within memory of their
own, from a board of float32, from a board of bfloat16. Wall-clock time; the fastest round counts,
and of two workers the slower. Its last line is one JSON object: milliseconds of each copy, of
creating and opening each board, and microseconds of publishing a version.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import tyro
from rich.console import Console
from rich.table import Table

from xdist.weights_board import BoardAddress, BoardReader, WeightsBoard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    size: int = 22_900_000
    """Weights; so many has the paper's network: 91 MB."""
    rounds: int = 20
    """Times that each copy is made."""


def timed(action: Callable[..., object], *arguments: object) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    action(*arguments)
    return (time.perf_counter() - start) * 1e3


def work(connection: Connection, addresses: dict[str, BoardAddress], rounds: int) -> None:
    """A worker: sends the times of opening, then, when it is told to copy, those of copying."""
    readers: dict[str, BoardReader] = {}

    def open_board(name: str) -> None:
        readers[name] = BoardReader(addresses[name])

    connection.send({name: timed(open_board, name) for name in addresses})
    size = addresses["float32"].layout.size
    own, out = torch.ones(size), torch.ones(size)

    def copy(name: str) -> None:
        if name == "memcpy":
            ctypes.memmove(out.data_ptr(), own.data_ptr(), out.nbytes)
        else:
            readers[name].read(out, min_version=0, timeout_s=60)

    connection.recv()
    fastest = dict.fromkeys(["memcpy", *addresses], float("inf"))
    for _ in range(rounds):
        for name, best in fastest.items():
            fastest[name] = min(best, timed(copy, name))
    connection.send(fastest)


def main(arguments: Arguments) -> None:
    torch.set_num_threads(1)
    boards: dict[str, WeightsBoard] = {}

    def create_board(name: str) -> None:
        boards[name] = WeightsBoard(name, size=arguments.size, dtype=DTYPES[name])

    create_ms = {name: timed(create_board, name) for name in DTYPES}
    for board in boards.values():
        board.next_buffer().fill_(1)
    publish_us = {name: timed(board.publish, 0) * 1e3 for name, board in boards.items()}
    addresses = {name: board.address for name, board in boards.items()}
    result = {"size": arguments.size, "create_ms": create_ms, "publish_us": publish_us}
    for num_workers in (1, 2):
        open_ms, copy_ms = measured(addresses, num_workers=num_workers, rounds=arguments.rounds)
        result |= {f"open_ms_{num_workers}": open_ms, f"copy_ms_{num_workers}": copy_ms}
        show(copy_ms, size=arguments.size, title=f"workers at once: {num_workers}")
    sys.stdout.write(json.dumps(result) + "\n")


def measured(
    addresses: dict[str, BoardAddress], *, num_workers: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of opening and of copying, of the slowest of some workers."""
    context = multiprocessing.get_context("spawn")
    ends = []
    for _ in range(num_workers):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, addresses, rounds), daemon=True).start()
        ends.append(ours)
    opened = [end.recv() for end in ends]
    for end in ends:
        end.send("copy")
    copied = [end.recv() for end in ends]
    return slowest(opened), slowest(copied)


def slowest(times: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(one[name] for one in times) for name in times[0]}


def show(copy_ms: dict[str, float], *, size: int, title: str) -> None:
    table = Table("copied by", "ms", "GB/s written", "ratio to memcpy", title=title)
    for name, time_ms in copy_ms.items():
        values = (time_ms, size * 4 / time_ms / 1e6, time_ms / copy_ms["memcpy"])
        table.add_row(name, *(f"{value:.2f}" for value in values))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
