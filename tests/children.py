"""Processes of a test, each with a pipe to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


@dataclass(frozen=True)
class Child:
    """A process that runs one function, and the test's end of its pipe."""

    process: BaseProcess
    connection: Connection

    def answer(self) -> Any:
        """What it sends next. `EOFError` if it ended, `TimeoutError` after 40 s."""
        if not self.connection.poll(40):
            raise TimeoutError(f"{self.process} sent nothing")
        return self.connection.recv()

    def ask(self, question: object) -> Any:
        self.connection.send(question)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL, and it is gone."""
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        os.kill(self.process_id, signal.SIGSTOP)

    @property
    def process_id(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


@contextmanager
def child(function: Callable[..., None], *arguments: object) -> Iterator[Child]:
    """Runs function(connection, *arguments); it is killed with the block.

    It is forked from a process that has only imported torch, which would take each one seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "xdist.weights_board"])
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield Child(process, ours)
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
