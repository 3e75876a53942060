"""A Ray head of one's own on this machine: loopback only, own directory, free ports, token
required, no GPUs.

It touches no other Ray on the machine, and none of it outlives its owner, even one that was killed.
This file, run as a program, is the guard that sees to that: it runs the head as its child until its
standard input ends, then ends all that came of it, and deletes the directory.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

PREFIX = "xdist-ray-"
LONGEST_DIRECTORY = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""Linux allows 107 bytes for the path of a Unix socket, and Ray puts its own so deep."""
PORTS = range(20_000, 32_768)
"""Above the ports of Ray's workers (10002 to 19999), below those that Linux hands out by itself."""
START_LIMIT_S = 60.0
END_LIMIT_S = 10.0
LOG_TAIL_BYTES = 2000
PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h: orphans among a process's descendants become its children."""


class HeadFailed(Exception):
    """The head did not start; the text says why, with the end of its log where it has one."""


class LocalHead:
    """A context manager: the head runs inside the block. `environment` is what its clients need.

    Its only resources are `num_cpus` CPUs: neither it nor its jobs see a GPU. No Ray setting of
    this process's environment reaches it; those in `variables` do. Raises `HeadFailed`.
    """

    def __init__(self, *, num_cpus: int, variables: Mapping[str, str] | None = None) -> None:
        self._num_cpus = num_cpus
        self._variables = variables or {}

    def __enter__(self) -> Self:
        self._port, self._dashboard_port, self._client_port = ports = free_ports(3)
        try:
            self._start()
        except HeadFailed:
            if all(map(_is_free, ports)):
                raise
            # Somebody else took a port between its choice and its use.
            self._port, self._dashboard_port, self._client_port = free_ports(3)
            self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.close()

    @property
    def address(self) -> str:
        """For `ray.init`."""
        return f"127.0.0.1:{self._port}"

    @property
    def jobs_address(self) -> str:
        """For `ray job submit --address`."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    def _start(self) -> None:
        environment = self._environment()
        self.environment = {**environment, "RAY_ADDRESS": self.address}
        with ExitStack() as resources:
            try:
                self.directory = Path(resources.enter_context(_short_directory()))
                self._log = resources.enter_context(tempfile.TemporaryFile())
                guarded = _guarded(self.directory, self._command(), environment, self._log)
                self._guard = resources.enter_context(guarded)
            except OSError as error:
                raise HeadFailed(
                    f"the Ray head cannot be started: {error}; "
                    "set TMPDIR to a directory that can be written and has room"
                ) from error
            self._wait_until_ready()
            self._resources = resources.pop_all()

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        unproxied = _unproxied(inherited)
        return {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "no_proxy": unproxied,
            "NO_PROXY": unproxied,
            "CUDA_VISIBLE_DEVICES": "",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Binds loopback alone.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # Its actors end with it.
            "RAY_USAGE_STATS_ENABLED": "0",
            **self._variables,
        }

    def _command(self) -> list[str]:
        return [
            ray_script(),
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            "--node-ip-address=127.0.0.1",
            f"--port={self._port}",
            f"--ray-client-server-port={self._client_port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard_port}",
            "--dashboard-agent-listen-port=0",
            f"--num-cpus={self._num_cpus}",
            "--num-gpus=0",
            f"--temp-dir={self.directory}",
        ]

    def _wait_until_ready(self) -> None:
        retrying = Retrying(
            retry=retry_if_result(lambda is_ready: not is_ready),
            wait=wait_fixed(0.2),
            stop=stop_after_delay(START_LIMIT_S),
        )
        try:
            retrying(self._is_ready)
        except RetryError as error:
            raise self._failure(f"did not answer within {START_LIMIT_S:g} s") from error

    def _is_ready(self) -> bool:
        """Whether it is this head that answers: no other takes its token."""
        if self._guard.poll() is not None:
            raise self._failure(f"ended with code {self._guard.returncode}")
        connection = HTTPConnection("127.0.0.1", self._dashboard_port, timeout=5)
        token = self.environment["RAY_AUTH_TOKEN"]
        try:
            connection.request("GET", "/api/version", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _failure(self, what: str) -> HeadFailed:
        size = os.fstat(self._log.fileno()).st_size
        # The head writes at the offset that it shares with this process, which so must not seek.
        tail = os.pread(self._log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
        text = tail.decode(errors="replace").strip() or "(its log is empty)"
        parent = self.directory.parent
        room_mib = shutil.disk_usage(parent).free >> 20
        return HeadFailed(
            f"the Ray head {what} (it was in {parent}, which has room for {room_mib} MiB); "
            f"the end of its log:\n{text}"
        )


def ray_script() -> str:
    """The `ray` command of this environment. Raises `HeadFailed` without one."""
    script = Path(sys.executable).with_name("ray")
    if not script.exists():
        raise HeadFailed(f"{script} is not there; delete .venv, `make` installs it anew")
    return str(script)


def free_ports(count: int) -> list[int]:
    """Some of `PORTS` that nobody listens at, by chance, so that two seldom choose the same."""
    candidates = secrets.SystemRandom().sample(PORTS, len(PORTS))
    return list(islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Past connections don't count.
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _unproxied(environment: Mapping[str, str]) -> str:
    """The value of no_proxy: the user's hosts and this machine. A lone * means all hosts."""
    hosts = environment.get("no_proxy") or environment.get("NO_PROXY", "")
    return hosts if hosts == "*" else ",".join(filter(None, (hosts, "127.0.0.1", "localhost")))


def _short_directory() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory whose path leaves room for Ray's sockets: in /tmp if TMPDIR is long."""
    usual = tempfile.gettempdir()
    is_short = len(os.fsencode(f"{usual}/{PREFIX}12345678")) <= LONGEST_DIRECTORY
    return tempfile.TemporaryDirectory(
        prefix=PREFIX, dir=usual if is_short else "/tmp", ignore_cleanup_errors=True
    )


@contextmanager
def _guarded(
    directory: Path, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, run by a guard, which ends it with the block or with this process.

    A Ctrl-C that interrupts the end of the block interrupts the waiting alone.
    """
    guard = subprocess.Popen(
        [sys.executable, __file__, str(directory), *command],
        env=environment,
        stdin=subprocess.PIPE,  # Closed by the kernel, whatever becomes of this process.
        stdout=log,
        start_new_session=True,  # Ctrl-C in the terminal reaches its owner alone.
    )
    try:
        yield guard
    finally:
        guard.communicate(b".")  # A forked child of this process may hold the pipe open.


def guard(directory: str, command: Sequence[str]) -> int:
    """Run the command until it ends, or is not wanted any more; leave nothing of it.

    Returns its exit code.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    head = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    has_ended = threading.Event()
    threading.Thread(target=_end_when_unwanted, args=(head.pid, has_ended), daemon=True).start()
    ended = status = 0
    while ended != head.pid:
        ended, status = os.waitpid(-1, 0)
    has_ended.set()
    _kill_descendants()
    shutil.rmtree(directory, ignore_errors=True)
    return os.waitstatus_to_exitcode(status)


def _end_when_unwanted(process_id: int, has_ended: threading.Event) -> None:
    os.read(sys.stdin.fileno(), 1)
    if not has_ended.is_set():
        os.kill(process_id, signal.SIGTERM)
    if not has_ended.wait(END_LIMIT_S):
        os.kill(process_id, signal.SIGKILL)


def _kill_descendants() -> None:
    """Kill all that this process started, and say what is left after `END_LIMIT_S`."""
    retrying = Retrying(
        retry=retry_if_result(bool), wait=wait_fixed(0.05), stop=stop_after_delay(END_LIMIT_S)
    )
    try:
        retrying(_kill_children)
    except RetryError as error:
        left = error.last_attempt.result()
        print(f"warning: processes of the Ray head that do not end: {left}", file=sys.stderr)


def _kill_children() -> list[int]:
    """Kill the children of this process, whose children become its own; returns who they were."""
    found = children(os.getpid())
    for child in found:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, os.WNOHANG)
    return found


def children(process_id: int) -> list[int]:
    """The processes whose parent is this one, those that ended and wait to be reaped too."""
    everybody = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return [one for one in everybody if _parent(one) == process_id]


def _parent(process_id: int) -> int | None:
    """The parent of a process, None if there is no such process any more."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # Its name, in parentheses, may hold anything.


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1], sys.argv[2:]))
