"""Actors are copies of their node's fork server, and processes like any other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import ray

from tests.clusters import wait_until
from xdist import fork_servers
from xdist.config import ClusterConfig
from xdist.fork_client import SIZE, ask, socket_name

JOB_ID = "01000000"
CLIENT = files("xdist").joinpath("fork_client.py").read_text()
TELLS = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv[1:], "parent": os.getppid(), "process": os.getpid(),
    "group": os.getpgid(0), "directory": os.getcwd(), "variable": os.environ["SAID"],
    "path": sys.path[0], "has_imported": "wave" in sys.modules,
}))
sys.exit(3)
"""


@contextmanager
def fork_server(node_id: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of a small module."""
    command = [sys.executable, "-m", "xdist.fork_server", node_id, JOB_ID, "wave"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until(lambda: is_listening(node_id) or None)
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def is_listening(node_id: str) -> bool:
    name = socket_name(node_id, "").removeprefix("\0")
    return name in Path("/proc/net/unix").read_text()


def start(script: Path, node_id: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """What Ray does to start a worker process, which is this script."""
    command = [sys.executable, "-S", "-E", "-c", CLIENT, str(script), f"--node-id={node_id}"]
    variables = {"RAY_JOB_ID": JOB_ID, "SAID": "hello", "PYTHONPATH": os.environ["PYTHONPATH"]}
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=30, check=False, **how
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(TELLS)
    return path


@pytest.fixture(autouse=True)
def _python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def test_a_copy_is_what_was_to_be_started(script: Path, tmp_path: Path) -> None:
    node_id = uuid4().hex
    with fork_server(node_id) as server:
        told = json.loads(start(script, node_id, cwd=tmp_path).stdout)
        assert told["parent"] == server.pid
        assert told["group"] == told["process"]
        assert told["has_imported"]
        assert told["arguments"] == [f"--node-id={node_id}"]
        assert (told["directory"], told["variable"]) == (str(tmp_path), "hello")
        assert told["path"] == str(tmp_path)


def test_where_there_is_no_server_the_process_starts_as_usual(script: Path) -> None:
    started = start(script, uuid4().hex)
    told = json.loads(started.stdout)
    assert started.returncode == 3
    assert told["parent"] == os.getpid()
    assert not told["has_imported"]


def test_what_is_no_request_is_passed_over(script: Path) -> None:
    node_id = uuid4().hex
    with fork_server(node_id) as server:
        for nonsense in (b"", b"\0", SIZE.pack(2) + b"[]", SIZE.pack(5) + b"{}"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(socket_name(node_id, JOB_ID))
                connection.sendall(nonsense)
        assert json.loads(start(script, node_id).stdout)["parent"] == server.pid


AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
NOBODY = 65534


@AS_ROOT
def test_nobody_else_gets_a_copy(script: Path) -> None:
    """Not even who does not care whose the server is."""
    node_id = uuid4().hex
    asks = f"""
import os, sys
from xdist import fork_client
os.setuid({NOBODY})
fork_client.is_ours = lambda _: True
try:
    print(fork_client.ask(sys.argv[1:]))
except OSError:
    print(False)
"""
    with fork_server(node_id):
        command = [sys.executable, "-c", asks, str(script), f"--node-id={node_id}"]
        variables = {**os.environ, "RAY_JOB_ID": JOB_ID}
        assert subprocess.check_output(command, env=variables, timeout=30) == b"False\n"


@AS_ROOT
def test_nobody_elses_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    node_id = uuid4().hex
    serves = (
        f"import os, socket, sys; os.setuid({NOBODY}); listener = socket.socket(socket.AF_UNIX); "
        "listener.bind('\\0' + sys.argv[1]); listener.listen(); "
        "connection, _ = listener.accept(); connection.sendall(b'1'); sys.stdin.read()"
    )
    name = socket_name(node_id, JOB_ID).removeprefix("\0")
    monkeypatch.setenv("RAY_JOB_ID", JOB_ID)
    with subprocess.Popen([sys.executable, "-c", serves, name], stdin=subprocess.PIPE) as process:
        wait_until(lambda: is_listening(node_id) or None)
        assert not ask(["script.py", f"--node-id={node_id}"])
        assert process.stdin is not None
        process.stdin.close()


class Tells:
    def where(self) -> tuple[int, int]:
        return os.getpid(), os.getppid()

    def sees_torch(self) -> bool:
        return "torch" in sys.modules


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("cluster")
def test_actors_are_copies_which_end_one_by_one() -> None:
    options = fork_servers.options(ClusterConfig())

    def actor() -> Any:
        return ray.remote(Tells).options(num_cpus=0, **options).remote()

    wait_until(lambda: is_listening(ray.get_runtime_context().get_node_id()) or None)
    first, second = actor(), actor()
    process, server = ray.get(first.where.remote())
    assert ray.get(first.sees_torch.remote())
    assert ray.get(second.where.remote())[1] == server
    os.kill(process, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(first.where.remote())
    assert ray.get(second.where.remote())[1] == ray.get(actor().where.remote())[1] == server


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_run_may_do_without() -> None:
    assert fork_servers.options(ClusterConfig(fork_actors=False)) == {}
