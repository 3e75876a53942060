"""Clusters of real Ray nodes: one for the whole test run, and a test's own, with faults.

    with own_cluster(num_cpus=2, variables=QUICK_HEALTH_CHECKS) as cluster, cluster.connected():
        node = cluster.add_node(num_cpus=1)
        node.kill()

All their processes end with the block or with the test's process, even a killed one. For nodes with
a network of their own see `tests.namespaces`, for a cluster that grows by itself
`tests.autoscaling`.

What Ray (2.60) does then, with `QUICK_HEALTH_CHECKS` and, in brackets, with its own:

- The process of an actor is killed: `ActorDiedError` in 10 ms. It is stopped: nothing, ever.
  `ray.kill` of a stopped one fails its calls at once, but ends the process only 5 s later.
- The connection between two actors is reset: `ActorUnavailableError` for the calls that are under
  way, whether they are heard or not; those that follow have another connection.
- A node is killed whole: pending calls raise `ActorUnavailableError` in 1 to 2 s, for their
  connections are closed; the node is dead, and `ActorDiedError` comes, in 3 s (15). It freezes, or
  its link is down: nothing is heard before it is dead in 9 s (65). A raylet that was given up ends
  when it hears of it; another can join from there. A node that is asked to leave is dead in 10 ms.
- Only when the node is dead do its bundles move: at once where there is room, or else when a node
  joins. An actor that was made for such a bundle before dies with the node. One that is made after
  waits for a place, as for a placement group that was never placed; its first call is pending.
- A node drains: no new actor starts there, in a bundle that it holds neither: one made for that
  waits, and dies with the node. Actors that run go on, past the deadline too, at which Ray does
  nothing. The node leaves by itself when it has neither actor nor bundle. When it is lost,
  `ActorDiedError.preempted` is true.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import IO, Any, TypeVar

import pytest
import ray
import ray._private.state
from guard import descendants, guarded
from local_head import LOOPBACK, LocalHead
from ray import _raylet
from ray.actor import ActorHandle
from ray.core.generated import autoscaler_pb2
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from tests.namespaces import Host
from xdist import fork_servers

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parent.parent
USUAL_VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}"}
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
}
"""For `variables`: a node that does not answer is declared dead in seconds, not in a minute."""


def disconnect() -> None:
    """Leave the cluster that this process drives, if any."""
    fork_servers.forget()
    ray.shutdown()


@dataclass(frozen=True)
class AddedNode:
    """A node that joined a cluster. A copy in any process of this machine, actors too, will do."""

    node_id: str
    process_id: int
    """The first of its processes. SIGTERM ends the node in order, SIGKILL ends all of it."""
    cluster_address: str

    def kill(self) -> None:
        """End all its processes at once, as a loss of power does.

        Unlike then, the kernel closes their connections; `freeze` first, or take down the link of
        its `Host`, and nobody hears of it.
        """
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop all its processes, as a hanging machine does: connections stay, nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Ask it to leave the cluster in order."""
        os.kill(self.process_id, signal.SIGTERM)

    def drain(self, *, deadline_s: float) -> None:
        """Tell the cluster that the node will be gone then, as the notice of a spot machine does.

        Ray stops placing new work there; it does not end the node.
        """
        raylet: Any = _raylet
        reasons: Any = autoscaler_pb2
        is_accepted, why_not = raylet.GcsClient(address=self.cluster_address).drain_node(
            self.node_id,
            reasons.DRAIN_NODE_REASON_PREEMPTION,
            "the machine is taken away",
            int((time.time() + deadline_s) * 1000),
        )
        assert is_accepted, why_not

    def process_ids(self) -> list[int]:
        """Of all its processes: its raylet, the agents, and the workers that run actors."""
        return [self.process_id, *descendants(self.process_id)]

    def _signal(self, number: int) -> None:
        # The caller comes last: it may be one of them.
        for one in sorted(self.process_ids(), key=os.getpid().__eq__):
            with suppress(ProcessLookupError):
                os.kill(one, number)


class Cluster:
    """A head, and nodes that join it while it runs."""

    def __init__(self, head: LocalHead, host: Host | None, resources: ExitStack) -> None:
        self.head = head
        self._host = host
        self._resources = resources

    @contextmanager
    def connected(self) -> Iterator[None]:
        """This process drives the cluster within the block, and then what it drove before.

        Not one on hosts: part of Ray's threads would be outside. Use `start_driver`.
        """
        before = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
        disconnect()
        ray.init(address=self.head.address, log_to_driver=False)
        try:
            yield
        finally:
            disconnect()
            if before is not None:
                ray.init(address=before, log_to_driver=False)

    def start_driver(self, command: Sequence[str], *, output: IO[bytes]) -> Popen[bytes]:
        """Run a command beside the head: `ray.init()` in it finds the cluster.

        What is returned is its guard, which ends with it, and has its exit code.
        """
        directory = Path(tempfile.mkdtemp(prefix="xdist-driver-"))
        guard = guarded(command, directory, self.head.environment, output)
        with on(self._host):
            return self._resources.enter_context(guard)

    def add_node(self, *, num_cpus: int, host: Host | None = None) -> AddedNode:
        """A node (a raylet of its own) that joins now; it is alive when this returns."""
        return self._resources.enter_context(added_node(self.head, num_cpus=num_cpus, host=host))


@contextmanager
def own_cluster(
    *,
    num_cpus: int,
    variables: Mapping[str, str],
    host: Host | None = None,
    arguments: Callable[[LocalHead], Sequence[str]] = lambda _: (),
) -> Iterator[Cluster]:
    """A cluster for a test or a module: a head with some CPUs, to which nodes can be added.

    On a host, or on this machine's loopback. `variables`: `QUICK_HEALTH_CHECKS` or, with {}, Ray's
    own; `arguments` are those of `LocalHead`.
    """
    with ExitStack() as resources:
        with on(host):
            head = LocalHead(
                num_cpus=num_cpus,
                variables={
                    **USUAL_VARIABLES,
                    "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"],
                    **(host.variables if host else {}),
                    **variables,
                },
                node_ip=host.ip if host else LOOPBACK,
                has_jobs=False,
                arguments=arguments,
            )
            resources.enter_context(head)
        yield Cluster(head, host, resources)


@contextmanager
def added_node(head: LocalHead, *, num_cpus: int, host: Host | None = None) -> Iterator[AddedNode]:
    """A node that joins a head; killed whole at the end of the block, if it is there by then."""
    directory = Path(tempfile.mkdtemp(prefix="xdist-node-"))
    ip = host.ip if host else LOOPBACK
    file = directory / "node"
    program = str(ROOT / "tests" / "node_process.py")
    command = [sys.executable, program, head.address, ip, str(num_cpus), str(file)]
    with ExitStack() as resources:
        log = resources.enter_context(tempfile.TemporaryFile())
        with on(host):
            guard = guarded(command, directory, head.environment, log)
            process = resources.enter_context(guard)
        wait_until(lambda: True if file.exists() or process.poll() is not None else None)
        if process.returncode is not None:
            log.seek(0)
            raise RuntimeError(f"the node ended with {process.returncode}: {log.read().decode()}")
        node_id, process_id = file.read_text().split()
        node = AddedNode(node_id, int(process_id), head.address)
        try:
            yield node
        finally:
            if process.poll() is None:
                node.kill()


def on(host: Host | None) -> AbstractContextManager[object]:
    """Processes that start within the block are on the host, or on this machine."""
    return host.namespace.entered() if host else nullcontext()


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalHead]:
    """The Ray of the whole test run, which this process is connected to: 8 CPUs by name."""
    with own_cluster(num_cpus=8, variables={}) as whole_run:
        ray.init(address=whole_run.head.address, log_to_driver=False)
        yield whole_run.head
        disconnect()


@pytest.fixture
def second_node(cluster: LocalHead) -> Iterator[AddedNode]:
    """Another node, of 2 CPUs, in the cluster of the test run."""
    with added_node(cluster, num_cpus=2) as node:
        yield node
        with suppress(ProcessLookupError):
            node.end()
        wait_until(lambda: None if is_alive(node.node_id) else "gone")


def is_alive(node_id: str) -> bool:
    """Whether the cluster that this process drives takes the node for alive."""
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def process_id_of(actor: ActorHandle[Any]) -> int:
    """Of the process in which an actor runs, busy or stopped: for `os.kill`."""
    process_id: int = ray._private.state.actors(actor._actor_id.hex())["Pid"]
    return process_id


def wait_until(attempt: Callable[[], Result | None], *, limit_s: float = 60) -> Result:
    """What the attempt returns, once that is something."""
    retrying = Retrying(
        retry=retry_if_result(lambda value: value is None),
        wait=wait_fixed(0.2),
        stop=stop_after_delay(limit_s),
    )
    result = retrying(attempt)
    assert result is not None
    return result
