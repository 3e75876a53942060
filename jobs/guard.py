"""Runs a command of which nothing outlives the process that wanted it, even one that was killed.

This file, run as a program, is the guard: it runs the command as its child until its standard input
ends, then ends all that came of it, orphans too, and deletes the directory that it was given, where
its temporary files go.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

END_LIMIT_S = 10.0
PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h: orphans among a process's descendants become its children."""


@contextmanager
def guarded(
    command: Sequence[str], directory: Path, environment: Mapping[str, str], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, run by a guard, which ends it with the block or with this process.

    It ends with the command too, and its exit code is the command's. A Ctrl-C that interrupts the
    end of the block interrupts the waiting alone.
    """
    process = subprocess.Popen(
        [sys.executable, __file__, str(directory), *command],
        env={**environment, "TMPDIR": str(directory)},
        stdin=subprocess.PIPE,  # Closed by the kernel, whatever becomes of this process.
        stdout=log,
        start_new_session=True,  # Ctrl-C in the terminal reaches its owner alone.
    )
    try:
        yield process
    finally:
        process.communicate(b".")  # A forked child of this process may hold the pipe open.


def guard(directory: str, command: Sequence[str]) -> int:
    """Run the command until it ends, or is not wanted any more; returns its exit code."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    has_ended = threading.Event()
    threading.Thread(target=_end_when_unwanted, args=(child.pid, has_ended), daemon=True).start()
    ended = status = 0
    while ended != child.pid:
        ended, status = os.waitpid(-1, 0)
    has_ended.set()
    _kill_all()
    shutil.rmtree(directory, ignore_errors=True)
    return os.waitstatus_to_exitcode(status)


def _end_when_unwanted(process_id: int, has_ended: threading.Event) -> None:
    os.read(sys.stdin.fileno(), 1)
    if not has_ended.is_set():
        os.kill(process_id, signal.SIGTERM)
    if not has_ended.wait(END_LIMIT_S):
        os.kill(process_id, signal.SIGKILL)


def _kill_all() -> None:
    """Kill all that this process started, and say what is left after `END_LIMIT_S`."""
    retrying = Retrying(
        retry=retry_if_result(bool), wait=wait_fixed(0.05), stop=stop_after_delay(END_LIMIT_S)
    )
    try:
        retrying(_kill_descendants)
    except RetryError as error:
        left = error.last_attempt.result()
        print(f"warning: processes that do not end: {left}", file=sys.stderr)


def _kill_descendants() -> list[int]:
    """Kill all that descend from this process, orphans too; returns who they were."""
    found = descendants(os.getpid())
    for one in found:
        with suppress(ProcessLookupError):  # Another's child, which that one has reaped.
            os.kill(one, signal.SIGKILL)
        with suppress(ChildProcessError):  # Not yet a child of this process.
            os.waitpid(one, os.WNOHANG)
    return found


def descendants(process_id: int) -> list[int]:
    """The processes that this one started, and theirs, also those that wait to be reaped."""
    everybody = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    children = defaultdict(list)
    for one in everybody:
        children[_parent(one)].append(one)
    found = [process_id]
    for one in found:
        found += children[one]
    return found[1:]


def _parent(process_id: int) -> int | None:
    """The parent of a process, None if there is no such process any more."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # Its name, in parentheses, may hold anything.


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("no job of its own: `make demo` and the tests keep their Ray heads with it")
    sys.exit(guard(sys.argv[1], sys.argv[2:]))
