"""Actors: how workers and parameter servers become actors of Ray, and what they reserve."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xdist import fork_servers
from xdist.config import ClusterConfig, TrainConfig
from xdist.parameter_server import ParameterServer
from xdist.server_plan import ServerPlan
from xdist.wire import WireVector
from xdist.worker import Worker

NO_RETRIES = {"max_restarts": 0, "max_task_retries": 0}
"""A push that Ray retried would count twice; an actor that it restarted would have forgotten its
weights.
"""


CALLS_AT_ONCE = 1000
"""Of a server, besides those in which workers wait: Ray's default for all together."""
WAITING_CALLS = 3
"""In which a worker may wait on one server, besides the pushes that it overlaps with."""
CONTROL = "control"
"""The methods of a worker that are called beside all others, as in `Worker.pulse`."""
NUM_CONTROL_THREADS = 2
ANSWER_S = 1.0
"""For those who are about to end to say how far they have come."""
SAVES = "saves"
"""Where a worker waits for what it writes beside its training."""


def worker_bundle(cluster: ClusterConfig) -> dict[str, float]:
    """What a worker reserves."""
    gpus = cluster.gpus_per_worker
    return _bundle(cluster.cpus_per_worker, gpus if isinstance(gpus, int) else 0)


def server_bundle(cluster: ClusterConfig) -> dict[str, float]:
    """What a parameter server reserves; nothing, if it is empty."""
    return _bundle(cluster.cpus_per_server, cluster.gpus_per_server)


def _bundle(cpus: float, gpus: int) -> dict[str, float]:
    """Ray wants no zeros in it."""
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", float(gpus))) if amount}


@cache
def _worker_class() -> Any:
    """Made once, or Ray would store each as another class."""
    remote: Any = ray.remote  # Its types do not know concurrency_groups.
    return remote(concurrency_groups={CONTROL: NUM_CONTROL_THREADS, SAVES: 1})(Worker)


def worker(
    config: TrainConfig, reserved: Mapping[str, float], *, where: Any, **arguments: Any
) -> ActorHandle[Any]:
    """A worker actor. where: a scheduling strategy; `arguments` are those of `Worker`."""
    actor_class: Any = _worker_class().options(
        **NO_RETRIES,
        num_cpus=reserved.get("CPU", 0),
        num_gpus=reserved.get("GPU", 0),
        scheduling_strategy=where,
        **fork_servers.options(config.cluster),
    )
    actor: ActorHandle[Any] = actor_class.remote(config, **arguments)
    return actor


def server_on(node: str, plan: ServerPlan) -> ActorHandle[Any]:
    """A parameter server actor on the node of this id, where it reserves nothing."""
    return server(plan, {}, where=NodeAffinitySchedulingStrategy(node, soft=False))


def server(plan: ServerPlan, reserved: Mapping[str, float], *, where: Any) -> ActorHandle[Any]:
    """A parameter server actor. where: a scheduling strategy."""
    waiting = plan.most_workers * (WAITING_CALLS + plan.config.servers.overlap)
    actor_class: Any = ray.remote(ParameterServer).options(
        **NO_RETRIES,
        max_concurrency=CALLS_AT_ONCE + waiting,
        num_cpus=reserved.get("CPU", 0),
        num_gpus=reserved.get("GPU", 0),
        scheduling_strategy=where,
        **fork_servers.options(plan.config.cluster),
    )
    actor: ActorHandle[Any] = actor_class.remote(plan, share=_share)
    return actor


def _share(weights: WireVector) -> ray.ObjectRef[WireVector]:
    """In the process of a server: have weights in the node's object store. Where there is no place
    for them the process ends, as all who wait for it would wait on; others take over.
    """
    try:
        return ray.put(weights)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        sys.stderr.write(f"a parameter server ends, as its node is full: {error}\n")
        sys.stderr.flush()
        os._exit(1)


def end(actors: Iterable[ActorHandle[Any]]) -> None:
    """Kill actors; those that are gone already stay gone."""
    for actor in actors:
        ray.kill(actor)


def first_ready(waiting: list[ray.ObjectRef[Any]], *, timeout_s: float) -> list[ray.ObjectRef[Any]]:
    """The first of them that is ready; none after the timeout."""
    if not waiting:  # Ray would not wait for nothing.
        threading.Event().wait(timeout_s)
        return []
    ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
    return ready


def answers(asked: Sequence[ray.ObjectRef[Any]]) -> list[Any]:
    """Those of who is there, and answers within `ANSWER_S`."""
    ready, _ = ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    found = []
    for answer in ready:
        with suppress(RayError):
            found.append(ray.get(answer))
    return found
