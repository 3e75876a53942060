"""A Ray head of one's own on this machine: loopback only, own directory, free ports, token
required.

It touches no other Ray on the machine: it is ended by its process id, and what is left of it by a
variable of its environment that no other has.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

MARK = "XDIST_LOCAL_HEAD"
"""The environment variable that everything the head starts inherits, jobs too."""
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START_LIMIT_S = 60.0
END_LIMIT_S = 10.0


class HeadFailed(Exception):
    """The head did not start; the text says where its logs are."""


class LocalHead:
    """A context manager: the head runs inside the block. `environment` is what its clients need."""

    def __init__(self, *, num_cpus: int, variables: Mapping[str, str] | None = None) -> None:
        self._num_cpus = num_cpus
        self.directory = Path(tempfile.mkdtemp(prefix="xdist-ray-"))
        self._port, self._dashboard_port, self._client_port = _free_ports(3)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Binds loopback alone.
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": self.address,
            MARK: str(self.directory),
            **(variables or {}),
        }

    @property
    def address(self) -> str:
        """For `ray.init`."""
        return f"127.0.0.1:{self._port}"

    @property
    def jobs_address(self) -> str:
        """For `ray job submit --address`."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    def __enter__(self) -> Self:
        command = [
            str(Path(sys.executable).with_name("ray")),
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
            f"--temp-dir={self.directory}",
        ]
        without_address = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        self._log = self.directory / "head.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=without_address,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal reaches its owner alone.
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the head and all that it started, and delete its directory. Ctrl-C waits for it."""
        with _signals_ignored():
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            while left := _processes_with(f"{MARK}={self.directory}"):
                for process_id in left:
                    with suppress(ProcessLookupError):
                        os.kill(process_id, signal.SIGKILL)
            shutil.rmtree(self.directory, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        retrying = Retrying(
            retry=retry_if_exception_type(OSError),
            wait=wait_fixed(0.2),
            stop=stop_after_delay(START_LIMIT_S),
            reraise=True,
        )
        try:
            retrying(self._check_ready)
        except OSError as error:
            raise HeadFailed(
                f"the Ray head did not answer within {START_LIMIT_S:g} s: {error}\n"
                + self._log.read_text(errors="replace")[-2000:]
            ) from error

    def _check_ready(self) -> None:
        if self._process.poll() is not None:
            text = self._log.read_text(errors="replace")[-2000:]
            raise HeadFailed(f"the Ray head ended with code {self._process.returncode}\n{text}")
        try:
            with urllib.request.urlopen(f"{self.jobs_address}/api/version", timeout=5):
                pass
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):  # It is up, and wants its token.
                raise


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, outside the range that Ray gives to its workers."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _processes_with(variable: str) -> list[int]:
    """The processes, other than this one and zombies, whose environment holds `NAME=value`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if variable.encode() in environment and int(directory.name) != os.getpid():
            found.append(int(directory.name))
    return found


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Nothing interrupts the block: a second Ctrl-C would leave half of the head behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
