"""A Ray head of one's own on this machine: loopback only, own directory, free ports, token
required, no GPUs.

It touches no other Ray on the machine, and none of it outlives its owner, even one that was killed:
guard.py sees to that.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPException
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from guard import guarded
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

LOOPBACK = "127.0.0.1"
PREFIX = "xdist-ray-"
LONGEST_DIRECTORY = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""Linux allows 107 bytes for the path of a Unix socket, and Ray puts its own so deep."""
PORTS = range(20_000, 32_768)
"""Above the ports of Ray's workers (10002 to 19999), below those that Linux hands out by itself."""
START_LIMIT_S = 60.0
LOG_TAIL_BYTES = 2000
STARTED = b"Ray runtime started"
"""Of the head's log."""
NO_IDLE_WORKERS = {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
"""Ray starts a process for each CPU before anybody asks: a second of a core each, and ours have an
environment of their own, for which none of those will do.
"""


class HeadFailed(Exception):
    """The head did not start; the text says why, with the end of its log where it has one."""


class LocalHead:
    """A context manager: the head runs inside the block. `environment` is what its clients need.

    Its only resources are `num_cpus` CPUs: neither it nor its jobs see a GPU. No Ray setting of
    this process's environment reaches it; those in `variables` do. `arguments` makes more arguments
    of `ray start`, given the head as far as it is: address and directory. Raises `HeadFailed`.

    Without `has_jobs` it takes no jobs, and starts sooner: `ray.init` is all that finds it.

    Nodes on other addresses can join a head that has a `node_ip` of its own and, among the
    variables, `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1`, which undoes the binding to loopback.
    """

    def __init__(
        self,
        *,
        num_cpus: int,
        variables: Mapping[str, str] | None = None,
        node_ip: str = LOOPBACK,
        has_jobs: bool = True,
        arguments: Callable[[LocalHead], Sequence[str]] = lambda _: (),
    ) -> None:
        self._num_cpus = num_cpus
        self._variables = variables or {}
        self._node_ip = node_ip
        self._has_jobs = has_jobs
        self._arguments = arguments

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
        return f"{self._node_ip}:{self._port}"

    @property
    def jobs_address(self) -> str:
        """For `ray job submit --address`."""
        return f"http://{LOOPBACK}:{self._dashboard_port}"

    def _start(self) -> None:
        environment = self._environment()
        self.environment = {**environment, "RAY_ADDRESS": self.address}
        with ExitStack() as resources:
            try:
                self.directory = Path(resources.enter_context(short_directory()))
                self._log = resources.enter_context(tempfile.TemporaryFile())
                command = self._command()
                guard = guarded(command, self.directory, environment, self._log)
                self._guard = resources.enter_context(guard)
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
            **NO_IDLE_WORKERS,
            **self._variables,
        }

    def _command(self) -> list[str]:
        return [
            ray_script(),
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            f"--node-ip-address={self._node_ip}",
            f"--port={self._port}",
            f"--ray-client-server-port={self._client_port}",
            f"--include-dashboard={self._has_jobs}",
            f"--dashboard-host={LOOPBACK}",
            f"--dashboard-port={self._dashboard_port}",
            "--dashboard-agent-listen-port=0",
            f"--num-cpus={self._num_cpus}",
            "--num-gpus=0",
            f"--temp-dir={self.directory}",
            *self._arguments(self),
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
        if not self._has_jobs:
            return STARTED in os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0)
        connection = HTTPConnection(LOOPBACK, self._dashboard_port, timeout=5)
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
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _unproxied(environment: Mapping[str, str]) -> str:
    """The value of no_proxy: the user's hosts and this machine. A lone * means all hosts."""
    hosts = environment.get("no_proxy") or environment.get("NO_PROXY", "")
    return hosts if hosts == "*" else ",".join(filter(None, (hosts, LOOPBACK, "localhost")))


def short_directory() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory whose path leaves room for Ray's sockets: in /tmp if TMPDIR is long."""
    usual = tempfile.gettempdir()
    is_short = len(os.fsencode(f"{usual}/{PREFIX}12345678")) <= LONGEST_DIRECTORY
    return tempfile.TemporaryDirectory(
        prefix=PREFIX, dir=usual if is_short else "/tmp", ignore_cleanup_errors=True
    )
