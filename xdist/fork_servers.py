"""Fork servers of a run: one on each node, which ends with the driver.

Actors and tasks with `options` are copies of their node's fork server; where there is none (yet),
Ray starts a process as it always does.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection
from functools import lru_cache
from importlib.resources import files
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xdist.config import ClusterConfig
from xdist.fork_server import Owner

OWN_INTERPRETER = frozenset(("py_executable", "pip", "uv", "conda", "container", "image_uri"))
"""What gives a job another interpreter than Ray's, or another root."""


class ForkServers:
    """Those of this process's connection to a cluster."""

    def __init__(self) -> None:
        self._owners: dict[str, ActorHandle[Any] | None] = {}
        """By node; None where it is not wanted any more."""

    def cover(self) -> None:
        """Have one started on every node that has none."""
        job_id = ray.get_runtime_context().get_job_id()
        for node in ray.nodes():
            node_id: str = node["NodeID"]
            if node["Alive"] and node_id not in self._owners:
                where = NodeAffinitySchedulingStrategy(node_id, soft=False)
                owner: Any = ray.remote(Owner).options(num_cpus=0, scheduling_strategy=where)
                self._owners[node_id] = owner.remote(node_id, job_id)

    def clear(self) -> None:
        """End all of them."""
        self._owners = {}

    def leave(self, node_ids: Collection[str]) -> None:
        """End those of nodes that are about to go: a node stays while an actor is there."""
        for node_id in self._owners.keys() & node_ids:
            if (owner := self._owners[node_id]) is not None:
                ray.kill(owner)
                self._owners[node_id] = None


_servers = ForkServers()


def leave(node_ids: Collection[str]) -> None:
    """Nodes are about to go: what this connection has there ends."""
    _servers.leave(node_ids)


def start(cluster: ClusterConfig) -> bool:
    """Have one on every node, if actors are to be copies. They import while this process goes on.
    Returns whether there are any.
    """
    of_job = ray.get_runtime_context().runtime_env
    if not cluster.fork_actors or OWN_INTERPRETER & set(of_job):
        return False
    _servers.cover()
    return True


def options(cluster: ClusterConfig) -> dict[str, Any]:
    """The options that make an actor or a task a copy."""
    return {"runtime_env": {"py_executable": _command()}} if start(cluster) else {}


def forget() -> None:
    """This process is about to leave its cluster, or is new in one. (The actors of two clusters can
    have the same ids: a handle must not outlive its connection.)
    """
    _servers.clear()


@lru_cache(maxsize=1)
def _command() -> str:
    """What runs the client, on nodes where this interpreter is; on others, their python3."""
    client = files("xdist").joinpath("fork_client.py").read_text()
    python = shlex.quote(sys.executable)
    script = (
        f'test -x {python} && exec {python} -S -E -c {shlex.quote(client)} "$@"; exec python3 "$@"'
    )
    return f"sh -c {shlex.quote(script)} sh"
