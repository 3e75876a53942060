"""Fork server: a process that has imported what a run's actors need, and copies itself for each.

    python -m xdist.fork_server NODE_ID JOB_ID MODULE...

A worker process of Ray's needs three to four seconds of a core to import torch and Ray; a copy of
one that has done so is there in a few hundredths, and shares its memory. The server imports, and
does nothing else: it computes nothing, touches no GPU, and connects to nobody, so that a copy is
like a process that was started anew. (OpenBLAS and jemalloc have threads then; both are made for
forks.) It ends with whoever started it, as its input does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from xdist.fork_client import SIZE, is_ours, socket_name

MODULES = ("xdist.topologies.all_reduce", "xdist.topologies.push_pull", "xdist.scoring")
"""They import all that actors do."""
NUM_FILES = 3
BACKLOG = 128
PATIENCE_S = 5.0
"""For a client to say what it wants."""


@dataclass(frozen=True)
class Wanted:
    """A process, as `fork_client` would have become it."""

    command: list[str]
    """A Python file, and its arguments."""
    variables: dict[str, str]
    directory: str
    files: list[int]
    """Descriptors of its input, output and errors."""

    def become(self) -> None:
        """Be that process."""
        os.setpgid(0, 0)  # Ray ends the group of a worker with it.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, file in enumerate(self.files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(self.directory)
        os.environ.clear()
        os.environ.update(self.variables)
        sys.argv = self.command
        sys.path[0] = os.path.dirname(self.command[0])
        runpy.run_path(self.command[0], run_name="__main__")


def serve(name: str, modules: Iterable[str]) -> Wanted | None:
    """Import modules, and copy this process for whoever asks. Returns in each copy, and, with None,
    at the end of the input. name: of its socket.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen(BACKLOG)
        for module in modules:  # Who asks meanwhile waits.
            importlib.import_module(module)
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for the copies.
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                wanted = _copy_for(connection)
            if wanted is not None:
                return wanted
    return None


def _copy_for(connection: socket.socket) -> Wanted | None:
    """Returns, in the copy, what it is to be."""
    connection.settimeout(PATIENCE_S)
    try:
        wanted = _read(connection)
    except (OSError, ValueError):
        return None  # It is gone, or none of ours; it starts by itself if it can.
    try:
        if os.fork() == 0:
            return wanted
        with suppress(OSError):
            connection.sendall(b"1")
    except OSError as error:  # Without an answer the client starts by itself.
        sys.stderr.write(f"fork server: {error}\n")
    for file in wanted.files:
        os.close(file)
    return None


def _read(connection: socket.socket) -> Wanted:
    """What a client of this user's asks for. Raises `OSError`, `ValueError`."""
    if not is_ours(connection):
        raise ValueError("another user's process")
    head, files, _flags, _address = socket.recv_fds(connection, SIZE.size, NUM_FILES)
    try:
        [size] = SIZE.unpack(head)
        text = b""
        while len(text) < size and (part := connection.recv(size - len(text))):
            text += part
        return Wanted(**json.loads(text), files=files)
    except (OSError, ValueError, TypeError, struct.error) as error:
        for file in files:
            os.close(file)
        raise ValueError(f"not understood: {error}") from error


class Owner:
    """An actor that a fork server ends with. It imports nothing."""

    def __init__(self, node_id: str, job_id: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "xdist.fork_server", node_id, job_id, *MODULES],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )


if __name__ == "__main__":
    if (process := serve(socket_name(*sys.argv[1:3]), sys.argv[3:])) is not None:
        process.become()
